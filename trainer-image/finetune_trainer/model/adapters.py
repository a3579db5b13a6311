"""Which weights a method trains, and the names of the parts of a transformer that it needs for that."""

import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan, PlanLora
from finetune_api.spec import LoraVariant, MethodType, Task
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_trainer.errors import UserError

LINEAR = (torch.nn.Linear, Conv1D)
POOLER = "pooler"


def apply_method(model: PreTrainedModel, plan: Plan) -> torch.nn.Module:
    """Freezes what the method does not train; LoRA puts its adapters in, drawn from the current RNG.

    Raises UserError if there is nothing that LoRA could adapt, or a layer that it may not.
    """
    head = head_modules(model) if plan.task is Task.CLASSIFICATION else []
    adapted: torch.nn.Module = model
    match plan.method:
        case MethodType.FULL:
            pass
        case MethodType.HEAD:
            adapted.requires_grad_(False)
            for name in head:
                adapted.get_submodule(name).requires_grad_(True)
        case MethodType.LORA:
            if plan.lora is None:
                raise ValueError("a plan with method LoRA has no lora settings")
            adapted = _with_lora(model, plan.task, plan.lora, head)
    return adapted


def training_mode(model: torch.nn.Module, method: MethodType) -> None:
    """Dropout on, except in an encoder that is frozen as a whole: its features are then always the same."""
    model.train()
    if method is MethodType.HEAD:
        model.base_model.eval()  # type: ignore[union-attr]


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules between the encoder's last hidden states and the logits, for Classification.

    These are the children beside the base model, and the base model's own pooler: it was trained for another
    task (often none that anybody uses), and a frozen one would stand between the classifier and the text.
    """
    base = model.base_model
    names = [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]
    pooler = getattr(base, POOLER, None)
    if isinstance(pooler, torch.nn.Module):
        names.append(f"{model.base_model_prefix}.{POOLER}")
    return names


def block_lists(model: PreTrainedModel) -> list[str]:
    """Names of the outermost module lists of the base model: its transformer blocks."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    found: list[str] = []
    for name, module in model.base_model.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def block_linears(model: PreTrainedModel) -> list[str]:
    """Names of all linear layers of the transformer blocks."""
    return [
        f"{block}.{name}"
        for block in block_lists(model)
        for name, module in model.get_submodule(block).named_modules()
        if isinstance(module, LINEAR)
    ]


def _with_lora(model: PreTrainedModel, task: Task, lora: PlanLora, head: list[str]) -> torch.nn.Module:
    targets = lora.target_modules or block_linears(model)
    if not targets:
        raise UserError(
            Reason.MODEL_INVALID,
            f"no linear layers were found in the blocks of {type(model).__name__}: "
            "name the layers in method.lora.targetModules, or use method.type Full",
        )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if task is Task.CLASSIFICATION else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.variant is LoraVariant.RS_LORA,
        use_dora=lora.variant is LoraVariant.DORA,
        target_modules=targets,
        modules_to_save=head or None,
    )
    try:
        adapted: torch.nn.Module = get_peft_model(model, config)
    except ValueError as error:
        if lora.target_modules is None:
            raise
        names = sorted({name.rsplit(".", 1)[-1] for name in block_linears(model)})
        raise UserError(
            Reason.INVALID_SPEC,
            f"method.lora.targetModules: {', '.join(lora.target_modules)} cannot be adapted in "
            f"{type(model).__name__}; its linear layers are called {', '.join(names)}",
        ) from error
    _refuse_tied(model, adapted)
    return adapted


def _refuse_tied(model: PreTrainedModel, adapted: torch.nn.Module) -> None:
    """Raises UserError if LoRA adapts one of two layers with the same weights: merging it would change the other."""
    output = model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    if weight is None or weight is not getattr(model.get_input_embeddings(), "weight", None):
        return
    layers = ((name, layer) for name, layer in adapted.named_modules() if isinstance(layer, BaseTunerLayer))
    tied = sorted(name.rsplit(".", 1)[-1] for name, layer in layers if layer.get_base_layer().weight is weight)
    if tied:
        raise UserError(
            Reason.INVALID_SPEC,
            f"method.lora.targetModules: {', '.join(tied)} of {type(model).__name__} cannot be adapted: its output "
            "layer and its input embeddings share their weights; leave it out, or use method.type Full",
        )
