"""dataset.labelling.rules: which rules vote on a row, and how they stand to each other and to labels that rows have.

Coverage, overlaps, conflicts and accuracy are those of labelling functions in data programming (Ratner et al.,
https://arxiv.org/abs/1711.10160): a rule that does not vote on a row abstains there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import re2
from finetune_api.constants import Reason
from finetune_api.dataset import LabelRule
from finetune_api.report import RuleReport

from finetune_trainer.data.convert import spelled_number
from finetune_trainer.data.examples import UNLABELLED
from finetune_trainer.data.read import is_unicode
from finetune_trainer.errors import UserError

EDGE = r"[^\pL\pM\pN_]"
"""What stands between words. RE2's \\b knows ASCII only."""

SPACE = r"[\s\pZ]+"
AUTOMATON_BYTES = 64 << 20


class LabelRules:
    """All rules on a row. Those that look for words and patterns in the same place look for all of them at once.

    Raises UserError (DataInvalid) for a pattern that is too large.
    """

    def __init__(self, rules: Sequence[LabelRule]) -> None:
        self.names = [rule.name for rule in rules]
        self.columns = {rule.column for rule in rules if rule.column}
        self._labels = [rule.label for rule in rules]
        places = {rule.column: None for rule in rules}
        self._searches = {
            place: _Search({n: _pattern(r) for n, r in enumerate(rules) if r.column == place and r.table is None})
            for place in places
        }
        self._tables = [(n, r.column, _table(r.table)) for n, r in enumerate(rules) if r.table is not None]

    def votes(self, text: str, values: Mapping[str, Any]) -> dict[int, str]:
        """Number of a rule -> the label that it votes for, of those that vote. `values`: the columns of the row."""
        seen = {place: text if place is None else _as_text(values.get(place)) for place in self._searches}
        votes: dict[int, str] = {}
        for place, search in self._searches.items():
            looked_at = seen[place]
            for number in search.found(looked_at) if looked_at else ():
                votes[number] = self._labels[number] or UNLABELLED
        for number, place, table in self._tables:
            label = table.get((seen[place] or "").strip())
            if label:
                votes[number] = label
        return votes


class _Search:
    """Patterns, by number, that are looked for in one pass."""

    def __init__(self, patterns: Mapping[int, str]) -> None:
        options = re2.Options()
        options.log_errors = False
        options.max_mem = AUTOMATON_BYTES
        self._numbers = list(patterns)
        self._each = [_compile(number, pattern, options) for number, pattern in patterns.items()]
        self._all = _compile_all([*patterns.values(), ""], options)

    def found(self, text: str) -> list[int]:
        """The numbers of the patterns that are found in the text."""
        if not self._numbers:
            return []
        places = self._all.Match(text) if self._all else ()
        if not places:  # not even the empty pattern: there was not memory enough for all at once
            return [number for number, each in zip(self._numbers, self._each, strict=True) if each.search(text)]
        return [self._numbers[place] for place in places if place < len(self._numbers)]


def _compile(number: int, pattern: str, options: re2.Options) -> Any:
    try:
        return re2.compile(pattern, options)
    except re2.error:  # its syntax was checked when the job was made
        where = f"dataset.labelling.rules[{number}]"
        raise UserError(Reason.DATA_INVALID, f"{where}: its pattern is too large; repeat less in it") from None


def _compile_all(patterns: Sequence[str], options: re2.Options) -> Any:
    """One automaton for all; None if it would be too large."""
    found = re2.Set.SearchSet(options)
    for pattern in patterns:
        found.Add(pattern)
    try:
        found.Compile()
    except re2.error:
        return None
    return found


def _pattern(rule: LabelRule) -> str:
    if rule.keywords is None:
        return rule.pattern or ""
    words = "|".join(SPACE.join(map(re2.escape, keyword.split() or [keyword])) for keyword in rule.keywords)
    return f"(?i)(?:^|{EDGE})(?:{words})(?:$|{EDGE})"


def _table(table: Mapping[str, str]) -> dict[str, str]:
    return {value.strip(): label for value, label in table.items()}


def _as_text(value: Any) -> str | None:
    """A column's value as rules see it; None if it is nothing that they could look at."""
    if isinstance(value, str):
        return value if is_unicode(value) else None
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return str(value)
    return spelled_number(value)


class RuleLog:
    """How the rules voted, counted; logs of different rows add up. `rows`: those that were looked at."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._counts = {name: _Votes() for name in names}
        self._names = list(names)
        self.rows = 0

    def count(self, votes: Mapping[int, str], given: str) -> None:
        """The votes on one row. `given`: the label that the row has, or UNLABELLED."""
        self.rows += 1
        several, disagree = len(votes) > 1, len(set(votes.values())) > 1
        for number, label in votes.items():
            counts = self._counts[self._names[number]]
            counts.votes += 1
            counts.overlaps += several
            counts.conflicts += disagree
            counts.judged += given != UNLABELLED
            counts.right += label == given

    def merge(self, other: "RuleLog") -> None:
        self.rows += other.rows
        for name, votes in other._counts.items():
            self._counts.setdefault(name, _Votes()).add(votes)

    def report(self) -> dict[str, RuleReport]:
        return {name: votes.report() for name, votes in self._counts.items()}


@dataclass
class _Votes:
    """Of one rule: rows on which it votes, and those of them on which what its name says."""

    votes: int = 0
    overlaps: int = 0
    conflicts: int = 0
    judged: int = 0
    right: int = 0

    def add(self, other: "_Votes") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def report(self) -> RuleReport:
        return RuleReport(
            votes=self.votes,
            overlaps=self.overlaps,
            conflicts=self.conflicts,
            judged=self.judged,
            right=self.right,
            accuracy=round(self.right / self.judged, 4) if self.judged else None,
        )
