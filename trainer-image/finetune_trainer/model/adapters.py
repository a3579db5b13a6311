"""Which weights a method trains, and the names of the parts of a transformer that it needs for that."""

import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan, PlanLora
from finetune_api.spec import LoraVariant, MethodType, Task
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune_trainer.errors import UserError

LINEAR = (torch.nn.Linear, Conv1D)
POOLER = "pooler"


def apply_method(model: PreTrainedModel, plan: Plan) -> PreTrainedModel | PeftModel:
    """Freezes what the method does not train; LoRA puts its adapters in, drawn from the current RNG.

    Raises UserError if there is nothing that LoRA could adapt, or a layer that it may not, or if the model has fewer
    layers than are to be trained.
    """
    head = head_modules(model) if plan.task is Task.CLASSIFICATION else []
    adapted: torch.nn.Module = model
    match plan.method:
        case MethodType.FULL:
            if plan.last_layers is not None:
                _freeze_all_but_last(model, plan.last_layers, head)
        case MethodType.HEAD:
            adapted.requires_grad_(False)
            for name in head:
                adapted.get_submodule(name).requires_grad_(True)
        case MethodType.LORA:
            if plan.lora is None:
                raise ValueError("a plan with method LoRA has no lora settings")
            adapted = _with_lora(model, plan.task, plan.lora, head)
    return adapted


def training_mode(model: torch.nn.Module, head_only: bool) -> None:
    """Dropout on, except in an encoder that is frozen as a whole: its features are then always the same."""
    model.train()
    if head_only:
        without_adapters(model).base_model.eval()


def head_weights(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained weights of a classifier's head, whether or not LoRA has wrapped it."""
    foundation = without_adapters(model)
    modules = (foundation.get_submodule(name) for name in head_modules(foundation))
    return [weight for module in modules for weight in module.parameters() if weight.requires_grad]


def without_adapters(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model, which LoRA may have wrapped; its layers keep their adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


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


def _freeze_all_but_last(model: PreTrainedModel, layers: int, head: list[str]) -> None:
    """Leaves the last blocks, the final norm and the head to be trained.

    `head` is empty for Generation, whose head is the output layer, unless it shares its weights with the embeddings.
    """
    # where there are several lists, the blocks are the one with most of the weights
    name = max(block_lists(model), key=lambda name: _count(model.get_submodule(name)), default="")
    blocks = list(model.get_submodule(name).children()) if name else []
    if layers > len(blocks):
        raise too_few_layers(layers, type(model).__name__, len(blocks))
    beside = model.get_submodule(name.rpartition(".")[0]).named_children()
    norms = [module for child, module in beside if _is_norm(module) and "emb" not in child]
    output = model.get_output_embeddings() if not head else None
    outputs = [output] if output is not None and not _is_tied(model) else []
    model.requires_grad_(False)
    for module in (*blocks[-layers:], *norms, *outputs, *map(model.get_submodule, head)):
        module.requires_grad_(True)


def too_few_layers(wanted: int, model: str, layers: int) -> UserError:
    """What to do about `method.trainable.lastLayers`."""
    return UserError(
        Reason.INVALID_SPEC,
        f"method.trainable.lastLayers: {wanted} layers are to be trained, but {model} has {layers}; "
        "leave method.trainable out to train all weights",
    )


def _is_norm(module: torch.nn.Module) -> bool:
    """Norms hold vectors and nothing else."""
    weights = list(module.parameters())
    return bool(weights) and all(weight.dim() <= 1 for weight in weights)


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer and the input embeddings share their weights."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight is not None and weight is getattr(model.get_input_embeddings(), "weight", None)


def _count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


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
    if not _is_tied(model):
        return
    weight = model.get_output_embeddings().weight
    layers = ((name, layer) for name, layer in adapted.named_modules() if isinstance(layer, BaseTunerLayer))
    tied = sorted(name.rsplit(".", 1)[-1] for name, layer in layers if layer.get_base_layer().weight is weight)
    if tied:
        raise UserError(
            Reason.INVALID_SPEC,
            f"method.lora.targetModules: {', '.join(tied)} of {type(model).__name__} cannot be adapted: its output "
            "layer and its input embeddings share their weights; leave it out, or use method.type Full",
        )
