"""report/data.json: what the data looks like, from whatever is known when it is written."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from finetune_api.dataset import DataFormat
from finetune_api.report import (
    DataReport,
    DuplicateReport,
    FileReport,
    LabellingReport,
    LengthHistogram,
    LengthReport,
    ReviewReport,
    SourceReport,
    TokenizationReport,
)
from finetune_api.status import DataStatus, LengthStatus, ModelStatus

from finetune_trainer.data.labels import balance
from finetune_trainer.data.pipeline import OpenedSource, Survey
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.read import FileFacts
from finetune_trainer.data.split import Split
from finetune_trainer.data.store import DataManifest
from finetune_trainer.fetch import SourceFile

MAX_LABELS = 32
MAX_LABEL_BYTES = 1500
"""Labels share a termination message of 4096 bytes with everything else."""

MAX_IGNORED_FILES = 100


class Lengths:
    """Tokens per row: how many rows have how many."""

    def __init__(self) -> None:
        self._rows: Counter[int] = Counter()

    def add(self, tokens: int) -> None:
        self._rows[tokens] += 1

    def report(self) -> LengthReport | None:
        """None if there are no rows."""
        if not self._rows:
            return None
        p50, p90, p99, longest = self._percentiles(50, 90, 99, 100)
        mean = sum(tokens * rows for tokens, rows in self._rows.items()) / self._rows.total()
        return LengthReport(mean=round(mean, 2), p50=p50, p90=p90, p99=p99, longest=longest)

    def histogram(self) -> LengthHistogram | None:
        """None if there are no rows."""
        if not self._rows:
            return None
        lengths, counts = self._sorted()
        doublings = np.arange(0, 2 * int(lengths[-1]).bit_length() + 1) / 2
        edges = np.unique(np.floor(2**doublings).astype(np.int64))
        rows, _ = np.histogram(lengths, edges, weights=counts)
        used = np.flatnonzero(rows)
        first, last = int(used[0]), int(used[-1])
        return LengthHistogram(edges=edges[first : last + 2].tolist(), rows=rows[first : last + 1].tolist())

    def status(self) -> LengthStatus | None:
        """None if there are no rows."""
        if not self._rows:
            return None
        p50, p95, p99, longest = self._percentiles(50, 95, 99, 100)
        return LengthStatus(p50=p50, p95=p95, p99=p99, longest=longest)

    def _sorted(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The lengths that there are, and how many rows have each."""
        lengths, rows = zip(*sorted(self._rows.items()), strict=True)
        return np.array(lengths), np.array(rows)

    def _percentiles(self, *shares: int) -> list[int]:
        """Each the length of a row (the higher of two)."""
        lengths, rows = self._sorted()
        places = np.ceil((rows.sum() - 1) * (np.array(shares) / 100))
        found: list[int] = lengths[np.searchsorted(np.cumsum(rows), places, side="right")].tolist()
        return found


@dataclass
class Findings:
    """What prepare has found out so far; refused data is reported too, as far as it was understood."""

    max_length: int
    sources: list[OpenedSource] = field(default_factory=list)
    hashes: dict[SourceFile, str] = field(default_factory=dict)
    decisions: dict[SourceFile, str] = field(default_factory=dict)
    """The files of dataset.review.decisions with their hashes."""
    files: dict[SourceFile, FileFacts] = field(default_factory=dict)
    survey: Survey = field(default_factory=Survey)
    labels: list[str] | None = None
    review: ReviewReport | None = None
    model: ModelStatus | None = None
    lengths: Lengths = field(default_factory=Lengths)
    cut_lengths: Lengths = field(default_factory=Lengths)
    """As they are trained on."""
    manifest: DataManifest | None = None
    tokenization: TokenizationReport | None = None

    def report(self, quarantine: Quarantine) -> DataReport:
        return DataReport(
            summary=self._summary(quarantine),
            model=self.model,
            sources=[
                SourceReport(
                    field=file.field,
                    uri=file.uri,
                    sha256=self.hashes[file],
                    format=opened.format.value,
                    columns=dict(opened.columns),
                    file=_file_report(self.files[file]),
                    rows_read=self.survey.read[file],
                    rows_rejected=quarantine.by_file[file],
                )
                for opened in self.sources
                for file in opened.files
            ],
            ignored_files=[uri for opened in self.sources for uri in opened.ignored][:MAX_IGNORED_FILES],
            rejections=dict(quarantine.counts.most_common()),
            cleaning=self.survey.log.cleaning.report(),
            personal_data=self.survey.log.personal_data.report(),
            duplicates=self.survey.duplicates,
            labels=_label_table(self.survey.labels, self.labels) if self.labels else None,
            labelling=self._labelling(),
            review=self.review,
            lengths=self.lengths.report(),
            tokenization=self.tokenization,
        )

    def _labelling(self) -> LabellingReport | None:
        if not any(opened.format is DataFormat.LABELLED_TEXT for opened in self.sources):
            return None
        log, rules = self.survey.log.labelling, self.survey.log.labelling.rules.report()
        return LabellingReport(
            aliases=dict(log.aliases) or None,
            weak_rows=dict(self.survey.weak) if rules else None,
            rule_rows=log.rules.rows if rules else None,
            by_rule=rules or None,
            balance=balance(self.survey.labels.get(Split.TRAIN, {}), self.labels or ()),
            conflicts=self.survey.conflicts,
        )

    def _summary(self, quarantine: Quarantine) -> DataStatus:
        splits = self.manifest.splits if self.manifest else {}
        rows = {name: split.rows for name, split in splits.items()} or self.survey.rows
        train = splits.get(Split.TRAIN)
        personal_data = self.survey.log.personal_data.report()
        return DataStatus(
            rows_read=self.survey.rows_read,
            rows_kept=sum(rows.values()),
            rows_rejected=quarantine.rejected,
            train_rows=rows.get(Split.TRAIN, 0),
            validation_rows=rows.get(Split.VALIDATION, 0),
            test_rows=rows.get(Split.TEST, 0),
            tokens=train.tokens if train else 0,
            supervised_tokens=train.supervised_tokens if train else 0,
            truncated_rows=train.truncated_rows if train else 0,
            max_length=self.max_length,
            lengths=self.cut_lengths.status(),
            labels=_status_labels(self.labels) if self.labels else None,
            duplicate_rows=_duplicate_rows(self.survey.duplicates),
            weak_rows=self.survey.weak.total() if self.survey.log.labelling.rules.rows else None,
            conflicting_rows=self.survey.conflicts.rows if self.survey.conflicts else None,
            suspicious_rows=self.review.suspicious_rows if self.review else None,
            personal_data=personal_data.found if personal_data else None,
            fingerprint=self.manifest.fingerprint if self.manifest else "",
        )


def _duplicate_rows(report: DuplicateReport | None) -> int | None:
    return report.exact_rows + (report.near_rows or 0) if report else None


def _file_report(facts: FileFacts) -> FileReport:
    return FileReport(
        kind=facts.kind.value, compression=facts.compression, encoding=facts.encoding, delimiter=facts.delimiter
    )


def _status_labels(labels: list[str]) -> list[str]:
    """As many of the labels as the status has room for."""
    shown: list[str] = []
    for label in labels[:MAX_LABELS]:
        shown.append(label)
        if len(json.dumps(shown)) > MAX_LABEL_BYTES:
            return shown[:-1]
    return shown


def _label_table(rows: Mapping[str, Counter[str]], labels: list[str]) -> dict[str, dict[str, int]]:
    """Split -> label -> rows, in the order of the class ids."""
    return {split: {label: counts[label] for label in labels} for split, counts in rows.items()}
