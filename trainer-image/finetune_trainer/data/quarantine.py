"""Rejected rows: written to quarantine.jsonl with file, line and reason, counted, and judged."""

import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from finetune_api.constants import Reason
from finetune_api.report import Quarantined

from finetune_trainer.data.read import Rejection
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile
from finetune_trainer.workspace import sync_folder

NAMED_REJECTIONS = 3
"""How many rejections, and how many reasons, an error message names."""


class Quarantine:
    """quarantine.jsonl: one line per rejected row, written as they come; it takes its place when it is closed.

    `counts`: rejected rows by reason.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        self._invalid: Counter[str] = Counter()
        self.by_file: Counter[SourceFile] = Counter()
        self._examples: list[str] = []
        self._discarded = False
        self._path = path
        self._temporary = path.with_name(f".{path.name}.new")
        self._file = self._temporary.open("w", encoding="utf-8")

    @property
    def rejected(self) -> int:
        return self.counts.total()

    @property
    def invalid(self) -> int:
        """Rows that count against dataset.maxRejected."""
        return self._invalid.total()

    def add(self, file: SourceFile, rejection: Rejection, invalid: bool = True) -> None:
        """`invalid` is False for a row that is sound, but not wanted."""
        self.counts[rejection.reason] += 1
        self.by_file[file] += 1
        line = Quarantined(uri=file.uri, line=rejection.line, reason=rejection.reason, detail=rejection.detail)
        self._file.write(line.to_json() + "\n")
        if invalid:
            self._invalid[rejection.reason] += 1
            if len(self._examples) < NAMED_REJECTIONS:
                detail = f" ({rejection.detail})" if rejection.detail else ""
                self._examples.append(f"{file.at(rejection.line)}: {rejection.reason}{detail}")

    def check(self, rows_read: int, max_rejected: float) -> None:
        """Raises UserError (DataInvalid) if more than the share `max_rejected` of all rows is invalid."""
        if not self.invalid or self.invalid / rows_read <= max_rejected:
            return
        examples, place = "; ".join(self._examples), f"{self._path.parent.name}/{self._path.name}"
        more = f" and {self.invalid - len(self._examples)} more" if self.invalid > len(self._examples) else ""
        raise UserError(
            Reason.DATA_INVALID,
            f"{examples}{more}. Invalid: {self.invalid} of {rows_read} rows; "
            f"dataset.maxRejected is {max_rejected:.3g}. By reason: {_commonest(self._invalid)}. All are in {place}",
        )

    def discard(self) -> None:
        """What is there stays, since nothing is judged anew."""
        self._discarded = True

    def reasons(self) -> str:
        """The commonest reasons with their rows: "label is missing 3, invalid JSON 2"; empty if nothing is rejected."""
        return _commonest(self.counts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Bad data is reported too; any other end leaves the report of an earlier attempt."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if (error is None or isinstance(error, UserError)) and not self._discarded:
            self._temporary.replace(self._path)
            sync_folder(self._path.parent)
        else:
            self._temporary.unlink(missing_ok=True)


def _commonest(reasons: Counter[str]) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(NAMED_REJECTIONS))
    others = len(reasons) - NAMED_REJECTIONS
    return counts + (f", {others} other reason{'s' if others > 1 else ''}" if others > 0 else "")
