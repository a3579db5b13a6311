"""Pairs of similar rows among all, in little memory: signatures lie on disk, and one band is looked at at a time."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.duplicates.signatures import NUMBERS, Signed, band_count

Ints = npt.NDArray[np.int64]

ROWS_AT_ONCE = 4_000_000
"""Of a band, about, by their keys: 100 MB."""

PAIRS_AT_ONCE = 1024
"""Whose signatures are compared: the kernel maps 64 KiB around each, so that this is 128 MiB at most."""


class SignatureFiles:
    """The signatures of all rows, and a file with the keys of each band. Use as a context manager."""

    def __init__(self, folder: Path, similarity: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.similarity = similarity
        self.rows = 0
        self._signatures = (folder / "signatures").open("w+b")
        self._bands = [(folder / f"band-{number}").open("w+b") for number in range(band_count(similarity))]

    def add(self, signed: Signed) -> None:
        self.rows += len(signed.signatures)
        self._signatures.write(signed.signatures.tobytes())
        for file, keys in zip(self._bands, signed.bands, strict=True):
            file.write(keys.tobytes())

    def candidates(self) -> Iterator[tuple[Ints, Ints]]:
        """Pairs (earlier row, later row) that agree in a band: each row with the first and with the last before it."""
        parts = max(1, self.rows // ROWS_AT_ONCE)
        for file in self._bands:
            file.flush()
            file.seek(0)
            keys = np.fromfile(file, np.uint64, self.rows)
            for part in range(parts):
                places = np.flatnonzero(keys % np.uint64(parts) == part) if parts > 1 else np.arange(len(keys))
                yield from _neighbours(keys[places], places)

    def agreement(self, earlier: Ints, later: Ints) -> npt.NDArray[np.float64]:
        """The estimated similarity of each pair [pairs]."""
        if not len(earlier):
            return np.zeros(0)
        self._signatures.flush()
        shares = np.empty(len(earlier))
        with mmap.mmap(self._signatures.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for start in range(0, len(earlier), PAIRS_AT_ONCE):
                some = slice(start, start + PAIRS_AT_ONCE)
                shares[some] = _agreement(mapped, earlier[some], later[some])
                mapped.madvise(mmap.MADV_DONTNEED)  # or the pages would count as this process's memory
        return shares

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._signatures, *self._bands):
            file.close()


def _neighbours(keys: npt.NDArray[np.uint64], places: Ints) -> Iterator[tuple[Ints, Ints]]:
    order = np.argsort(keys, kind="stable")
    ordered, rows = keys[order], places[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    if not len(same):
        return
    begins = np.ones(len(keys), np.bool_)
    begins[same] = False
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
    yield first[same], rows[same]
    further = same[first[same] != rows[same - 1]]
    if len(further):
        yield rows[further - 1], rows[further]


def _agreement(mapped: mmap.mmap, earlier: Ints, later: Ints) -> npt.NDArray[np.float64]:
    signatures = np.frombuffer(mapped, np.uint16).reshape(-1, NUMBERS)
    shares: npt.NDArray[np.float64] = (signatures[earlier] == signatures[later]).mean(axis=1)
    return shares


class Similar:
    """What the search has found. `repeats`: rows that are similar to an earlier one with the same label; `groups`: the
    first row of those that are similar, by way of others too, whatever their labels; `pairs`: each [rows].
    """

    def __init__(self, groups: Ints) -> None:
        self.groups = groups
        self.repeats = np.zeros(len(groups), np.bool_)


def find_similar(files: SignatureFiles, labels: npt.NDArray[np.int16], groups: Ints) -> Similar:
    """Joins the `groups` that are similar. Whether a row repeats an earlier one depends on earlier rows alone, so that
    rows which are added later leave it as it is.
    """
    found = Similar(groups.copy())
    for candidates in files.candidates():
        earlier, later = candidates
        fresh = ~found.repeats[later] | (found.groups[earlier] != found.groups[later])
        earlier, later = earlier[fresh], later[fresh]
        alike = files.agreement(earlier, later) >= files.similarity
        earlier, later = earlier[alike], later[alike]
        found.repeats[later[labels[earlier] == labels[later]]] = True
        found.groups = join(found.groups, earlier, later)
    return found


def join(groups: Ints, earlier: Ints, later: Ints) -> Ints:
    """The groups with those of each pair made one; a group is the number of its first row."""
    groups = groups.copy()
    while True:
        one, other = groups[earlier], groups[later]
        apart = one != other
        if not apart.any():
            return groups
        np.minimum.at(groups, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while not np.array_equal(shorter := groups[groups], groups):
            groups = shorter
