"""What is done to each row by itself, batch by batch, in any process: convert, clean, label, protect, review, key it.

Nothing here needs to know another row, so batches can be worked on at the same time. No torch, no transformers:
a process that works on batches should start fast and stay small.
"""

import pickle
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanDataset, PlanSource

from finetune_trainer.data.clean import Cleaner, CleaningLog
from finetune_trainer.data.convert import Unwanted, convert_row
from finetune_trainer.data.duplicates.signatures import Signed, sign
from finetune_trainer.data.examples import UNLABELLED, Example, LabelledText
from finetune_trainer.data.labelling import Labeller, LabellingLog, optional_fields
from finetune_trainer.data.personal_data.protect import PersonalDataLog, Protector
from finetune_trainer.data.read import RawRow, Rejection
from finetune_trainer.data.review.decisions import Decisions, Reviewer, ReviewLog
from finetune_trainer.data.split import input_key, whole_key

CODEC = pa.Codec("zstd", compression_level=1)


class Batch(NamedTuple):
    """Rows of one file, as its reader gives them."""

    file: int
    source: PlanSource
    format: DataFormat
    rows: list[RawRow | Rejection]


class Packed(NamedTuple):
    """Examples, pickled and compressed: only who needs their texts unpacks them."""

    content: bytes
    size: int

    @classmethod
    def pack(cls, examples: list[Example]) -> "Packed":
        plain = pickle.dumps(examples, protocol=5)
        return cls(CODEC.compress(plain, asbytes=True), len(plain))

    def unpack(self) -> list[Example]:
        examples: list[Example] = pickle.loads(CODEC.decompress(self.content, self.size))
        return examples


@dataclass
class Log:
    """What was done to the rows, counted; logs of different batches add up."""

    cleaning: CleaningLog = field(default_factory=CleaningLog)
    personal_data: PersonalDataLog = field(default_factory=PersonalDataLog)
    labelling: LabellingLog = field(default_factory=LabellingLog)
    review: ReviewLog = field(default_factory=ReviewLog)

    def merge(self, other: "Log") -> None:
        self.cleaning.merge(other.cleaning)
        self.personal_data.merge(other.personal_data)
        self.labelling.merge(other.labelling)
        self.review.merge(other.review)


class RejectedRow(NamedTuple):
    """`invalid` is False for a sound row that may not be used."""

    rejection: Rejection
    invalid: bool = True


@dataclass
class WorkedBatch:
    """What has become of a batch: rows that are left out, and what is known of each of the others, in their order."""

    file: int
    rejected: list[RejectedRow]
    lines: "array[int]"
    input_keys: "array[int]"
    whole_keys: "array[int]"
    labels: list[str] | None
    examples: Packed
    log: Log
    signed: Signed | None = None
    weak: bytes = b""
    """1 for each row that has its label from a rule; empty: none has."""

    @property
    def rows_read(self) -> int:
        return len(self.lines) + len(self.rejected)


class BatchWorker:
    """Works on batches by the dataset's settings. Raises UserError (DataInvalid) for settings that cannot be met."""

    def __init__(self, dataset: PlanDataset, decisions: Decisions | None = None) -> None:
        self._cleaner = Cleaner(dataset.clean) if dataset.clean else None
        self._protector = Protector(dataset.personal_data) if dataset.personal_data else None
        self._action = dataset.personal_data.settings.action if dataset.personal_data else None
        self._labeller = Labeller(dataset)
        self._similarity = dataset.duplicates.similarity if dataset.duplicates else None
        self._optional = optional_fields(dataset)
        self._reviewer = Reviewer(decisions or {})

    def new_log(self) -> Log:
        return Log(
            CleaningLog(self._cleaner.names if self._cleaner else ()),
            PersonalDataLog(self._action),
            self._labeller.new_log(),
        )

    def work(self, batch: Batch) -> WorkedBatch:
        log = self.new_log()
        rejected: list[RejectedRow] = []
        lines: list[int] = []
        weak = bytearray()
        examples: list[Example] = []
        for row in batch.rows:
            if isinstance(row, Rejection):
                rejected.append(RejectedRow(row))
                continue
            result = convert_row(row, batch.source, batch.format, self._optional)
            if isinstance(result, Rejection):
                rejected.append(RejectedRow(result))
                continue
            changed, decided = self._change(result, row.values, log), False
            if isinstance(changed, LabelledText):
                changed, decided = self._reviewer.review(changed, log.review)
            if isinstance(changed, Unwanted):
                rejected.append(RejectedRow(Rejection(row.line, changed.reason, changed.detail), changed.invalid))
            else:
                lines.append(row.line)
                weak.append(isinstance(result, LabelledText) and result.label == UNLABELLED and not decided)
                examples.append(changed)
        return WorkedBatch(
            file=batch.file,
            rejected=rejected,
            lines=array("Q", lines),
            input_keys=array("Q", map(input_key, examples)),
            whole_keys=array("Q", map(whole_key, examples)),
            labels=_labels(examples),
            examples=Packed.pack(examples),
            log=log,
            signed=sign(examples, self._similarity) if self._similarity is not None else None,
            weak=bytes(weak),
        )

    def _change(self, example: Example, values: Mapping[str, Any], log: Log) -> Example | Unwanted:
        """Cleaning; then the label, for rules look at what was written; then personal data, which cleaning may have
        laid bare. `values`: the columns of the row.
        """
        changed = self._cleaner.clean(example, log.cleaning) if self._cleaner else example
        if isinstance(changed, LabelledText):
            changed = self._labeller.label(changed, values, log.labelling)
        if self._protector is None or isinstance(changed, Unwanted):
            return changed
        return self._protector.protect(changed, log.personal_data)


def _labels(examples: list[Example]) -> list[str] | None:
    labels = [example.label for example in examples if isinstance(example, LabelledText)]
    return labels or None


Worker = Callable[[Batch], WorkedBatch]
