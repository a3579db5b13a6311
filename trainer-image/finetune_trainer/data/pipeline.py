"""The sources as rows: read, worked on in batches, and, once they are placed, read again from the spool.

Texts pass by once and lie on disk after that; what is known of all rows at once is the ledger.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanDataset, PlanSource
from finetune_api.report import ConflictReport, DuplicateReport

from finetune_trainer.data.convert import find_columns, recognise_format, usable_columns
from finetune_trainer.data.duplicates.search import SignatureFiles
from finetune_trainer.data.examples import Example, example_texts
from finetune_trainer.data.labelling import check_columns, optional_fields, rule_columns
from finetune_trainer.data.ledger import REASONS, Ledger, Verdict
from finetune_trainer.data.pool import process_count, work_batches
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.read import RawRow, Rejection, first_with_rows, read_rows
from finetune_trainer.data.review.decisions import Decisions
from finetune_trainer.data.split import SPLITS, Split
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.work import Batch, Log
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile, fetch_source
from finetune_trainer.telemetry.watch import Watch

CHECK_ROWS = 256
"""Rows between two looks at whether a stop was requested."""

BATCH_ROWS = 1_000
BATCH_CHARACTERS = 1 << 20
"""About the most characters in a batch, unless a single row has more: each process holds some batches."""

ENCODED_CHARACTERS = 1 << 19
"""Most characters in a batch for the tokenizer, likewise: its tokens take up to 100 times as many bytes."""


@dataclass(frozen=True)
class OpenedSource:
    """A source on this machine. `origin` is the split that it was given for; TRAIN is divided by the fractions."""

    source: PlanSource
    origin: Split
    files: Sequence[SourceFile]
    format: DataFormat
    ignored: Sequence[str] = ()
    """URIs of files beside them that are no data."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of the format -> column."""


@dataclass(frozen=True, slots=True)
class PlacedRow:
    file: SourceFile
    line: int
    split: Split
    example: Example
    suspicious: bool = False


@dataclass
class Survey:
    """What is known when all rows are read. `rows`: by split; `labels`: split -> label -> rows."""

    read: Counter[SourceFile] = field(default_factory=Counter)
    log: Log = field(default_factory=Log)
    rows: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    cut: bool = False
    """Whether rows were left unread: a sample was asked for."""
    weak: Counter[str] = field(default_factory=Counter)
    """By split: rows that have their label from a rule."""
    conflicts: ConflictReport | None = None
    duplicates: DuplicateReport | None = None

    @property
    def rows_read(self) -> int:
        return self.read.total()

    def count(self, ledger: Ledger) -> None:
        """As far as is decided by now."""
        self.rows = Counter(ledger.rows_by_split())
        self.labels = {split: Counter(counts) for split, counts in ledger.labels_by_split().items()}
        self.weak = Counter(ledger.weak_by_split())


def open_sources(dataset: PlanDataset, formats: list[DataFormat], downloads: Path, watch: Watch) -> list[OpenedSource]:
    """Fetches the sources, held-out ones first, and recognises which of the formats each has.

    Raises UserError (DataNotFound, DataInvalid), StageError for network trouble, Interrupted.
    """
    opened = []
    for split in Split:  # its order matters, see there
        for source in _sources(dataset, split):
            watch.check()
            files, ignored = fetch_source(source, downloads / source.field, watch)
            first = first_with_rows(files)
            data_format = recognise_format(first, source, formats, watch.check, optional_fields(dataset))
            columns = find_columns(first, source, data_format, watch.check)
            opened.append(OpenedSource(source, split, files, data_format, ignored, columns))
    return opened


def _sources(dataset: PlanDataset, split: Split) -> list[PlanSource]:
    match split:
        case Split.TEST:
            return dataset.test.sources if dataset.test else []
        case Split.VALIDATION:
            return dataset.validation.sources
        case Split.TRAIN:
            return dataset.sources


class Rows:
    """All sound rows: their examples in a spool, their numbers in a ledger."""

    def __init__(self, sources: Sequence[OpenedSource], spool: Spool, signatures: SignatureFiles | None = None) -> None:
        """signatures: where similar rows are looked for."""
        self.files = [(opened, file) for opened in sources for file in opened.files]
        self.spool = spool
        self.signatures = signatures
        self.ledger = Ledger()

    def placed(self) -> Iterator[PlacedRow]:
        """Those that are kept, in their order."""
        ledger, kept = self.ledger, self.ledger.kept
        for chunk in self.spool.chunks():
            file = self.files[chunk.file][1]
            for number, (line, example) in enumerate(zip(chunk.lines, chunk.examples, strict=True), start=chunk.start):
                if kept[number]:
                    split, suspicious = SPLITS[ledger.splits[number]], bool(ledger.suspicious[number])
                    yield PlacedRow(file, line, split, example, suspicious)

    def left_out(self) -> Iterator[tuple[SourceFile, Rejection]]:
        """Those that are not, and why."""
        for number in map(int, np.flatnonzero(~self.ledger.kept)):
            why = REASONS[Verdict(self.ledger.verdicts[number])]
            file, line = self.spool.locate(number)
            yield self.files[file][1], Rejection(line, why.reason, why.detail)


def read_all(
    rows: Rows,
    dataset: PlanDataset,
    quarantine: Quarantine,
    survey: Survey,
    watch: Watch,
    *,
    decisions: Decisions | None = None,
    processes: int | None = None,
    most: int | None = None,
) -> None:
    """Reads every row once and works on it: sound ones into `rows`, the others into `quarantine`; counts into `survey`.

    decisions: of people on rows. processes: left out, as many as this process may use CPUs and the data is worth.
    most: rows of each source, as many of each of its files, from their beginnings; left out, all.

    Raises UserError (DataInvalid), StageError if a process was killed, Interrupted.
    """
    sizes = [file.path.stat().st_size for _, file in rows.files]
    if processes is None:
        processes = process_count(sum(sizes)) if most is None else 1
    batches = _batches(rows, rule_columns(dataset), watch, survey, most)
    try:
        for batch in work_batches(batches, dataset, processes, decisions):
            opened, file = rows.files[batch.file]
            watch.advance(sum(sizes[: batch.file]) + min(file.position.bytes, sizes[batch.file]), sum(sizes))
            survey.read[file] += batch.rows_read
            survey.log.merge(batch.log)
            for rejected in batch.rejected:
                quarantine.add(file, rejected.rejection, rejected.invalid)
            rows.ledger.add(opened.origin, batch)
            rows.spool.write(batch.file, batch.lines, batch.examples)
            if rows.signatures and batch.signed:
                rows.signatures.add(batch.signed)
        check_columns(dataset, survey.log.labelling)
    finally:  # refused data is reported too, as far as it was read
        rows.ledger.close()
        survey.count(rows.ledger)


def _batches(rows: Rows, columns: set[str], watch: Watch, survey: Survey, most: int | None) -> Iterator[Batch]:
    """`columns`: those that are wanted besides the usable ones."""
    for number, (opened, file) in enumerate(rows.files):
        items: Iterable[RawRow | Rejection] = read_rows(file, usable_columns(opened.source) | columns)
        if most is not None:
            items = _beginning(items, -(-most // len(opened.files)), survey)
        for batch in _in_batches(items, watch):
            yield Batch(number, opened.source, opened.format, batch)


def _beginning(items: Iterable[RawRow | Rejection], most: int, survey: Survey) -> Iterator[RawRow | Rejection]:
    """At most so many of the items. Notes it if there are more."""
    for number, item in enumerate(items):
        if number == most:
            survey.cut = True
            return
        yield item


def _in_batches(items: Iterable[RawRow | Rejection], watch: Watch) -> Iterator[list[RawRow | Rejection]]:
    """Ends with the UserError that reading ends with, after the rows before it."""
    batch: list[RawRow | Rejection] = []
    characters = 0
    try:
        for number, item in enumerate(items):
            if number % CHECK_ROWS == 0:
                watch.check()
            batch.append(item)
            characters += _characters(item.values) if isinstance(item, RawRow) else 0
            if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except UserError:
        yield batch
        raise
    yield batch


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def batch_rows(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """The rows in batches for the tokenizer."""
    batch: list[PlacedRow] = []
    characters = 0
    for row in rows:
        length = sum(map(len, example_texts(row.example)))
        if batch and (len(batch) == BATCH_ROWS or characters + length > ENCODED_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += length
    if batch:
        yield batch
