"""The train stage: what it learns, what it tells, and what it refuses."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Progress, Result
from finetune_api.report import EvaluationReport
from finetune_api.spec import Task
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.evaluate.predict import Evaluator
from finetune_trainer.model.load import build_model, load_trainable_state, trainable_state
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import loop, reporting
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file, save_file

from tests.unit.trainer.training_workspace import CLASSIFICATION_ROWS, GENERATION, LABELS, make_training, write_data

SAVES = {"training": {"checkpoint_steps": 3, "evaluation_steps": 4, "micro_batch_tokens": 30}}
"""44 rows, 8 per step, 2 epochs: 12 steps, checkpoints at 3 6 9 12, evaluations at 4 8 12."""


def train(plan: Plan, telemetry: Telemetry | None = None) -> Result:
    return run(plan, telemetry or Telemetry(Stage.TRAIN, plan.job, 0))


def weights(plan: Plan, folder: str = "step-00000012") -> dict[str, torch.Tensor]:
    return load_file(Path(plan.workspace) / "checkpoints" / folder / "weights.safetensors")


def training_log(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(plan.workspace) / "report" / "training.jsonl").open()]


def report(plan: Plan) -> EvaluationReport:
    return EvaluationReport.model_validate_json((Path(plan.workspace) / "report" / "evaluation.json").read_bytes())


@pytest.fixture(autouse=True)
def report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.0)


@pytest.mark.parametrize("method", [{}, {"method": "Full", "lora": None}], ids=["LoRA", "Full"])
def test_the_head_is_trained_alone_first(tmp_path: Path, method: dict[str, Any]) -> None:
    training = {**SAVES["training"], "checkpoint_steps": 6, "warmup_ratio": 0.34, "learning_rate": 1e-4}
    plan = make_training(tmp_path, head_first={"epochs": 1, "learning_rate": 0.01}, **method, training=training)
    start = trainable_state(build_model(plan, Workspace(tmp_path), LABELS))
    train(plan)
    middle, end = weights(plan, "step-00000006"), weights(plan)

    def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[bool]:
        """Whether the weights of the head changed, whether others did."""
        head = ("classifier", "pooler")
        return {any(part in name for part in head) for name in before if not torch.equal(before[name], after[name])}

    assert changed(start, middle) == {True}
    assert changed(middle, end) == {True, False}
    rates = [line["learningRate"] for line in training_log(plan) if "learningRate" in line]
    assert (max(rates[:6]), max(rates[6:])) == (0.01, 1e-4)
    assert all(rates[at] < rates[at + 2] for at in (0, 6)), "each part has a warm-up"
    assert all(rates[at] > rates[at + 2] for at in (3, 9)), "each part has an end"


@pytest.mark.parametrize("first", [{"epochs": 2}, {"steps": 12}])
def test_a_run_of_the_head_alone_is_refused(tmp_path: Path, first: dict[str, float]) -> None:
    plan = make_training(tmp_path, head_first={**first, "learning_rate": 0.01})
    with pytest.raises(UserError, match=r"method\.headFirst: .* 12 of 12 optimizer steps") as caught:
        train(plan)
    assert caught.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize("changes", [{"last_layers": 1}, {"head_first": {"steps": 6, "learning_rate": 0.01}}])
def test_a_checkpoint_of_other_trained_weights_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    full = {"method": "Full", "lora": None, **SAVES}
    train(make_training(tmp_path, **full))
    with pytest.raises(UserError, match=r"method\.(trainable\.lastLayers|headFirst\.steps) was None and is now"):
        train(make_training(tmp_path, **full, **changes))


@pytest.mark.parametrize("changes", [{}, GENERATION], ids=["classification", "generation"])
def test_what_training_tells_while_it_runs(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = make_training(tmp_path, **SAVES, **changes)
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    seen: list[Progress] = []
    update = telemetry.update
    telemetry.update = lambda **fields: (update(**fields), seen.append(telemetry.progress))[0]
    train(plan, telemetry)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    middle = next(progress for progress in seen if progress.step == 6)
    assert (middle.total_steps, middle.activity, middle.precision, middle.device) == (12, "Training", "fp32", "cpu")
    assert middle.epoch == 1
    assert middle.estimated_remaining_seconds > 0
    assert 0 < middle.training_loss < 10
    assert 0 < middle.evaluation_loss < 10
    assert 0 < middle.learning_rate <= 1e-3
    assert min(middle.tokens_per_second, middle.samples_per_second, middle.peak_memory_bytes) > 0
    assert middle.trainable_parameters > 1000
    assert {"Loading the model", "Training", "Evaluating", "Saving a checkpoint"} <= {p.activity for p in seen}


LEARNS = {"epochs": 20.0, "evaluation_steps": 40, "checkpoint_steps": 1000}
GATE = {"metrics": ["macroF1", "accuracy", "loss"], "gate": {"metric": "macroF1", "minimum": 0.8, "minimum_gain": 0.35}}


@pytest.mark.parametrize(("method", "rate"), [("LoRA", 5e-3), ("Full", 5e-3)])
def test_classification_is_learnt_and_passes_its_gate(tmp_path: Path, method: str, rate: float) -> None:
    rows = {"train": 60, "validation": 30, "test": 30}
    training = LEARNS | {"learning_rate": rate}
    plan = make_training(tmp_path, rows, method=method, evaluation=GATE, training=training)
    scale_weights(plan, "encoder.layer", 4)
    result = train(plan)
    assert result.outcome is Outcome.SUCCEEDED, result.message
    assert (result.train.split, result.train.baseline) == ("test", "majority class")
    assert [score.metric for score in result.train.scores] == GATE["metrics"]
    evaluation = report(plan)
    assert evaluation.gate == result.train.gate
    assert evaluation.tuned.metrics["macroF1"] >= 0.8
    assert evaluation.baseline.metrics["macroF1"] < 0.3
    assert sum(map(sum, evaluation.tuned.confusion)) == evaluation.rows == 30
    assert [scores.label for scores in evaluation.tuned.classes] == LABELS


def test_head_learns_with_a_frozen_encoder(tmp_path: Path) -> None:
    plan = make_training(
        tmp_path, {"train": 150, "validation": 60}, method="Head", training=LEARNS | {"learning_rate": 1e-2}
    )
    scale_weights(plan, "encoder.layer", 8)
    result = train(plan)
    assert result.train.split == "validation"
    evaluation = report(plan)
    assert evaluation.tuned.metrics["accuracy"] > evaluation.baseline.metrics["accuracy"] + 0.15
    assert result.train.trainable_parameters == 32 * 32 + 32 + 32 * 3 + 3


def test_a_gate_that_is_not_passed_fails_the_job_with_its_evidence(tmp_path: Path) -> None:
    gate = {"metric": "macroF1", "minimum": 0.99}
    plan = make_training(
        tmp_path, evaluation={"metrics": ["macroF1"], "gate": gate}, training={"max_steps": 2, "epochs": None}
    )
    result = train(plan)
    assert (result.outcome, result.reason) == (Outcome.FAILED, Reason.GATE_FAILED)
    assert "at least 0.99 is required: not reached" in result.message
    assert result.train.gate.passed is False
    assert report(plan).gate.passed is False
    assert train(plan) == result


def test_generation_is_compared_with_the_untuned_model(tmp_path: Path) -> None:
    plan = make_training(
        tmp_path,
        {"train": 60, "validation": 20},
        method="Full",
        training=LEARNS | {"learning_rate": 5e-3},
        **GENERATION,
    )
    result = train(plan)
    evaluation = report(plan)
    assert evaluation.baseline.name == result.train.baseline == "untuned model"
    assert evaluation.tuned.metrics["loss"] < 0.8 * evaluation.baseline.metrics["loss"]
    assert evaluation.baseline.metrics["loss"] == pytest.approx(torch.tensor(320.0).log().item(), rel=0.05)


def test_the_best_checkpoint_is_the_one_that_is_judged_and_published(tmp_path: Path, monkeypatch) -> None:
    plan = make_training(tmp_path, **SAVES)
    scores = iter([0.5, 0.9, 0.7])
    original = Evaluator.__call__

    def fake(self, name, model, data, on_batch):
        result = original(self, name, model, data, on_batch)
        planned = next(scores, None)  # the last one is the final evaluation
        return (
            result if planned is None else result.model_copy(update={"metrics": {**result.metrics, "macroF1": planned}})
        )

    monkeypatch.setattr(Evaluator, "__call__", fake)
    result = train(plan)
    assert result.train.best_step == 8
    best = json.loads((tmp_path / "checkpoints" / "best" / "best.json").read_text())
    assert best["best"] == {"step": 8, "score": 0.9}
    model = build_model(plan, Workspace(tmp_path), LABELS)
    load_trainable_state(model, tmp_path / "checkpoints" / "best" / "weights.safetensors")
    last, stored = weights(plan), weights(plan, "best")
    assert any(not torch.equal(last[name], stored[name]) for name in last)
    assert [line["best"] for line in training_log(plan) if "best" in line] == [True, True, False]


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_training(tmp_path, **SAVES)
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 1000.0)  # it is found later and still told exactly
    original, calls = loop.accumulate_gradients, itertools.count(1)

    def poison(*arguments, **options):
        loss = original(*arguments, **options)
        return loss * float("nan") if next(calls) == 5 else loss

    monkeypatch.setattr(loop, "accumulate_gradients", poison)
    with pytest.raises(UserError, match=r"step 5 of 12.*learningRate.*the checkpoint of step 3 is kept") as caught:
        train(plan)
    assert caught.value.reason is Reason.NON_FINITE_LOSS
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000003"]


def test_a_final_loss_that_is_not_finite_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_training(tmp_path)
    original = Evaluator.__call__

    def poison(self, name, model, data, on_batch):
        found = original(self, name, model, data, on_batch)
        final = len(data) == CLASSIFICATION_ROWS["test"]
        return found.model_copy(update={"metrics": found.metrics | {"loss": float("nan")}}) if final else found

    monkeypatch.setattr(Evaluator, "__call__", poison)
    with pytest.raises(UserError, match=r"on the test split is not a finite number.*learningRate") as caught:
        train(plan)
    assert caught.value.reason is Reason.NON_FINITE_LOSS
    assert not (tmp_path / "report" / "evaluation.json").exists()


def test_a_gpu_that_runs_out_of_memory_gets_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is done again from its start: the same rows, the same sum. What is too large for one row is an error."""
    plan = make_training(tmp_path / "roomy", lora={"dropout": 0.0}, **GENERATION)
    train(plan)
    small = make_training(tmp_path / "small", lora={"dropout": 0.0}, **GENERATION)
    most, original = 50, Forward.losses

    def losses(self, batch):
        if torch.is_grad_enabled() and batch.input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    monkeypatch.setattr(Forward, "losses", losses)
    telemetry = Telemetry(Stage.TRAIN, small.job, 0)
    result = train(small, telemetry)
    assert result.train.micro_batch_tokens == telemetry.progress.micro_batch_tokens <= most
    assert "does not hold the micro-batches of step 1" in caplog.text
    wanted, found = weights(plan), weights(small)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)
    most = 5
    with pytest.raises(torch.OutOfMemoryError):
        train(make_training(tmp_path / "hopeless", lora={"dropout": 0.0}, **GENERATION))


def test_a_learning_rate_that_explodes_is_found(tmp_path: Path) -> None:
    training = {"learning_rate": 10.0, "max_grad_norm": 1000.0, "warmup_ratio": 0.0, "max_steps": 200, "epochs": None}
    plan = make_training(tmp_path, method="Full", training=training, **GENERATION)
    scale_weights(plan, "norm", 1e20)
    with pytest.raises(UserError) as caught:
        train(plan)
    assert caught.value.reason is Reason.NON_FINITE_LOSS


def scale_weights(plan: Plan, part: str, factor: float) -> None:
    """A fresh encoder's features hardly depend on the text; with larger weights they do."""
    path = Path(plan.workspace) / "model" / "model.safetensors"
    scaled = {name: w * factor if part in name and "bias" not in name else w for name, w in load_file(path).items()}
    save_file(scaled, path, {"format": "pt"})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_split_is_the_users_to_mend(tmp_path: Path, split: str) -> None:
    plan = make_training(tmp_path)
    write_data(Workspace(tmp_path), Task.CLASSIFICATION, {"train": 5, "validation": 5, split: 0})
    with pytest.raises(UserError, match=f"the {split} split has no rows") as caught:
        train(plan)
    assert caught.value.reason is Reason.DATA_INVALID


def test_training_needs_prepared_data(tmp_path: Path) -> None:
    plan = make_training(tmp_path)
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(StageError, match="run prepare first"):
        train(plan)


def test_a_gpu_that_is_not_there_fails_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = make_training(tmp_path, device={"gpus": 1})
    with pytest.raises(UserError) as caught:
        train(plan)
    assert caught.value.reason is Reason.ACCELERATOR_MISSING
    assert not (tmp_path / "checkpoints").exists()


def test_bf16_trains_fp32_weights(tmp_path: Path) -> None:
    plan = make_training(tmp_path, training={"precision": "bf16", "max_steps": 3, "epochs": None})
    result = train(plan)
    assert result.train.precision == "bf16"
    assert {weight.dtype for weight in weights(plan, "step-00000003").values()} == {torch.float32}
