"""The train stage: interrupted anywhere it ends in the same weights, and its evidence is whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Progress, Result
from finetune_api.report import EvaluationReport
from finetune_api.spec import Task
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.evaluate.predict import Evaluator
from finetune_trainer.model.load import build_model, load_trainable_state, trainable_state
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import checkpoint, loop, reporting
from finetune_trainer.train.batches import Batching
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file, save_file

from tests.unit.trainer.training_workspace import (
    CLASSIFICATION_ROWS,
    GENERATION,
    LABELS,
    PREFERENCE,
    make_training,
    write_data,
)

SAVES = {"training": {"checkpoint_steps": 3, "evaluation_steps": 4, "micro_batch_tokens": 30}}
"""44 rows, 8 per step, 2 epochs: 12 steps, checkpoints at 3 6 9 12, evaluations at 4 8 12."""


class Killed(BaseException):
    """Like SIGKILL, nothing may catch it."""


class Calls:
    """Counts what the stage does, and does `action` at call number `at`."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.count, self._at, self._action = 0, at, action

    def __call__(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._action()


def train(plan: Plan, telemetry: Telemetry | None = None) -> Result:
    return run(plan, telemetry or Telemetry(Stage.TRAIN, plan.job, 0))


def weights(plan: Plan, folder: str = "step-00000012") -> dict[str, torch.Tensor]:
    return load_file(Path(plan.workspace) / "checkpoints" / folder / "weights.safetensors")


def same_weights(plan: Plan, other: Plan) -> bool:
    folders = ("step-00000012", "best")
    pairs = [(weights(plan, folder), weights(other, folder)) for folder in folders]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def training_log(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(plan.workspace) / "report" / "training.jsonl").open()]


def report(plan: Plan) -> EvaluationReport:
    return EvaluationReport.model_validate_json((Path(plan.workspace) / "report" / "evaluation.json").read_bytes())


@pytest.fixture(autouse=True)
def report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.0)


KINDS = {"classification": {}, "generation": GENERATION, "preference": PREFERENCE}


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A plan and the result of running it in one go, and how to make the same job elsewhere."""
    changes = {**SAVES, **KINDS[request.param]}
    plan = make_training(tmp_path_factory.mktemp("whole"), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "REPORT_SECONDS", 0.0)
        return plan, train(plan), changes


@pytest.mark.parametrize("at", [1, 3, 7])
@pytest.mark.parametrize("where", ["_step", "_evaluate", "_save"])
def test_a_stopped_run_goes_on_to_the_same_weights(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    """SIGTERM arrives in a step, an evaluation or a save, again in the next two attempts."""
    whole, _, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    original = getattr(loop.Loop, where)
    attempts = 0
    while True:
        telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
        calls = Calls(at if attempts < 3 else -1, telemetry.stop_requested.set)
        monkeypatch.setattr(loop.Loop, where, lambda self, calls=calls: (calls(), original(self))[1])
        attempts += 1
        try:
            train(plan, telemetry)
            break
        except Interrupted as interrupted:
            assert interrupted.step is not None or (where, at) == ("_step", 1), "there was no step yet"
            step = f"step-{interrupted.step or 0:08d}"
            whole_step = (tmp_path / "checkpoints" / step / "manifest.json").exists()
            assert whole_step or interrupted.step is None, "the step that was told is safe"
    assert same_weights(plan, whole)
    assert report(plan) == report(whole)


@pytest.mark.parametrize("uninterrupted", ["classification", "generation"], indirect=True)
def test_a_stop_does_not_wait_for_the_end_of_a_step(uninterrupted, tmp_path: Path, monkeypatch) -> None:
    """SIGTERM arrives while step 6 has half of its gradients: they are dropped, and the run goes on exactly."""
    whole, _, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    original, save = Forward.losses, checkpoint.Checkpoints.save
    gradients_at_save: list[int] = []
    inside = 0

    def losses(self, batch):
        nonlocal inside
        if torch.is_grad_enabled() and telemetry.progress.step == 5:
            inside += 1
            telemetry.stop_requested.set()
        return original(self, batch)

    def note(self, model, optimizer, state):
        gradients_at_save.append(sum(weight.grad is not None for weight in model.parameters()))
        save(self, model, optimizer, state)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "losses", losses)
        patch.setattr(checkpoint.Checkpoints, "save", note)
        with pytest.raises(Interrupted, match="stopped after step 5 of 12, which is saved") as interrupted:
            train(plan, telemetry)
    assert (interrupted.value.step, inside) == (5, 1)
    assert gradients_at_save == [0, 0]
    train(plan)
    assert same_weights(plan, whole)
    assert report(plan) == report(whole)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_goes_on_to_the_same_weights(
    uninterrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """It dies at random places, also in the middle of accumulating, saving and evaluating."""
    whole, result, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    chance = random.Random(seed)
    places = [(Forward, "losses"), (Batching, "read"), (checkpoint, "_save_weights"), (checkpoint, "_describe"),
              (checkpoint.shutil, "rmtree"), (Path, "rename"), (Evaluator, "__call__")]  # fmt: skip
    deaths = 0
    while True:
        with monkeypatch.context() as patch:
            place, name = chance.choice(places) if deaths else places[0]
            calls = Calls(chance.randint(1, 12), lambda patch=patch: _die(patch))
            original = getattr(place, name)
            patch.setattr(place, name, lambda *a, calls=calls, original=original, **k: (calls(), original(*a, **k))[1])
            try:
                resumed = train(plan)
                break
            except Killed:
                deaths += 1
        random.random(), torch.rand(3)  # another process has other random states
        assert deaths <= 60
    assert deaths
    assert same_weights(plan, whole)
    assert report(plan) == report(whole)
    steady = {"tokens_per_second", "samples_per_second", "peak_memory_bytes"}
    assert resumed.train.model_dump(exclude=steady) == result.train.model_dump(exclude=steady)


def _die(patch: pytest.MonkeyPatch | None = None) -> None:
    """A dead process does not clean up."""
    if patch is not None:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    raise Killed


def test_a_broken_newest_checkpoint_costs_steps_and_no_bit(uninterrupted, tmp_path: Path) -> None:
    whole, _, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    telemetry = stop_after(plan, 7)
    with pytest.raises(Interrupted):
        train(plan, telemetry)
    (tmp_path / "checkpoints" / "step-00000007" / "training.pt").write_bytes(b"broken")
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    train(plan, telemetry)
    assert telemetry.progress.resumed_from_step == 6
    assert same_weights(plan, whole)


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


METHODS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"lora": {"variant": "RsLoRA"}},
    "DoRA": {"lora": {"variant": "DoRA"}},
    "DoRA in bf16": {"lora": {"variant": "DoRA"}, "training": {"precision": "bf16"}},
    "last layers": {"method": "Full", "lora": None, "last_layers": 1},
    "last layers of a generator": {"method": "Full", "lora": None, "last_layers": 1, **GENERATION},
    "last layers of a generator in bf16": {
        **{"method": "Full", "lora": None, "last_layers": 1, "training": {"precision": "bf16"}},
        **GENERATION,
    },
    "head first, then all": {"method": "Full", "lora": None, "head_first": {"steps": 5, "learning_rate": 0.01}},
    "head first, then LoRA": {"head_first": {"epochs": 0.75, "learning_rate": 0.01}},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_every_method_goes_on_exactly(tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**changes, "training": {**SAVES["training"], **changes.get("training", {})}}
    whole = make_training(tmp_path / "whole", **changes)
    result = train(whole)
    plan = make_training(tmp_path / "stopped", **changes)
    for step in (2, 3, 5, 8, 11):
        with pytest.raises(Interrupted):
            train(plan, stop_after(plan, step))
    again = train(plan)
    assert same_weights(plan, whole)
    assert report(plan) == report(whole)
    assert again.train.scores == result.train.scores


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


def test_the_log_of_a_resumed_run_has_every_step_once(uninterrupted, tmp_path: Path) -> None:
    whole, _, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    with pytest.raises(Interrupted):
        train(plan, stop_after(plan, 8))
    (tmp_path / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    with (tmp_path / "report" / "training.jsonl").open("a") as log:
        log.write('{"step": 9, "trai')  # what a kill left
    train(plan)
    keep = ("step", "epoch", "trainingLoss", "learningRate", "evaluation")
    lines, expected = ([{k: line[k] for k in keep if k in line} for line in training_log(p)] for p in (plan, whole))
    assert lines == expected
    assert [line["step"] for line in lines if "trainingLoss" in line] == list(range(1, 13))


def test_a_finished_run_gives_its_result_again_without_training(uninterrupted, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, result, _ = uninterrupted
    monkeypatch.setattr(loop.Loop, "run", _die)
    assert train(plan) == result


def test_a_finished_training_without_its_result_is_evaluated_only(uninterrupted, monkeypatch) -> None:
    plan, result, _ = uninterrupted
    before = report(plan)
    for file in ("checkpoints/result.json", "report/evaluation.json"):
        (Path(plan.workspace) / file).unlink()
    monkeypatch.setattr(loop.Loop, "_step", _die)
    again = train(plan)
    assert report(plan) == before
    assert again.model_copy(update={"train": None}) == result.model_copy(update={"train": None})
    assert again.train.scores == result.train.scores
    assert again.train.training_loss == result.train.training_loss


def test_a_best_that_is_gone_is_made_again(uninterrupted, tmp_path: Path) -> None:
    _, result, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    train(plan)
    shutil.rmtree(tmp_path / "checkpoints" / "best")
    again = train(plan)
    assert again.train.best_step == 12
    assert again.train.training_loss == result.train.training_loss


def test_what_training_tells_while_it_runs(uninterrupted, tmp_path: Path) -> None:
    _, _, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
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
    original, poisoned = loop.accumulate_gradients, Calls(5, lambda: None)

    def poison(*arguments, **options):
        loss = original(*arguments, **options)
        poisoned()
        return loss * float("nan") if poisoned.count == 5 else loss

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


@pytest.mark.parametrize("uninterrupted", ["classification"], indirect=True)
def test_a_real_sigterm_saves_and_the_next_process_goes_on(uninterrupted, tmp_path: Path) -> None:
    whole, _, changes = uninterrupted
    plan = make_training(tmp_path, **changes)
    (tmp_path / "plan.json").write_text(plan.to_json())
    environment = os.environ | {"FINETUNE_TELEMETRY_PORT": "0", "OMP_NUM_THREADS": str(torch.get_num_threads()),
                                "FINETUNE_TERMINATION_LOG": str(tmp_path / "termination")}  # fmt: skip
    command = [sys.executable, "-m", "finetune_trainer", "train", "--plan", str(tmp_path / "plan.json")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "steps on" in line:  # the model is loaded
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 75
    result = Result.model_validate_json((tmp_path / "termination").read_bytes())
    assert (result.outcome, result.reason) == (Outcome.INTERRUPTED, Reason.INTERRUPTED)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert same_weights(plan, whole)
