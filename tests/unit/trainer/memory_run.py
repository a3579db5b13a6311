"""Trains in a process of its own and tells what it held: `python -m tests.unit.trainer.memory_run FOLDER`.

The models are narrow and deep, so that activations and weights are hundreds of MB and a pass takes a second.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetune_api.plan import Plan
from finetune_api.spec import Task
from finetune_trainer.data.store import DataManifest, TokenizedRow, write_manifest, write_split
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tests.models import save_tiny_bert, save_tiny_llama
from tests.plans import make_plan

LABELS = ["a", "b", "c"]
LENGTH = 128
PLAN = "plan.json"


@dataclass(frozen=True)
class Shape:
    width: int = 128
    layers: int = 16
    vocabulary: int = 4096
    tokens: int = 2048
    """Of a pass."""
    steps: int = 1
    """With 2, each of two passes: then gradients and the optimizer's moments are there beside the activations."""


def make_run(folder: Path, shape: Shape, **changes: Any) -> Plan:
    """Writes a workspace with rows of full length, and its plan."""
    steps = {
        "epochs": None,
        "max_steps": shape.steps,
        "batch_sequences": shape.steps * shape.tokens // LENGTH,
        "micro_batch_tokens": shape.tokens,
        "max_length": LENGTH,
        "checkpoint_steps": shape.steps,
        "evaluation_steps": shape.steps,
    }
    plan = make_plan(
        folder, **{**changes, "training": steps | changes.get("training", {}), "device": {"compact_heap": True}}
    )
    workspace = Workspace(folder)
    _save_model(plan.task, shape, workspace.model)
    random = np.random.default_rng(0)
    splits = {
        split: write_split(workspace.data / split, [_row(random, plan.task) for _ in range(rows)], plan.task)
        for split, rows in {"train": shape.steps**2 * shape.tokens // LENGTH, "validation": 2}.items()
    }
    labels = LABELS if plan.task is Task.CLASSIFICATION else None
    manifest = DataManifest(task=plan.task, labels=labels, max_length=LENGTH, fingerprint="f" * 64, splits=splits)
    write_manifest(workspace.data, manifest)
    (folder / PLAN).write_text(plan.to_json())
    return plan


def _row(random: np.random.Generator, task: Task) -> TokenizedRow:
    words = random.integers(32, 80, size=LENGTH).tolist()
    if task is Task.CLASSIFICATION:
        return TokenizedRow(words, label=int(random.integers(len(LABELS))))
    return TokenizedRow(words, loss_mask=[True] * LENGTH)


def _save_model(task: Task, shape: Shape, folder: Path) -> None:
    usual = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if task is Task.CLASSIFICATION:
            save_tiny_bert(folder)  # for its tokenizer
            BertModel(BertConfig(**usual, intermediate_size=4 * shape.width)).save_pretrained(folder)
        else:
            save_tiny_llama(folder)
            sizes = {"num_key_value_heads": 2, "intermediate_size": 3 * shape.width, "tie_word_embeddings": False}
            LlamaForCausalLM(LlamaConfig(**usual, **sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)


def resident_bytes(field: str) -> int:
    """VmRSS: now; VmHWM: the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(folder: Path) -> None:
    """Prints the growth of the process over what it was before the model was loaded, as JSON."""
    torch.set_num_threads(1)
    plan = Plan.model_validate_json((folder / PLAN).read_bytes())
    before = resident_bytes("VmRSS")
    result = run(plan, Telemetry(plan.stage, plan.job, port=0))
    told = result.train.peak_memory_bytes if result.train else None
    print(json.dumps({"growth": resident_bytes("VmHWM") - before, "before": before, "told": told}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
