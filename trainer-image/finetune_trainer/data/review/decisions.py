"""What people decided on rows that were suspicious: read from their files, and applied to every row with that text."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from finetune_api.constants import Reason
from finetune_api.plan import PlanDataset

from finetune_trainer.data.convert import Unwanted, spelled_number
from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.groups import blocks
from finetune_trainer.data.read import RawRow, Rejection, read_rows
from finetune_trainer.data.split import KEY_BYTES, row_hash
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile

HASH_COLUMN, DECISION_COLUMN = "rowHash", "decision"
KEEP, DROP = "keep", "drop"
HASH = re.compile(r"[0-9a-f]{32}")
MOST_DECISIONS = 100_000
"""Every process that prepares rows holds them."""

Decisions = Mapping[bytes, str]
"""Row hash -> label, KEEP or DROP."""


class Decided(NamedTuple):
    """`places`: where a decision stands, for error messages; `undecided`: rows of the files without one."""

    decisions: dict[bytes, str]
    places: dict[bytes, str]
    undecided: int

    def covers(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which rows somebody has decided on, by their `split.input_key`: [rows]."""
        decided = np.array([int.from_bytes(row[:KEY_BYTES]) for row in self.decisions], np.uint64)
        covered = np.zeros(len(keys), np.bool_)
        for some in blocks(len(keys)):
            covered[some] = np.isin(keys[some], decided)
        return covered


NOTHING_DECIDED = Decided({}, {}, 0)


@dataclass
class ReviewLog:
    """Rows that decisions changed, and the labels that rows had before; logs of different rows add up."""

    corrected: int = 0
    confirmed: int = 0
    dropped: int = 0
    found: set[bytes] = field(default_factory=set)
    """Decided texts that were there."""
    labels: set[str] = field(default_factory=set)

    def merge(self, other: "ReviewLog") -> None:
        self.corrected += other.corrected
        self.confirmed += other.confirmed
        self.dropped += other.dropped
        self.found |= other.found
        self.labels |= other.labels


def read_decisions(files: Iterable[SourceFile], dataset: PlanDataset, check: Callable[[], None]) -> Decided:
    """All decisions. `check` is called for every row, and may raise to stop.

    Raises UserError (DataInvalid), with file and line, for a row that cannot be read, has no rowHash, decides on a
    label that dataset.labels does not list, or contradicts another one; and if nothing at all was decided.
    """
    settings = dataset.labelling
    aliases = {alias.strip(): label for alias, label in ((settings and settings.aliases) or {}).items()}
    decided: dict[bytes, str] = {}
    places: dict[bytes, str] = {}
    undecided, first = 0, ""
    for file in files:
        for row in read_rows(file, {HASH_COLUMN, DECISION_COLUMN}):
            check()
            place = file.at(row.line)
            text, decision = _read(row, place)
            decision = aliases.get(decision, decision)
            if not decision:
                undecided, first = undecided + 1, first or place
                continue
            if dataset.labels and decision not in (KEEP, DROP, *dataset.labels):
                raise _no_label(place)
            if decided.setdefault(text, decision) != decision:
                raise UserError(
                    Reason.DATA_INVALID,
                    f"{place}: the decision contradicts that in {places[text]} on the same rowHash: correct one",
                )
            places.setdefault(text, place)
            if len(decided) > MOST_DECISIONS:
                raise UserError(
                    Reason.DATA_INVALID, f"{place}: more than {MOST_DECISIONS} decisions: correct the data itself"
                )
    if undecided and not decided:
        raise UserError(
            Reason.DATA_INVALID,
            f"{first}: the decision is empty, and so are all others: fill some in, or leave the file out",
        )
    return Decided(decided, places, undecided)


def _read(row: RawRow | Rejection, place: str) -> tuple[bytes, str]:
    if isinstance(row, Rejection):
        raise UserError(Reason.DATA_INVALID, f"{place}: {row.reason}" + (f" ({row.detail})" if row.detail else ""))
    missing = [column for column in (HASH_COLUMN, DECISION_COLUMN) if column not in row.values]
    if missing:
        raise UserError(Reason.DATA_INVALID, f"{place}: {missing[0]} is missing: each row needs rowHash and decision")
    text = row.values[HASH_COLUMN]
    if not isinstance(text, str) or not HASH.fullmatch(text.strip()):
        raise UserError(
            Reason.DATA_INVALID, f"{place}: rowHash is none: 32 digits of 0-9 and a-f, as they stand in review.jsonl"
        )
    return bytes.fromhex(text.strip()), _spelled(row.values[DECISION_COLUMN], place)


def _spelled(value: Any, place: str) -> str:
    """Labels as `convert` reads them; empty if there is none."""
    if value is None:
        return ""
    decision = spelled_number(value) or value
    if not isinstance(decision, str):
        raise _no_label(place)
    return decision.strip()


def _no_label(place: str) -> UserError:
    return UserError(
        Reason.DATA_INVALID,
        f"{place}: the decision is neither a label of the data nor '{KEEP}' nor '{DROP}': correct it",
    )


def check_labels(decided: Decided, log: ReviewLog) -> None:
    """Raises UserError (DataInvalid) for a decision on a label that no row has: it is misspelled."""
    for text, decision in decided.decisions.items():
        if decision not in (KEEP, DROP) and decision not in log.labels:
            raise _no_label(decided.places[text])


def check_names(labels: Iterable[str]) -> None:
    """Raises UserError (DataInvalid) for a label that would be taken for a decision."""
    if taken := {KEEP, DROP} & {*labels}:
        raise UserError(
            Reason.DATA_INVALID,
            f"dataset.sources: a label is '{min(taken)}', which is a decision in dataset.review: give it another name "
            "by dataset.labelling.aliases",
        )


class Reviewer:
    """The decisions at work. `review` is a pure function of the example; it counts into a log."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions

    def review(self, example: LabelledText, log: ReviewLog) -> tuple[LabelledText | Unwanted, bool]:
        """The example with the label that was decided, and whether anything was."""
        if not self._decisions:
            return example, False
        log.labels.add(example.label)
        text = row_hash(example.text)
        decision = self._decisions.get(text)
        if decision is None:
            return example, False
        log.found.add(text)
        if decision == DROP:
            log.dropped += 1
            return Unwanted("dropped in review", "by a decision of dataset.review.decisions"), True
        if decision in (KEEP, example.label):
            log.confirmed += 1
            return example, True
        log.corrected += 1
        return replace(example, label=decision), True
