"""The other side: TRL in an environment of its own, on the rows that our stage prepare has made."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import BUILD, HERE, ROWS_PER_STEP, WORK, execute, install
from ours import Ours
from report import Figures

TRL_VENV = BUILD / "trl-venv"
TRL_PACKAGES = ("trl==1.16.0", "torch", "transformers", "peft", "accelerate")
"""All but the first as they are locked."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of the blocks: what ours takes by itself."""


class Trl:
    """The other side, in an environment of its own."""

    def __init__(self, options: argparse.Namespace, ours: Ours) -> None:
        self._options = options
        self._ours = ours
        self._rows = WORK / "rows.jsonl"
        execute([sys.executable, __file__, ours.workspace, self._rows], "export", options)

    def train(self, name: str, changes: dict[str, Any], adapter: Path, first_rows: int | None = None) -> Figures:
        """One training; of the first rows only, if asked for."""
        result = WORK / "trl.result.json"
        trial = {
            "model": str(self._ours.workspace / "model"),
            "rows": str(self._rows),
            "first_rows": first_rows,
            "cache": str(WORK / "datasets"),
            "output": str(adapter),
            "result": str(result),
            "settings": {**self._shared(), **changes},
            "lora": {
                "r": self._options.rank,
                "lora_alpha": 2 * self._options.rank,
                "lora_dropout": 0.0,
                "target_modules": list(TARGETS),
            },
        }
        path = WORK / "trl.trial.json"
        path.write_text(json.dumps(trial, indent=2), encoding="utf-8")
        result.unlink(missing_ok=True)
        execute([trl_python(), HERE / "trl_sft.py", path], name, self._options)
        figures = json.loads(result.read_text(encoding="utf-8"))
        return Figures(**{field: figures[field] for field in Figures.__dataclass_fields__ if field in figures})

    def candidates(self) -> dict[str, dict[str, Any]]:
        """Settings that could be TRL's fastest; each makes optimizer steps of as many tokens as the others do."""
        budget = ROWS_PER_STEP * self._options.mean_length
        found = {
            f"packs of {budget // parts}, {parts} a step": {
                "packing": True,
                "max_length": budget // parts,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": parts,
            }
            for parts in (1, 2, 4)
            if budget // parts >= self._ours.data.max_length
        }
        for rows in (ROWS_PER_STEP, ROWS_PER_STEP // 4):
            found[f"grouped by length, {rows} rows x {ROWS_PER_STEP // rows}"] = {
                "train_sampling_strategy": "group_by_length",
                "max_length": self._options.max_length,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": ROWS_PER_STEP // rows,
            }
        load: dict[str, Any] = {"attn_implementation": self._options.trl_attention}
        if self._options.precision == "bf16":
            load["dtype"] = "bfloat16"
        fast = {"gradient_checkpointing": False, "model_init_kwargs": load}
        return {name: {**settings, **fast} for name, settings in found.items()}

    def default(self) -> dict[str, Any]:
        return {"max_length": self._options.max_length, "per_device_train_batch_size": ROWS_PER_STEP}

    def _shared(self) -> dict[str, Any]:
        options = self._options
        return {
            "num_train_epochs": options.epochs,
            "learning_rate": options.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
            "optim": "adamw_torch_fused",
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "seed": options.seed,
            "bf16": options.precision == "bf16",
            "use_cpu": options.gpus == 0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


def export_rows(workspace: Path, target: Path) -> None:
    """The prepared training rows for TRL: input_ids, and labels with -100 where there is no loss."""
    from finetune_trainer.data.store import open_split

    rows = open_split(workspace / "data", "train")
    with target.open("w", encoding="utf-8") as file:
        for row in range(len(rows)):
            ids, supervised = rows.input_ids(row).tolist(), rows.loss_mask(row).tolist()
            labels = [token if learned else -100 for token, learned in zip(ids, supervised, strict=True)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def install_trl() -> None:
    install(TRL_VENV, TRL_PACKAGES)


def trl_python() -> Path:
    return TRL_VENV / "bin" / "python"


if __name__ == "__main__":
    export_rows(Path(sys.argv[1]), Path(sys.argv[2]))
