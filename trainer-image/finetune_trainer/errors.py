"""Errors that a stage reports to the user by exit code and termination message."""

from finetune_api.constants import ExitCode, Reason


class StageError(Exception):
    """A failure with a cause that the user can read in the job's status.

    The message says what was found where (field or file and line) and what to do. It never holds dataset text
    or secrets.
    """

    exit_code: int = 1

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class UserError(StageError):
    """The spec or the data is wrong: trying again cannot help, so the Job is failed at once."""

    exit_code = int(ExitCode.USER_ERROR)


class Interrupted(StageError):  # noqa: N818  (no error, like KeyboardInterrupt)
    """SIGTERM arrived and everything worth keeping is saved: the next attempt goes on from there."""

    exit_code = int(ExitCode.TRY_AGAIN)

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(Reason.INTERRUPTED, message)
        self.step = step
