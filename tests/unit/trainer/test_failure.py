"""What a user reads about a stage that ended badly: the cause, in a termination message that fits, without the data."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from finetune_api.constants import TERMINATION_MESSAGE_BYTES, ExitCode, Reason, Stage
from finetune_api.progress import Outcome, Result
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.failure import describe_failure, format_trace
from hypothesis import given
from hypothesis import strategies as st

SECRET_ROW = "Ms Miller owes 4,711 dollars"


def throw(error: BaseException, cause: BaseException | None) -> None:
    if cause is None:
        raise error
    try:
        raise cause
    except type(cause) as inner:
        raise error from inner


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it is when it was raised, from `cause` if that is given."""
    with pytest.raises(type(error)) as caught:
        throw(error, cause)
    return caught.value


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize(
    ("error", "outcome", "reason", "code"),
    [
        (UserError(Reason.DATA_INVALID, "train.csv:3: no label"), Outcome.FAILED, Reason.DATA_INVALID, 64),
        (StageError(Reason.DATA_NOT_FOUND, "the server is away"), Outcome.FAILED, Reason.DATA_NOT_FOUND, 1),
        (Interrupted("saved at step 7", step=7), Outcome.INTERRUPTED, Reason.INTERRUPTED, 75),
        (KeyboardInterrupt(), Outcome.INTERRUPTED, Reason.INTERRUPTED, 75),
        (RuntimeError("mat1 and mat2 do not match"), Outcome.FAILED, Reason.STAGE_FAILED, 1),
        (MemoryError(), Outcome.FAILED, Reason.OOM_KILLED, 1),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), Outcome.FAILED, Reason.OOM_KILLED, 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), Outcome.FAILED, Reason.OOM_KILLED, 1),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            Outcome.FAILED,
            Reason.OOM_KILLED,
            1,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), Outcome.FAILED, Reason.STAGE_FAILED, 1),
    ],
)
def test_every_kind_of_error_has_its_outcome_reason_and_exit_code(error, outcome, reason, code, stage):
    result, exit_code = describe_failure(raised(error), stage)
    assert (result.stage, result.outcome, result.reason, exit_code) == (stage, outcome, reason, code)
    assert result.message


def test_an_interruption_says_which_step_is_safe():
    result, _ = describe_failure(Interrupted("saved", step=120), Stage.TRAIN)
    assert result.step == 120


@pytest.mark.parametrize(
    ("stage", "error", "remedy"),
    [
        (Stage.TRAIN, MemoryError(), "resources.limits.memory"),
        (Stage.TRAIN, torch.OutOfMemoryError(), "the GPU has too little memory"),
        (Stage.PREPARE, MemoryError(), "resources.prepare.limits.memory"),
        (Stage.PUBLISH, MemoryError(), "resources.prepare.limits.memory"),
        (Stage.PREPARE, OSError(errno.ENOSPC, "No space left on device", "/work/data/0.arrow"), "workspace.size"),
        (
            Stage.TRAIN,
            RuntimeError("SafetensorError: IO error: No space left on device (os error 28)"),
            "workspace.size",
        ),
    ],
)
def test_a_lack_of_memory_or_space_names_the_field_to_change(stage, error, remedy):
    assert remedy in describe_failure(raised(error), stage)[0].message


def test_a_full_disk_is_found_behind_the_error_that_it_led_to():
    disk = OSError(errno.ENOSPC, "No space left on device", "/work/checkpoints/x")
    result, _ = describe_failure(raised(RuntimeError("cannot save"), disk), Stage.TRAIN)
    assert "/work/checkpoints/x" in result.message
    assert "workspace.size" in result.message


def test_causes_that_go_in_a_circle_end():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert describe_failure(one, Stage.TRAIN)[1] == 1
    assert "two" in format_trace(one, Stage.TRAIN)


class TestDatasetText:
    """Prepare handles rows as text, so foreign exceptions may quote one."""

    @pytest.mark.parametrize(
        "error",
        [
            ValueError(f"could not convert {SECRET_ROW!r}"),
            KeyError(SECRET_ROW),
            RuntimeError(SECRET_ROW),
            UnicodeEncodeError("ascii", SECRET_ROW, 0, 1, SECRET_ROW),
            json.JSONDecodeError(SECRET_ROW, SECRET_ROW, 0),
            AssertionError(SECRET_ROW),
        ],
    )
    def test_never_stands_in_message_or_traceback(self, error):
        for failure in (raised(error), raised(RuntimeError("while reading"), error), raised(LookupError(), error)):
            assert SECRET_ROW not in describe_failure(failure, Stage.PREPARE)[0].to_termination_message()
            trace = format_trace(failure, Stage.PREPARE)
            assert SECRET_ROW not in trace
            assert "test_failure.py" in trace
            assert type(error).__name__ in trace

    def test_of_the_cause_of_our_own_error_stays_out_too(self):
        failure = raised(UserError(Reason.DATA_INVALID, "train.csv:7: not JSON"), ValueError(SECRET_ROW))
        assert describe_failure(failure, Stage.PREPARE)[0].message == "train.csv:7: not JSON"
        assert SECRET_ROW not in format_trace(failure, Stage.PREPARE)

    def test_hidden_errors_still_say_their_type_and_place(self):
        message = describe_failure(raised(ValueError(SECRET_ROW)), Stage.PREPARE)[0].message
        assert "ValueError at test_failure.py:" in message

    @pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.PUBLISH])
    def test_of_a_driver_that_quotes_a_signed_url_is_left_out(self, stage):
        """Drivers' errors are often OSErrors, which the operating system's are told from by their number."""
        for error in (
            raised(OSError("503 for https://h/a?sig=s3cret")),
            raised(RuntimeError("https://h/a?sig=s3cret")),
        ):
            assert "s3cret" not in describe_failure(error, stage)[0].message
            assert "s3cret" not in format_trace(error, stage)
        full = raised(PermissionError(errno.EACCES, "Permission denied", "/data/x"))
        assert "/data/x" in describe_failure(full, stage)[0].message

    def test_is_never_seen_by_train_whose_errors_are_shown(self):
        message = describe_failure(raised(ValueError("shapes differ")), Stage.TRAIN)[0].message
        assert message == "ValueError: shapes differ"

    def test_file_errors_are_shown_in_prepare_too(self):
        error = raised(FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/train.csv"))
        assert "/data/train.csv" in describe_failure(error, Stage.PREPARE)[0].message


class TestTerminationMessage:
    @given(st.text(st.characters(), max_size=9000), st.sampled_from(list(Stage)), st.booleans())
    def test_of_any_text_fits_and_is_json_that_the_operator_reads(self, text, stage, ours):
        error = StageError(Reason.STAGE_FAILED, text) if ours else RuntimeError(text)
        message = describe_failure(error, stage)[0].to_termination_message()
        assert len(message.encode()) <= TERMINATION_MESSAGE_BYTES
        assert Result.model_validate_json(message).reason is not None

    @pytest.mark.parametrize("character", ["x", '"', "\\", "\n", "é", "語", "🙂"])
    def test_keeps_the_beginning_of_a_long_text_and_wastes_little(self, character):
        error = UserError(Reason.DATA_INVALID, "train.csv:3: " + character * 100_000)
        message = describe_failure(error, Stage.PREPARE)[0].to_termination_message()
        size = len(message.encode())
        assert TERMINATION_MESSAGE_BYTES * 3 / 4 < size <= TERMINATION_MESSAGE_BYTES
        text = Result.model_validate_json(message).message
        assert text.startswith("train.csv:3: " + character * 10)
        assert text.endswith("…")

    def test_carries_no_control_characters_of_file_names_to_a_terminal(self):
        path = Path(os.fsdecode(b"/data/\x1b[31m\xff.csv"))
        message = describe_failure(UserError(Reason.DATA_INVALID, f"{path}: empty"), Stage.PREPARE)[0].message
        assert message == "/data/[31m?.csv: empty"


def test_exit_codes_are_those_of_the_contract():
    assert UserError.exit_code == ExitCode.USER_ERROR == 64
    assert Interrupted.exit_code == ExitCode.TRY_AGAIN == 75
    assert StageError.exit_code == 1
