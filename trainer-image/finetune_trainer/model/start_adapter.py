"""The adapter that a job goes on from: whether it fits the job, and its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan, PlanLora
from finetune_api.spec import LoraVariant
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from finetune_trainer.errors import UserError
from finetune_trainer.fetch_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_CONFIG, FIELD
from finetune_trainer.storage import display_uri


def check_start(folder: Path, plan: Plan, labels: list[str] | None, revision: str | None) -> None:
    """Raises UserError if the adapter in `folder` is for another model, other LoRA settings or other labels.

    `revision` is the foundation model's commit. Whether the layers are the same is for `check_layers` to say.
    """
    settings = _read(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise _invalid(f"it is of type {settings.get('peft_type')}, and only LoRA can be gone on with")
    if any(settings.get(name) for name in ("rank_pattern", "alpha_pattern", "layer_replication")):
        raise _invalid("its layers have ranks or scales of their own, which a FineTuneJob cannot express")
    _check_base(settings, plan, revision)
    if plan.lora is None:
        raise ValueError("a plan with an adapter has no lora settings")
    _check_lora(settings, plan.lora)
    if labels is not None and (folder / BASE_CONFIG).is_file():
        known = list(_read(folder / BASE_CONFIG).get("id2label", {}).values())
        if known != labels:
            raise _invalid(f"it knows the labels {_some(known)}; set dataset.labels to these, in this order")


def check_layers(folder: Path, model: PeftModel) -> None:
    """Raises UserError if the adapter's weights are not exactly those that `model` (may be on meta) trains."""
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise _invalid(f"its {ADAPTER_WEIGHTS} is damaged") from error
    wanted = {name: list(weight.shape) for name, weight in _own_state(model).items()}
    if found == wanted:
        return
    if lacking := sorted(wanted.keys() - found.keys()):
        raise _invalid(f"it has no {_some(lacking)}; method.lora.targetModules must be those it was trained with")
    if left_over := sorted(found.keys() - wanted.keys()):
        raise _invalid(f"it also has {_some(left_over)}; method.lora.targetModules must be those it was trained with")
    other = sorted(name for name in wanted if found[name] != wanted[name])
    raise _invalid(f"the shapes of its {_some(other)} are not those of the model and its labels")


def load_start(folder: Path, model: PeftModel) -> None:
    """Puts the adapter's weights into `model`; raises UserError like `check_layers`."""
    check_layers(folder, model)
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def _own_state(model: PeftModel) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def _check_base(settings: dict[str, Any], plan: Plan, revision: str | None) -> None:
    """The names' last parts count: a copy of a hub's model may lie elsewhere."""
    base, uri = str(settings.get("base_model_name_or_path") or ""), display_uri(plan.model.location)
    if _last_part(base) != _last_part(uri):
        raise _invalid(f"it was trained for the model {base or 'of no name'}, and model.uri is {uri}")
    trained = settings.get("revision")
    if trained and revision and trained != revision:
        raise _invalid(f"it was trained for revision {trained} of the model, not {revision}: set model.revision")


def _check_lora(settings: dict[str, Any], lora: PlanLora) -> None:
    variant = (
        LoraVariant.DORA
        if settings.get("use_dora")
        else LoraVariant.RS_LORA
        if settings.get("use_rslora")
        else LoraVariant.LORA
    )
    found = {"variant": variant.value, "rank": settings.get("r"), "alpha": settings.get("lora_alpha")}
    wanted = {"variant": lora.variant.value, "rank": lora.rank, "alpha": lora.alpha}
    if found != wanted:
        shown = ", ".join(f"{name}: {value}" for name, value in found.items())
        raise _invalid(f"its settings are not those of this job: write method.lora: {{{shown}}}")


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise _invalid(f"its {path.name} is damaged")
    return document


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _invalid(what: str) -> UserError:
    return UserError(Reason.MODEL_INVALID, f"{FIELD}: the adapter does not fit: {what}")
