"""Exceptions -> what a user, and the log, may read about them."""

import errno
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from finetune_api.constants import ExitCode, Reason, Stage
from finetune_api.progress import Outcome, Result

from finetune_trainer.errors import Interrupted, StageError

MAX_TEXT = 1000
"""Characters of a foreign exception's text that are shown."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
OUT_OF_MEMORY = (
    "out of memory: raise resources.limits.memory, or lower training.microBatchTokens (or training.maxLength)"
)
GLOO_PLACE = "/gloo/"
"""Gloo's errors are plain RuntimeErrors that begin with their place in its source."""
NO_MEMORY_TEXTS = ("can't allocate memory", "Cannot allocate memory", "CUDA out of memory", "std::bad_alloc")


def describe_failure(error: BaseException, stage: Stage) -> tuple[Result, int]:
    """The result and the exit code of a stage that raised `error`."""
    if isinstance(error, Interrupted):
        message = _readable(error.message)
        return Result(
            stage=stage, outcome=Outcome.INTERRUPTED, reason=error.reason, message=message, step=error.step
        ), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        message = "stopped at once by a second signal"
        return Result(
            stage=stage, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message=message
        ), ExitCode.TRY_AGAIN
    if any(map(_is_loss_of_others, _causes(error))):
        message = "lost the other processes of this training: it goes on from the newest checkpoint when all are back"
        return Result(
            stage=stage, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message=message
        ), ExitCode.TRY_AGAIN
    if isinstance(error, StageError):
        reason, message, code = error.reason, error.message, error.exit_code
    elif any(map(_is_out_of_memory, _causes(error))):
        reason, message, code = Reason.OOM_KILLED, _memory_message(error, stage), 1
    elif any(map(_is_full_disk, _causes(error))):
        reason, message, code = Reason.STAGE_FAILED, _disk_message(error), 1
    else:
        reason, message, code = Reason.STAGE_FAILED, _summary(error, stage), 1
    return Result(stage=stage, outcome=Outcome.FAILED, reason=reason, message=_readable(message)), code


def format_trace(error: BaseException, stage: Stage) -> str:
    """The traceback with all causes; exception texts that may quote what is secret are left out."""
    parts = []
    for cause in reversed(list(_causes(error))):
        frames = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_summary(cause, stage)}")
    return "\n\nwhich led to:\n\n".join(parts)


def _summary(error: BaseException, stage: Stage) -> str:
    """ "ExceptionType: text". Prepare handles the rows as text, and prepare and publish signed URLs: there a foreign
    text may quote one. The operating system's errors do not; the network's are OSErrors without a number.
    """
    name = type(error).__name__
    own = isinstance(error, (StageError, ImportError, MemoryError))
    if stage is not Stage.TRAIN and not own and getattr(error, "errno", None) is None:
        return f"{name} at {_place(error)} (its text is left out: it may quote the dataset or a signed URL)"
    text = str(error).strip()[:MAX_TEXT]
    return f"{name}: {text}" if text else f"{name} at {_place(error)}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from, as Python prints them."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # an error of torch's exists only where torch was imported
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY_TEXTS)


def _is_loss_of_others(error: BaseException) -> bool:
    """Whether it says that another process of the same training is gone, or does not answer."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or GLOO_PLACE in str(error)


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return "No space left on device" in str(error)  # how native writers (safetensors, Arrow) say it


def _memory_message(error: BaseException, stage: Stage) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and any(isinstance(cause, torch.OutOfMemoryError) for cause in _causes(error)):
        return (
            "the GPU has too little memory for these settings: lower training.microBatchTokens (or training.maxLength),"
            " use method.type LoRA or a smaller model, or ask for a GPU with more memory"
        )
    if stage is Stage.TRAIN:
        return OUT_OF_MEMORY
    return "out of memory: raise resources.prepare.limits.memory, which is that of prepare and publish"


def _disk_message(error: BaseException) -> str:
    names = [str(e.filename) for e in _causes(error) if isinstance(e, OSError) and e.filename]
    where = f" (writing {names[0]})" if names else ""
    return f"no space left on the volume{where}: create the job again with a larger workspace.size"


def _readable(text: str) -> str:
    """Without what JSON or a terminal cannot carry: lone surrogates (of odd file names) and control characters."""
    encodable = text.encode("utf-8", "replace").decode()
    return "".join(c for c in encodable if c.isprintable() or c == "\n")
