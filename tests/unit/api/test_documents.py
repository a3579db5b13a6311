"""Status, plan, progress and result: numbers as people read them, whole round trips, the kubelet's limit."""

import math
from pathlib import Path

import pytest
from finetune_api.constants import TERMINATION_MESSAGE_BYTES, Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, PrepareResult, Progress, PublishResult, Result
from finetune_api.status import ArtifactStatus, FailureStatus, FineTuneJobStatus, MetricsStatus, decimal
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.plans import make_plan
from tests.statuses import full_status

FULL = full_status()
assert FULL.data and FULL.model and FULL.result and FULL.result.artifact


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.123456, "0.1235"),
        (2e-5, "2e-05"),
        (-1.25, "-1.25"),
        (99999.0, "100000"),
        (123456.7, "123500"),
        (22713216, "22710000"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_decimals_are_short_strings(number: float, text: str) -> None:
    assert decimal(number) == text


def test_no_decimal_without_a_number() -> None:
    assert decimal(None) is None


@given(st.floats(-1e300, 1e300) | st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_every_number_is_a_decimal_that_the_status_accepts(number: float) -> None:
    text = decimal(number)
    assert MetricsStatus(training_loss=text).to_dict() == {"trainingLoss": text}
    assert math.isnan(number) or float(text or "") == pytest.approx(number, rel=6e-4)


@pytest.mark.parametrize("text", ["high", "1,5", "1.5 ", "0x10", ""])
def test_other_texts_are_no_decimals(text: str) -> None:
    with pytest.raises(ValidationError):
        MetricsStatus(training_loss=text)


def test_a_message_gives_way_rather_than_being_refused() -> None:
    failure = FailureStatus(reason=Reason.STAGE_FAILED, message="x" * 5000)
    assert failure.message == "x" * 2047 + "…"
    assert FailureStatus(reason=Reason.STAGE_FAILED, message="y" * 2048).message == "y" * 2048


def test_a_status_comes_back_as_it_was() -> None:
    assert FineTuneJobStatus.model_validate_json(FULL.to_json(), strict=True) == FULL
    assert FineTuneJobStatus.model_validate(FULL.to_dict()) == FULL


def test_an_empty_status_says_nothing() -> None:
    assert FineTuneJobStatus().to_dict() == {}


@pytest.mark.parametrize("stage", Stage)
def test_a_plan_comes_back_as_it_was(tmp_path: Path, stage: Stage) -> None:
    source = {
        "location": {"uri": "pvc://c/a.csv", "path": "/mnt/a.csv", "secret_dir": "/s"},
        "field": "dataset.test.sources[0]",
    }
    plan = make_plan(
        tmp_path,
        stage,
        dataset={"test": {"sources": [source]}, "labels": ["a", "b"]},
        evaluation={"gate": {"metric": "macroF1", "minimum": 0.8}},
    )
    assert Plan.model_validate_json(plan.to_json(indent=2), strict=True) == plan
    assert '"secretDir"' in plan.to_json()


@given(
    st.builds(
        Progress,
        fraction=st.floats(0, 1),
        updatedAt=st.floats(0, 4e9),
        **{
            name: st.none() | st.floats(allow_nan=False, allow_infinity=False)
            for name in (
                "epoch",
                "estimatedRemainingSeconds",
                "trainingLoss",
                "learningRate",
                "tokensPerSecond",
                "samplesPerSecond",
            )
        },
        evaluationLoss=st.none(),
    )
)
def test_progress_comes_back_as_it_was(progress: Progress) -> None:
    assert Progress.model_validate_json(progress.to_json(), strict=True) == progress


def test_a_loss_that_is_no_number_is_no_loss_in_json() -> None:
    progress = Progress(stage=Stage.TRAIN, activity="Training", fraction=0.5, training_loss=float("nan"), updated_at=0)
    assert Progress.model_validate_json(progress.to_json()).training_loss is None


def test_documents_refuse_what_they_do_not_know_and_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Progress.model_validate({"stage": "train", "activity": "", "fraction": 0, "updatedAt": 0, "mood": "good"})
    with pytest.raises(ValidationError):
        FULL.phase = None  # type: ignore[misc]


def prepared(message: str, labels: list[str] | None) -> Result:
    data = FULL.data.model_copy(update={"labels": labels})
    return Result(
        stage=Stage.PREPARE,
        outcome=Outcome.FAILED,
        reason=Reason.DATA_INVALID,
        message=message,
        prepare=PrepareResult(data=data, model=FULL.model),
    )


@given(st.text() | st.text(min_size=1, max_size=4).map(lambda text: text * 3000))
def test_a_message_is_cut_to_the_kubelets_limit_and_no_further(message: str) -> None:
    result = prepared(message, ["a", "b"])
    text = result.to_termination_message()
    said = Result.model_validate_json(text)
    assert said.model_copy(update={"message": message}) == result
    if len(result.to_json().encode()) <= TERMINATION_MESSAGE_BYTES:
        assert said == result
    else:
        assert said.message.endswith("…")
        assert message.startswith(said.message[:-1])
        assert TERMINATION_MESSAGE_BYTES - 16 <= len(text.encode()) <= TERMINATION_MESSAGE_BYTES


@given(st.lists(st.text(min_size=1, max_size=128), max_size=32), st.text())
def test_labels_of_any_length_do_not_break_a_result(labels: list[str], message: str) -> None:
    text = prepared(message, labels).to_termination_message()
    assert len(text.encode()) <= TERMINATION_MESSAGE_BYTES
    said = Result.model_validate_json(text)
    assert said.prepare is not None
    shown = said.prepare.data.labels or []
    assert shown == labels[: len(shown)]
    assert said.prepare.data.model_copy(update={"labels": labels}) == FULL.data.model_copy(update={"labels": labels})


def test_many_long_labels_are_shown_as_far_as_they_fit() -> None:
    labels = ["語" * 128] * 32
    said = Result.model_validate_json(prepared("gone", labels).to_termination_message())
    assert said.message == ""
    assert said.prepare is not None
    assert said.prepare.data.labels
    assert 4 <= len(said.prepare.data.labels) < 32


def test_a_result_that_cannot_be_cut_is_an_error() -> None:
    artifact = ArtifactStatus(uri="s3://" + "語" * 1019, sha256="0" * 64, format="x" * 32, size_bytes=1)
    result = Result(stage=Stage.PUBLISH, outcome=Outcome.SUCCEEDED, publish=PublishResult(artifact=artifact))
    assert len(result.to_termination_message().encode()) < TERMINATION_MESSAGE_BYTES
    longer = artifact.model_copy(update={"uri": "s3://" + "\U0001f600" * 1019})
    with pytest.raises(ValueError, match="too long for a termination message"):
        result.model_copy(update={"publish": PublishResult(artifact=longer)}).to_termination_message()
