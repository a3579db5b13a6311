"""The sources as one stream of placed rows: read, convert, clean, protect, check, split.

`place_rows` is a fresh pass with the same outcome every time it is called, so that one pass can find out what the
next one needs to know (labels, counts) without holding the rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanDataset, PlanSource

from finetune_trainer.data.clean import Cleaner, CleaningLog
from finetune_trainer.data.convert import Unwanted, convert_rows, recognise_format
from finetune_trainer.data.examples import Example, LabelledText, example_texts
from finetune_trainer.data.labels import check_label_count
from finetune_trainer.data.personal_data.protect import PersonalDataLog, Protector
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.read import Rejection, first_with_rows
from finetune_trainer.data.split import Split, Splitter, content_key
from finetune_trainer.fetch import SourceFile, fetch_source
from finetune_trainer.telemetry.watch import Watch

HELD_OUT_DETAIL = "a held-out source has the same text or prompt"
CHECK_ROWS = 256
"""Rows between two looks at whether a stop was requested."""

BATCH_ROWS = 1_000
BATCH_CHARACTERS = 1 << 22
"""Most characters in a batch, unless a single row has more: its tokens take up to 100 times as many bytes."""


@dataclass(frozen=True)
class OpenedSource:
    """A source on this machine. `origin` is the split that it was given for; TRAIN is divided by the fractions."""

    source: PlanSource
    origin: Split
    files: Sequence[SourceFile]
    format: DataFormat
    ignored: Sequence[str] = ()
    """URIs of files beside them that are no data."""


@dataclass(frozen=True, slots=True)
class PlacedRow:
    file: SourceFile
    line: int
    split: Split
    example: Example


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """`invalid` is False for a sound row that may not be used."""

    file: SourceFile
    rejection: Rejection
    invalid: bool = True


class Survey:
    """What the first pass finds out. `labels`: split -> label -> rows."""

    def __init__(self) -> None:
        self.cleaning = CleaningLog()
        self.personal_data = PersonalDataLog()
        self.read: Counter[SourceFile] = Counter()
        self.rows: Counter[str] = Counter()
        self.labels: dict[str, Counter[str]] = {}

    @property
    def rows_read(self) -> int:
        return self.read.total()

    def count(self, split: Split, example: Example) -> None:
        """Counts a row that is kept. Raises UserError for endless labels."""
        self.rows[split] += 1
        if isinstance(example, LabelledText):
            counts = self.labels.setdefault(split, Counter())
            counts[example.label] += 1
            if counts[example.label] == 1:
                check_label_count(counts)


def open_sources(dataset: PlanDataset, formats: list[DataFormat], downloads: Path, watch: Watch) -> list[OpenedSource]:
    """Fetches the sources, held-out ones first, and recognises which of the formats each has.

    Raises UserError (DataNotFound, DataInvalid), StageError for network trouble, Interrupted.
    """
    opened = []
    for split in Split:  # its order matters, see there
        for source in _sources(dataset, split):
            watch.check()
            files, ignored = fetch_source(source, downloads / source.field, watch)
            data_format = recognise_format(first_with_rows(files), source, formats, watch.check)
            opened.append(OpenedSource(source, split, files, data_format, ignored))
    return opened


def _sources(dataset: PlanDataset, split: Split) -> list[PlanSource]:
    match split:
        case Split.TEST:
            return dataset.test.sources if dataset.test else []
        case Split.VALIDATION:
            return dataset.validation.sources
        case Split.TRAIN:
            return dataset.sources


def place_rows(
    sources: Sequence[OpenedSource], dataset: PlanDataset, survey: Survey | None = None
) -> Iterator[PlacedRow | RejectedRow]:
    """Every row of all sources, in their order. What was done to their texts is counted into `survey`."""
    splitter = Splitter(dataset)
    change = _text_changes(dataset, survey or Survey())
    closed = set(dataset.labels or ())
    for opened in sources:
        for file in opened.files:
            for item in convert_rows(file, opened.source, opened.format):
                if isinstance(item, Rejection):
                    yield RejectedRow(file, item)
                    continue
                line, example = item
                changed = change(example)
                if isinstance(changed, Unwanted):
                    yield RejectedRow(file, Rejection(line, changed.reason, changed.detail), False)
                    continue
                example = changed
                if closed and isinstance(example, LabelledText) and example.label not in closed:
                    yield RejectedRow(file, Rejection(line, "label is unknown", "dataset.labels does not list it"))
                    continue
                split = splitter.place(opened.origin, content_key(example))
                if split is None:
                    yield RejectedRow(file, Rejection(line, "held-out duplicate", HELD_OUT_DETAIL), False)
                else:
                    yield PlacedRow(file, line, split, example)


def _text_changes(dataset: PlanDataset, survey: Survey) -> Callable[[Example], Example | Unwanted]:
    """Cleaning, then personal data, which it may have laid bare. Counts into `survey`, from zero."""
    cleaner = Cleaner(dataset.clean) if dataset.clean else None
    protector = Protector(dataset.personal_data) if dataset.personal_data else None
    survey.cleaning = CleaningLog(cleaner.names if cleaner else ())
    survey.personal_data = PersonalDataLog(dataset.personal_data.settings.action if dataset.personal_data else None)

    def change(example: Example) -> Example | Unwanted:
        cleaned = cleaner.clean(example, survey.cleaning) if cleaner else example
        if protector is None or isinstance(cleaned, Unwanted):
            return cleaned
        return protector.protect(cleaned, survey.personal_data)

    return change


def survey_rows(
    sources: Sequence[OpenedSource], dataset: PlanDataset, quarantine: Quarantine, survey: Survey, watch: Watch
) -> None:
    """The first pass: counts into `survey`, rejections into `quarantine`. Raises UserError, Interrupted."""
    sizes = {file: file.path.stat().st_size for opened in sources for file in opened.files}
    done = 0
    current: SourceFile | None = None
    for number, row in enumerate(place_rows(sources, dataset, survey)):
        if row.file != current:
            done += sizes[current] if current else 0
            current = row.file
        if number % CHECK_ROWS == 0:
            watch.advance(done, sum(sizes.values()))
        survey.read[row.file] += 1
        if isinstance(row, RejectedRow):
            quarantine.add(row.file, row.rejection, row.invalid)
        else:
            survey.count(row.split, row.example)


def batch_rows(rows: Iterable[PlacedRow]) -> Iterator[list[PlacedRow]]:
    """The rows in batches for the tokenizer."""
    batch: list[PlacedRow] = []
    characters = 0
    for row in rows:
        length = sum(map(len, example_texts(row.example)))
        if batch and (len(batch) == BATCH_ROWS or characters + length > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(row)
        characters += length
    if batch:
        yield batch
