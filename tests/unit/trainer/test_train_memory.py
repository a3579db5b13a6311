"""Memory of a training: what is measured is what was planned, and computing again changes no bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_api.spec import Precision, Task
from finetune_operator.sizing import CPU_RUNTIME, Training, estimate
from finetune_trainer.model.facts import load_config, read_facts
from finetune_trainer.model.load import build_skeleton
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train.checkpoint import identify
from finetune_trainer.train.footprint import add_footprint
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file

from tests.plans import make_plan
from tests.unit.trainer.memory_run import LABELS, LENGTH, Shape, make_run
from tests.unit.trainer.training_workspace import GENERATION, make_training

FULL = {"method": "Full", "lora": None}
LORA = {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05}}
AGAIN = {"training": {"activation_checkpointing": True}}

RUNS = {
    "LoRA": (Shape(layers=12), GENERATION | LORA),
    "LoRA, computed again": (Shape(layers=24, tokens=4096), GENERATION | LORA | AGAIN),
    "full, large vocabulary": (Shape(layers=2, vocabulary=32768, tokens=1024, steps=2), GENERATION | FULL),
    "full classification": (Shape(layers=6, steps=2), FULL),
    "full classification, computed again": (Shape(layers=8, vocabulary=65536, steps=2), FULL | AGAIN),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc's allocator is what is planned for")
@pytest.mark.parametrize("case", RUNS)
def test_a_process_grows_by_what_was_planned(tmp_path: Path, case: str) -> None:
    shape, changes = RUNS[case]
    plan, workspace = make_run(tmp_path, shape, **changes), Workspace(tmp_path)
    facts = add_footprint(
        read_facts(workspace.model, load_config(workspace.model, trust_remote_code=False)),
        lambda: build_skeleton(plan, workspace, LABELS if plan.task is Task.CLASSIFICATION else None),
        plan,
    )
    job = Training(
        task=plan.task,
        method=plan.method,
        model=facts,
        precision=Precision.FP32,
        longest=LENGTH,
        batch_tokens=2 * shape.tokens,
        gpus=0,
    )
    planned = estimate(job, shape.tokens, bool(plan.training.activation_checkpointing))
    command = [sys.executable, "-m", "tests.unit.trainer.memory_run", str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    measured = json.loads(output.splitlines()[-1])
    growth = measured["growth"]
    assert growth > 200e6, "so little that noise would count"
    assert growth == pytest.approx(planned.total - measured["before"], rel=0.2), planned
    assert measured["told"] == pytest.approx(measured["before"] + growth, rel=0.02)
    assert measured["before"] < CPU_RUNTIME


@pytest.mark.parametrize("changes", [{}, GENERATION, FULL, GENERATION | FULL], ids=str)
def test_activations_that_are_computed_again_change_no_bit(tmp_path: Path, changes) -> None:
    weights = []
    for folder, again in ((tmp_path / "kept", False), (tmp_path / "again", True)):
        plan = make_training(folder, **changes, training={"activation_checkpointing": again, "micro_batch_tokens": 64})
        run(plan, Telemetry(plan.stage, plan.job, port=0))
        weights.append(load_file(folder / "checkpoints" / "best" / "weights.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_may_go_on_with_or_without_it(tmp_path: Path) -> None:
    plans = [make_plan(tmp_path, training={"activation_checkpointing": again}) for again in (False, True)]
    assert identify(plans[0], "f") == identify(plans[1], "f")
