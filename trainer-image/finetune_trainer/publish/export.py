"""The trained model in the formats of PEFT (an adapter) and transformers (a complete model)."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from finetune_api.plan import Plan
from finetune_api.spec import OutputFormat, Task
from peft import PeftModel
from safetensors import safe_open

from finetune_trainer.model.load import load_tokenizer
from finetune_trainer.storage import display_uri
from finetune_trainer.workspace import Workspace

CONFIG_FOLDER = "base_config"
"""Beside a classification adapter: the config, with labels, that its foundation model has to be loaded with.

Not `config.json` at the top: transformers takes a folder with that for a complete model.
"""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types by their names in safetensors."""


def export(model: Any, plan: Plan, workspace: Workspace, revision: str | None, folder: Path) -> torch.dtype:
    """Writes model and tokenizer to `folder` and returns the type that the weights are stored in: fp32 for an
    adapter, that of the foundation model for a complete model. `revision` is the foundation model's; `model`, which
    has to be in fp32 so that merging rounds nothing, is used up.
    """
    dtype = stored_dtype(workspace.model)
    adapter = plan.output.format is OutputFormat.ADAPTER
    if adapter:
        _export_adapter(model, plan, dtype, revision, folder)
    else:
        complete = model.merge_and_unload() if isinstance(model, PeftModel) else model
        complete.to(dtype).save_pretrained(folder)
    tokenizer = load_tokenizer(workspace, plan.model.trust_remote_code)
    for ours in ("is_local", "local_files_only"):  # how we loaded it is nothing to tell others
        tokenizer.init_kwargs.pop(ours, None)
    tokenizer.save_pretrained(folder)
    return torch.float32 if adapter else dtype


def _export_adapter(model: PeftModel, plan: Plan, dtype: torch.dtype, revision: str | None, folder: Path) -> None:
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = foundation_name(plan)
    settings.revision = revision
    for field in ("target_modules", "modules_to_save"):  # sets, which PEFT would write in another order every time
        value = getattr(settings, field)
        if value is not None and not isinstance(value, str):
            setattr(settings, field, sorted(set(value)))
    # "auto" would ask a hub whether the vocabulary was changed; it never is
    model.save_pretrained(folder, save_embedding_layers=False)
    if plan.task is Task.CLASSIFICATION:
        foundation = model.get_base_model()
        foundation.config.dtype = dtype
        foundation.config.architectures = [type(foundation).__name__]
        foundation.config.save_pretrained(folder / CONFIG_FOLDER)


def foundation_name(plan: Plan) -> str:
    """The foundation model as its user knows it: `owner/name` on the Hugging Face hub, else its URI."""
    return display_uri(plan.model.location).removeprefix("hf://").rstrip("/")


def stored_dtype(model: Path) -> torch.dtype:
    """The type that most of the weights in `model/` have; fp32 if they are not stored as floats in safetensors."""
    numbers: Counter[torch.dtype] = Counter({torch.float32: 0})
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                weight = weights.get_slice(name)
                if weight.get_dtype() in FLOATS:
                    numbers[FLOATS[weight.get_dtype()]] += math.prod(weight.get_shape())
    return numbers.most_common(1)[0][0]
