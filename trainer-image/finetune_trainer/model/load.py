"""The model of a job: foundation model from the workspace, the task's head, the method's trainable weights."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan
from finetune_api.spec import Task
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from finetune_trainer.errors import StageError, UserError
from finetune_trainer.model.adapters import apply_method, block_lists, head_modules
from finetune_trainer.model.quantize import Nf4
from finetune_trainer.model.start_adapter import check_layers, check_start, load_start
from finetune_trainer.workspace import Workspace

logger = logging.getLogger(__name__)


def load_tokenizer(workspace: Workspace, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the workspace's model; one without a padding token pads with its end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            workspace.model, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise _invalid(f"its tokenizer cannot be loaded ({_first_line(error)})") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise _invalid("its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(
    plan: Plan, workspace: Workspace, labels: list[str] | None, quantization: Nf4 | None = None
) -> PreTrainedModel | PeftModel:
    """The model as it is before its first step, in fp32 on the CPU, with exactly the trained weights requiring grad.

    With `quantization` it is on that device instead, and the frozen layers of its blocks are quantised.

    The fresh weights (head, adapters) are drawn from training.seed, so every call gives the same model; the
    global RNG is left as it was. With model.adapter they are those of the adapter in the workspace. `labels`, in the
    order of the class ids, are for Classification.
    Raises UserError (ModelInvalid) if the weights do not belong to the model's config or task.
    """
    tokenizer = load_tokenizer(workspace, plan.model.trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.training.seed)
        model = _load_foundation(plan, workspace, labels, quantization)
        _set_padding(model, int(tokenizer.pad_token_id))
        model = apply_method(model, plan)
    if plan.model.adapter is not None:
        load_start(workspace.adapter, model)
    return model


def check_start_adapter(plan: Plan, workspace: Workspace, labels: list[str] | None, revision: str | None) -> None:
    """Raises UserError if the adapter in the workspace does not fit the job. No weights of the model are read."""
    check_start(workspace.adapter, plan, labels, revision)
    check_layers(workspace.adapter, build_skeleton(plan, workspace, labels))


def build_skeleton(plan: Plan, workspace: Workspace, labels: list[str] | None) -> PreTrainedModel | PeftModel:
    """The job's model on the meta device, with exactly the trained weights requiring grad. No weights are read."""
    with torch.device("meta"):
        return apply_method(_skeleton(plan, workspace, labels), plan)


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights by their names in `model`, detached but not copied."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def load_trainable_state(model: torch.nn.Module, path: Path) -> None:
    """Puts the weights of a `weights.safetensors` into `model`; raises StageError if they are not exactly its own."""
    stored, own = load_file(path), trainable_state(model)
    if stored.keys() != own.keys() or any(stored[name].shape != weight.shape for name, weight in own.items()):
        raise StageError(
            Reason.STAGE_FAILED,
            f"{path.parent.name}/{path.name} is from another model or method; delete the checkpoints and train again",
        )
    for name, weight in own.items():
        fill(weight, stored[name])


def fill(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Copies a whole tensor into a weight, or of a sharded weight this process's part of it."""
    with torch.no_grad():
        if hasattr(weight, "device_mesh"):  # a DTensor, whose module takes a second to import
            from torch.distributed.tensor import distribute_tensor

            value = value.to(weight.device)
            value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)  # type: ignore[attr-defined]
        weight.copy_(value)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight with all its parts; of a sharded one all processes have to ask."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _skeleton(plan: Plan, workspace: Workspace, labels: list[str] | None) -> PreTrainedModel:
    """The foundation model with the task's head, without weights."""
    auto: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    trusted = {"trust_remote_code": plan.model.trust_remote_code}
    config = AutoConfig.from_pretrained(workspace.model, local_files_only=True, **trusted)
    if labels is not None:
        config.num_labels = len(labels)
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, **trusted)
    return model


def _load_foundation(
    plan: Plan, workspace: Workspace, labels: list[str] | None, quantization: Nf4 | None
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    settings: dict[str, Any] = {}
    if plan.task is Task.CLASSIFICATION:
        if not labels:
            raise ValueError("Classification needs labels")
        auto = AutoModelForSequenceClassification
        settings = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,  # a head for other labels is replaced; anything else is refused below
        }
    if quantization is not None:
        settings |= quantization.loading(_skeleton(plan, workspace, labels))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of missing weights is judged below
    try:
        model, info = auto.from_pretrained(
            workspace.model,
            local_files_only=True,
            trust_remote_code=plan.model.trust_remote_code,
            use_safetensors=None if plan.model.allow_pickle else True,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _invalid(f"it cannot be loaded for task {plan.task.value} ({_first_line(error)})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_weights(model, plan.task, info)
    return model


def _check_weights(model: PreTrainedModel, task: Task, info: dict[str, Any]) -> None:
    """Only the head may be missing or of another size, and no block of the weights may be left over."""
    heads = tuple(f"{name}." for name in head_modules(model)) if task is Task.CLASSIFICATION else ()
    missing = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    foreign = sorted(key for key in missing if not key.startswith(heads))
    if foreign:
        raise _invalid(f"its weights have no {_some(foreign)} of the shape that {type(model).__name__} needs")
    blocks = tuple(f"{name.removeprefix(model.base_model_prefix + '.')}." for name in block_lists(model))
    left_over = sorted(
        key for key in info["unexpected_keys"] if key.removeprefix(model.base_model_prefix + ".").startswith(blocks)
    )
    if left_over:
        raise _invalid(f"its weights hold {_some(left_over)}, which its config.json does not describe")
    if missing:
        logger.info("New weights for %s", _some(sorted(missing)))


def _set_padding(model: PreTrainedModel, pad_token_id: int) -> None:
    """Decoders find the last token of a text by the padding id in their config."""
    rows = model.get_input_embeddings().weight.shape[0]
    if pad_token_id >= rows:
        raise _invalid(f"its tokenizer pads with token {pad_token_id}, but it has only {rows} embeddings")
    model.config.pad_token_id = pad_token_id
    model.config.get_text_config().pad_token_id = pad_token_id


def _invalid(what: str) -> UserError:
    return UserError(Reason.MODEL_INVALID, f"model.uri: the model does not fit: {what}")


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
