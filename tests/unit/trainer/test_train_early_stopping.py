"""Early stopping: when patience runs out, and what a run tells that ended so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune_api.constants import Stage
from finetune_api.plan import Plan, PlanEarlyStopping
from finetune_api.progress import Result
from finetune_api.spec import Metric
from finetune_trainer.evaluate.predict import Evaluator
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import early_stopping, loop, reporting
from finetune_trainer.train.checkpoint import Improvement
from finetune_trainer.train.run import run
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.training_workspace import make_training

NEVER_ENOUGH = {"patience": 2, "minimum_improvement": 1.0}
TRAINING = {"checkpoint_steps": 3, "evaluation_steps": 2, "early_stopping": NEVER_ENOUGH}
"""12 steps; evaluations after 2, 4, 6: no F1 rises by 1, so that patience runs out after step 6."""


def ends_at(scores: list[float], metric: Metric, **settings: Any) -> int | None:
    """Index of the evaluation after which training ends."""
    early, last = PlanEarlyStopping(**settings), None
    for index, score in enumerate(scores):
        last = early_stopping.judge(last, index, score, metric, early.minimum_improvement)
        if early_stopping.is_over(early, last):
            return index
    return None


@pytest.mark.parametrize(
    ("scores", "metric", "settings", "end"),
    [
        ([0.5, 0.6, 0.7, 0.8], Metric.MACRO_F1, {"patience": 1, "minimum_improvement": 0}, None),
        ([0.5, 0.4], Metric.MACRO_F1, {"patience": 1, "minimum_improvement": 0}, 1),
        ([0.5, 0.5, 0.5], Metric.MACRO_F1, {"patience": 2, "minimum_improvement": 0}, 2),
        ([0.5, 0.4, 0.6, 0.5, 0.5], Metric.MACRO_F1, {"patience": 2, "minimum_improvement": 0}, 4),
        ([2.0, 1.0, 1.5, 1.2, 0.9], Metric.LOSS, {"patience": 3, "minimum_improvement": 0}, None),
        ([2.0, 1.0, 1.5, 1.2, 1.1], Metric.LOSS, {"patience": 3, "minimum_improvement": 0}, 4),
        ([0.5, 0.75, 0.8, 0.9], Metric.ACCURACY, {"patience": 2, "minimum_improvement": 0.25}, 3),
        ([0.5, 0.625, 0.75, 0.875], Metric.ACCURACY, {"patience": 2, "minimum_improvement": 0.25}, None),
    ],
)
def test_training_ends_when_patience_has_run_out(scores, metric, settings, end) -> None:
    assert ends_at(scores, metric, **settings) == end


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(1, 5))
def test_training_ends_at_the_first_evaluations_in_a_row_that_beat_none_before(
    scores: list[int], patience: int
) -> None:
    ends = (
        at
        for at in range(patience, len(scores))
        if min(scores[at - patience + 1 : at + 1]) >= min(scores[: at - patience + 1])
    )
    assert ends_at([float(score) for score in scores], Metric.LOSS, patience=patience, minimum_improvement=0) == next(
        ends, None
    )


def test_without_settings_it_never_ends() -> None:
    assert not early_stopping.is_over(None, Improvement(step=1, score=0.5, evaluations_since=99))


def train(plan: Plan, telemetry: Telemetry | None = None) -> Result:
    return run(plan, telemetry or Telemetry(Stage.TRAIN, plan.job, 0))


def newest(plan: Plan) -> Path:
    return max((Path(plan.workspace) / "checkpoints").glob("step-*"))


@pytest.fixture(autouse=True)
def report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.0)


def test_a_run_that_improves_no_more_ends_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 1000.0)  # the last step is reported all the same
    settings = {"patience": 2, "minimum_improvement": 0.01}
    plan = make_training(tmp_path, training={**TRAINING, "early_stopping": settings})
    scores, original = iter([0.5, 0.9, 0.905, 0.8]), Evaluator.__call__

    def fake(self, name, model, data, on_batch):
        found, planned = original(self, name, model, data, on_batch), next(scores, None)
        return found if planned is None else found.model_copy(update={"metrics": {**found.metrics, "macroF1": planned}})

    monkeypatch.setattr(Evaluator, "__call__", fake)
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    result = train(plan, telemetry)
    assert result.train.stopped_early == (
        "stopped early after step 8 of 12: in 2 evaluations macroF1 was not better by 0.01 than the 0.9 of step 4"
    )
    assert (result.step, result.train.steps, result.train.best_step) == (8, 8, 6)
    progress = telemetry.progress
    assert (progress.step, progress.total_steps, progress.fraction) == (8, 8, 1.0)
    assert newest(plan).name == "step-00000008"
    lines = [json.loads(line) for line in (tmp_path / "report" / "training.jsonl").open()]
    assert [line["step"] for line in lines if "trainingLoss" in line] == [2, 4, 6, 8]


def test_a_run_that_still_improves_does_all_its_steps(tmp_path: Path) -> None:
    plan = make_training(tmp_path, training={**TRAINING, "early_stopping": {"patience": 99, "minimum_improvement": 0}})
    result = train(plan)
    assert (result.train.steps, result.train.stopped_early) == (12, None)


def test_patience_that_runs_out_at_the_last_step_ends_nothing_early(tmp_path: Path) -> None:
    training = {**TRAINING, "epochs": None, "max_steps": 6}
    assert train(make_training(tmp_path, training=training)).train.stopped_early is None


def test_a_run_that_has_ended_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_training(tmp_path, training=TRAINING)
    result = train(plan)

    def no_step(self) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr(loop.Loop, "_step", no_step)
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    assert train(plan, telemetry) == result
    assert (telemetry.progress.step, telemetry.progress.total_steps) == (6, 6)
    (tmp_path / "checkpoints" / "result.json").unlink()
    assert train(plan).train.stopped_early == result.train.stopped_early
    shutil.rmtree(tmp_path / "checkpoints" / "best")  # its evaluation is done once more, and counts once
    assert train(plan).train.stopped_early == result.train.stopped_early


def test_evaluations_of_the_head_alone_do_not_count(tmp_path: Path) -> None:
    training = {**TRAINING, "early_stopping": {"patience": 1, "minimum_improvement": 1.0}}
    plan = make_training(tmp_path, training=training, head_first={"steps": 4, "learning_rate": 0.01})
    assert train(plan).train.steps == 8
