"""Rows that count less than others: a weighted mean over the optimizer step, in training alone."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.spec import Precision, Task
from finetune_trainer.data.store import Rows, open_split
from finetune_trainer.errors import Interrupted
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import reporting
from finetune_trainer.train.device import Device
from finetune_trainer.train.features import find_encoder
from finetune_trainer.train.forward import prove
from finetune_trainer.train.loop import accumulate_gradients
from finetune_trainer.train.micro_batches import Batching
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from tests.unit.trainer.training_workspace import CLASSIFICATION_ROWS, make_training, stop_after, weigh

CPU = Device(torch.device("cpu"), "CPU", Precision.FP32)
ROWS = CLASSIFICATION_ROWS["train"]
WEIGHTS = [(1.0, 0.3, 0.0, 0.75)[row % 4] for row in range(ROWS)]
CUTS = ((10_000, None), (70, None), (70, 5), (1, None))


def weighted(folder: Path, weights: list[float] = WEIGHTS, spoil: bool = False, **changes) -> Plan:
    plan = make_training(folder, **changes)
    weigh(Workspace(folder), weights, spoil)
    return plan


def classifier(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3).eval()


def reference(model: torch.nn.Module, data: Rows, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Gradients of sum(w * loss) / sum(w), row by row, by the model's own forward pass."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows.tolist():
        logits = model(input_ids=torch.from_numpy(data.input_ids(row)).unsqueeze(0)).logits
        total = total + WEIGHTS[row] * functional.cross_entropy(logits, torch.tensor([data.label(row)]))
    (total / sum(WEIGHTS[row] for row in rows.tolist())).backward()
    return gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("tokens", "padding"), CUTS)
def test_gradients_are_those_of_the_weighted_mean_however_a_step_is_cut(tmp_path: Path, tokens: int, padding) -> None:
    weighted(tmp_path)
    model, data = classifier(tmp_path), open_split(tmp_path / "data", "train")
    rows = np.arange(5, 25)
    expected = reference(model, data, rows)
    model.zero_grad()
    batching = Batching(Task.CLASSIFICATION, False, tokens, 0, padding)
    micro = [batching.read(data, group) for group in batching.cut(data, rows)]
    accumulate_gradients(prove(model, Task.CLASSIFICATION, CPU), micro, CPU, [1, 0])
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("most_rows", [1, 7, 100])
def test_a_head_on_features_learns_from_the_weighted_mean(tmp_path: Path, most_rows: int) -> None:
    weighted(tmp_path)
    model, data = classifier(tmp_path), open_split(tmp_path / "data", "train")
    rows = np.arange(ROWS)
    expected = reference(model, data, rows)
    encoder = find_encoder(prove(model, Task.CLASSIFICATION, CPU), CPU)
    encoder.encode(data, Batching(Task.CLASSIFICATION, False, 1000, 0), tmp_path, lambda _: None)
    model.zero_grad()
    batching = Batching(Task.CLASSIFICATION, False, most_rows, 0)
    micro = [batching.read(data, group) for group in batching.cut(data, rows)]
    accumulate_gradients(encoder.forward, micro, CPU, [1, 0])
    for name in ("classifier.weight", "classifier.bias"):
        torch.testing.assert_close(gradients(model)[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_step_in_which_nothing_counts_teaches_nothing(tmp_path: Path) -> None:
    weighted(tmp_path, [0.0] * ROWS)
    model, data = classifier(tmp_path), open_split(tmp_path / "data", "train")
    micro = [Batching(Task.CLASSIFICATION, False, 1000, 0).read(data, np.arange(4))]
    assert float(accumulate_gradients(prove(model, Task.CLASSIFICATION, CPU), micro, CPU, [1, 0])) == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("method", ["LoRA", "Head"])
def test_what_the_label_of_a_row_without_weight_is_changes_nothing(tmp_path: Path, method: str) -> None:
    settings = {"method": method, **({"lora": None} if method == "Head" else {})}
    weights = [float(row % 5 > 0) for row in range(ROWS)]
    runs = [tmp_path / "right", tmp_path / "wrong"]
    for folder in runs:
        train(weighted(folder, weights, spoil=folder.name == "wrong", **settings))
    right, wrong = map(newest, runs)
    assert all(torch.equal(wrong[name], right[name]) for name in right)
    assert losses(runs[0]) == losses(runs[1])

    train(make_training(tmp_path / "all", **settings))
    assert any(not torch.equal(weight, right[name]) for name, weight in newest(tmp_path / "all").items())


def test_equal_weights_are_as_good_as_none_and_evaluation_has_none(tmp_path: Path) -> None:
    train(weighted(tmp_path / "half", [0.5] * ROWS))
    train(make_training(tmp_path / "none"))
    half, none = losses(tmp_path / "half"), losses(tmp_path / "none")
    assert half == [pytest.approx(line, abs=1e-4) for line in none], "training losses are weighted means"
    reports = [json.loads((tmp_path / name / "report" / "evaluation.json").read_text()) for name in ("half", "none")]
    assert reports[0]["tuned"]["metrics"] == pytest.approx(reports[1]["tuned"]["metrics"], abs=1e-4)


def test_a_weighted_run_that_is_stopped_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0)
    settings = {"training": {"checkpoint_steps": 3, "evaluation_steps": 4}}
    whole, stopped = weighted(tmp_path / "whole", **settings), weighted(tmp_path / "stopped", **settings)
    train(whole)
    with pytest.raises(Interrupted):
        run(stopped, stop_after(stopped, 5))
    train(stopped)
    one, other = newest(tmp_path / "whole"), newest(tmp_path / "stopped")
    assert all(torch.equal(other[name], one[name]) for name in one)
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "stopped")[-1]
    states = [json.loads(latest(tmp_path / name, "state.json").read_text()) for name in ("whole", "stopped")]
    assert states[0]["trainingLoss"] == states[1]["trainingLoss"]


def test_without_weights_nothing_is_stored(tmp_path: Path) -> None:
    make_training(tmp_path)
    data = open_split(tmp_path / "data", "train")
    assert data.weights is None
    assert Batching(Task.CLASSIFICATION, False, 99, 0).read(data, np.arange(3)).weights is None
    assert columns(tmp_path) == ["input_ids", "label"]
    weigh(Workspace(tmp_path), WEIGHTS)
    assert columns(tmp_path) == ["input_ids", "label", "weight"]
    np.testing.assert_array_equal(open_split(tmp_path / "data", "train").weights, np.float32(WEIGHTS))


def columns(folder: Path) -> list[str]:
    return pa.ipc.open_file(folder / "data" / "train" / "00000.arrow").schema.names


def train(plan: Plan) -> None:
    run(plan, Telemetry(Stage.TRAIN, plan.job, 0))


def latest(folder: Path, file: str) -> Path:
    return max((folder / "checkpoints").glob("step-*")) / file


def newest(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(folder, "weights.safetensors"))


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "report" / "training.jsonl").read_text().splitlines())
    return [line["trainingLoss"] if "trainingLoss" in line else line["evaluation"]["loss"] for line in lines]
