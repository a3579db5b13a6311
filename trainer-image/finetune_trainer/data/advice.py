"""What somebody should know about the data before training: errors, which refuse it, and warnings."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_api.dataset import PersonalDataAction
from finetune_api.report import DataFinding, DataReport, Level, Remark

from finetune_trainer.errors import StageError, UserError

FIELD = re.compile(r"((?:dataset|model|method|training)(?:\.\w+|\[\d+\])*): ")
"""How an error's message begins that is about a field of the spec."""


class Advice:
    """Errors and warnings as they are found. A look at the data finds all of its errors before one ends the stage."""

    def __init__(self) -> None:
        self._errors: dict[int, DataFinding] = {}
        self._raised: list[UserError] = []
        self._warnings: list[DataFinding] = []

    @property
    def findings(self) -> list[DataFinding]:
        return [*self._errors.values(), *self._warnings]

    @contextmanager
    def check(self, rows: int | None = None, doubtful: bool = False) -> Iterator[None]:
        """Keeps the block's UserError for `end`. `doubtful`: a sample cannot prove it, so that it is a warning only."""
        try:
            yield
        except UserError as error:
            if not doubtful:
                self.refuse(error, rows)
                self._raised.append(error)
                return
            field, message = _split(error.message)
            self.warn(Remark.SAMPLE_TOO_SMALL, f"in the sample: {message}", field)

    def end(self) -> None:
        """Raises the first error, if there was one."""
        if self._raised:
            raise self._raised[0]

    def refuse(self, error: UserError, rows: int | None = None) -> None:
        """The stage ends with this error; one that is known is not told twice."""
        field, message = _split(error.message)
        found = DataFinding(level=Level.ERROR, reason=error.reason, field=field, message=message, rows=rows)
        self._errors.setdefault(id(error), found)

    def warn(self, reason: Remark, message: str, field: str | None = None, rows: int | None = None) -> None:
        found = DataFinding(level=Level.WARNING, reason=reason, field=field, message=message, rows=rows)
        if found not in self._warnings:
            self._warnings.append(found)

    def warn_unreachable(self, error: StageError) -> None:
        """Of a model that is left to another time."""
        field, message = _split(error.message.removesuffix("; it will be tried again"))
        message += ": its tokens are not counted, and it is not known whether it fits the job"
        self.warn(Remark.MODEL_UNREACHABLE, message, field)


def warnings_of(report: DataReport, invalid: int, max_rejected: float) -> list[DataFinding]:
    """What the report itself gives reason to say. `invalid`: rows that count against dataset.maxRejected."""
    summary, advice = report.summary, Advice()
    if 0 < invalid <= max_rejected * summary.rows_read:
        shown = f"{invalid:,} of {summary.rows_read:,} rows"
        message = f"{shown} cannot be used: they are left out, and listed in quarantine.jsonl"
        advice.warn(Remark.ROWS_REJECTED, message, "dataset.maxRejected", invalid)
    for source in report.sources:
        encoding = source.file.encoding
        if encoding is not None and not encoding.startswith("utf"):
            name = source.uri.rstrip("/").rpartition("/")[2]
            message = f"{name} is read as {encoding}, which is a guess: look at some rows, or save the file as UTF-8"
            advice.warn(Remark.ENCODING_GUESSED, message, source.field)
    if summary.truncated_rows:
        cut = f"{summary.truncated_rows:,} of {summary.train_rows:,} training rows"
        message = f"{cut} are cut at {summary.max_length:,} tokens: what is beyond is not learned"
        advice.warn(Remark.ROWS_TRUNCATED, message, "training.maxLength", summary.truncated_rows)
    train = report.tokenization.splits.get("train") if report.tokenization else None
    if train and train.answers_not_learned:
        message = (
            f"{train.answers_not_learned:,} answers are not learned: the chat template writes them differently once "
            "other turns follow; give each a row that ends with it, or mark the answers in the template"
        )
        advice.warn(Remark.ANSWERS_NOT_LEARNED, message, "dataset.sources")
    found = report.personal_data
    if found is not None and found.rows and found.action == PersonalDataAction.KEEP:
        message = f"rows in which personal data stays: {found.rows:,}"
        advice.warn(Remark.PERSONAL_DATA_KEPT, message, "dataset.personalData.action", found.rows)
    return advice.findings


def _split(message: str) -> tuple[str | None, str]:
    """The field that the message begins with, and the rest."""
    start = FIELD.match(message)
    return (start.group(1), message[start.end() :]) if start else (None, message)
