"""One training with TRL's SFTTrainer, in TRL's own environment: `trl_sft.py TRIAL.json`.

The trial (written by train.py) names model, rows, output and every setting; the figures go to its `result`.
The rows are those that our prepare stage made, token by token, with -100 as the label of what has no loss.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds from the first step's begin to the last step's end, as our loop counts them: data loading counts."""

    began = ended = cpu = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began, self.cpu = time.monotonic(), time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended, self.cpu = time.monotonic(), time.process_time() - self.cpu


def main(trial: dict[str, Any]) -> None:
    rows = load_dataset("json", data_files=trial["rows"], split="train", cache_dir=trial["cache"])
    if trial["first_rows"]:
        rows = rows.select(range(min(trial["first_rows"], len(rows))))
    clock = Clock()
    trainer = SFTTrainer(
        model=trial["model"],
        args=SFTConfig(output_dir=trial["output"], **trial["settings"]),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(trial["model"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **trial["lora"]),
        callbacks=[clock],
    )
    tokens, supervised = count(rows)
    if count(trainer.train_dataset) != (tokens, supervised):
        raise SystemExit("TRL cut or dropped rows: the settings of this trial do not train on the same tokens")
    trainer.train()
    trainer.save_model(trial["output"])
    epochs = trial["settings"]["num_train_epochs"]
    figures = {
        "steps": trainer.state.global_step,
        "seconds": clock.ended - clock.began,
        "cpu_seconds": clock.cpu,
        "tokens": tokens * epochs,
        "supervised_tokens": supervised * epochs,
        "peak_memory_bytes": peak_memory(),
        "dtype": str(next(trainer.model.parameters()).dtype),
        "attention": trainer.model.config._attn_implementation,
    }
    Path(trial["result"]).write_text(json.dumps(figures), encoding="utf-8")


def count(rows: Any) -> tuple[int, int]:
    """Tokens, and those that have a loss."""
    tokens = sum(len(row) for row in rows["input_ids"])
    return tokens, sum(label != -100 for row in rows["labels"] for label in row)


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
