"""A workspace as prepare leaves it: a tiny model and random rows that can be learnt."""

import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.spec import Task
from finetune_trainer.data.store import (
    DataManifest,
    SplitManifest,
    TokenizedRow,
    open_split,
    write_manifest,
    write_split,
)
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file, save_file

from tests.models import save_tiny_bert, save_tiny_llama
from tests.plans import make_plan

LABELS = ["negative", "neutral", "positive"]
GENERATION = {"task": "Generation", "evaluation": {"metrics": ["loss", "perplexity"]}}
PREFERENCE = {"task": "Generation", "dpo": {"beta": 0.1}, "evaluation": {"metrics": ["rewardAccuracy", "loss"]}}
CLASSIFICATION_ROWS = {"train": 44, "validation": 12, "test": 15}
WORDS = (32, 80)
"""Token ids that both tiny models have as ordinary ones."""


@cache
def tiny_model(task: Task) -> Path:
    folder = Path(mkdtemp(prefix="tiny-"))
    return (save_tiny_bert if task is Task.CLASSIFICATION else save_tiny_llama)(folder)


def make_training(folder: Path, rows: dict[str, int] | None = None, **changes: Any) -> Plan:
    """Writes model and data to `folder` and returns the train plan. Adapters have dropout, as the encoder has."""
    plan = make_plan(folder, **({"lora": {"dropout": 0.1}} | changes))
    workspace = Workspace(folder)
    if not workspace.model.exists():
        shutil.copytree(tiny_model(plan.task), workspace.model)
    write_data(workspace, plan.task, rows or CLASSIFICATION_ROWS, pairs=plan.dpo is not None)
    return plan


def untie(workspace: Workspace) -> None:
    """Gives the generator's output layer weights of its own."""
    settings = workspace.model / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tie_word_embeddings": False}))
    path = workspace.model / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})


def weigh(workspace: Workspace, weights: Sequence[float], spoil: bool = False) -> None:
    """Gives the training rows of a classification weights; `spoil`: and those that weigh nothing another label."""
    rows = open_split(workspace.data, "train")
    labels = [(rows.label(n) + (spoil and weight == 0)) % len(LABELS) for n, weight in enumerate(weights)]
    found = [
        TokenizedRow(rows.input_ids(n).tolist(), label=label, weight=weight)
        for n, (label, weight) in enumerate(zip(labels, weights, strict=True))
    ]
    write_split(workspace.data / "train", found, Task.CLASSIFICATION, weighted=True)


def write_data(
    workspace: Workspace, task: Task, rows: dict[str, int], fingerprint: str = "f" * 64, pairs: bool = False
) -> None:
    splits: dict[str, SplitManifest] = {}
    for seed, (split, count) in enumerate(rows.items()):
        make = _preferred if pairs else _labelled if task is Task.CLASSIFICATION else _completion
        random = np.random.default_rng(seed)
        splits[split] = write_split(workspace.data / split, [make(random) for _ in range(count)], task)
    labels = LABELS if task is Task.CLASSIFICATION else None
    write_manifest(
        workspace.data,
        DataManifest(task=task, labels=labels, max_length=64, fingerprint=fingerprint, splits=splits),
    )


def _labelled(random: np.random.Generator) -> TokenizedRow:
    """The label is the third of the vocabulary that the words come from."""
    label = int(random.integers(3))
    low = WORDS[0] + 16 * label
    words = random.integers(low, low + 16, size=random.integers(3, 20))
    return TokenizedRow([2, *words.tolist(), 3], label=label)


def _completion(random: np.random.Generator) -> TokenizedRow:
    """A prompt, then the same words again: only these are supervised."""
    words = random.integers(*WORDS, size=random.integers(2, 8)).tolist()
    return TokenizedRow([1, *words, *words, 2], loss_mask=[False] * (len(words) + 1) + [True] * (len(words) + 1))


def _preferred(random: np.random.Generator) -> TokenizedRow:
    """Two answers of random words to the same prompt, the better one with a word of the vocabulary's last third."""
    prompt = random.integers(*WORDS, size=random.integers(1, 6)).tolist()
    answers = random.integers(WORDS[0], 64, size=(2, random.integers(2, 8))).tolist()
    answers[0][random.integers(len(answers[0]))] = int(random.integers(64, WORDS[1]))
    chosen, rejected = (
        TokenizedRow([1, *prompt, *answer, 2], loss_mask=[False] * (len(prompt) + 1) + [True] * (len(answer) + 1))
        for answer in answers
    )
    return chosen._replace(rejected=rejected)


def stop_after(plan: Plan, step: int) -> Telemetry:
    """Telemetry that asks to stop when the step is reported."""
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    update = telemetry.update

    def watch(**fields: Any) -> None:
        update(**fields)
        if fields.get("step") == step:
            telemetry.stop_requested.set()

    telemetry.update = watch
    return telemetry
