"""Where personal data is in a text: one pass decides which detectors may find something, only those look."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import re2


class Match(NamedTuple):
    """`value` is the same for all spellings of the same value."""

    start: int
    end: int
    kind: str
    value: str


@dataclass(frozen=True)
class Detector:
    """Finds one kind of values. `trigger` (RE2) matches in every text in which `find` finds something."""

    kind: str
    trigger: str
    find: Callable[[str], Iterable[Match]]


class Finder:
    """All detectors on a text. Of values that overlap, the longest gives its name to what they cover together."""

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self._detectors = detectors
        options = re2.Options()
        options.max_mem = 64 << 20
        self._triggers = re2.Set.SearchSet(options)
        for detector in detectors:
            self._triggers.Add(detector.trigger)
        self._triggers.Add("")  # matches always: no match at all means that the automaton ran out of memory
        self._triggers.Compile()

    def find(self, text: str) -> list[Match]:
        """The values in the order of the text; none overlaps another."""
        triggered = sorted(self._triggers.Match(text) or range(len(self._detectors) + 1))
        found = [match for number in triggered[:-1] for match in self._detectors[number].find(text)]
        return list(_merged(found)) if len(found) > 1 else found


def _merged(found: list[Match]) -> Iterator[Match]:
    group: list[Match] = []
    end = 0
    for match in sorted(found, key=lambda match: (match.start, -match.end)):
        if group and match.start >= end:
            yield _whole(group, end)
            group, end = [], 0
        group.append(match)
        end = max(end, match.end)
    yield _whole(group, end)


def _whole(group: list[Match], end: int) -> Match:
    longest = max(group, key=lambda match: match.end - match.start)
    return longest._replace(start=group[0].start, end=end)
