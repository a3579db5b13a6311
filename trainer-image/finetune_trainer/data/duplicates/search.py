"""Pairs of similar rows among all, in little memory: signatures lie on disk, and one band is looked at at a time."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.duplicates.signatures import NUMBERS, Signed, band_count
from finetune_trainer.data.groups import Groups, Numbers, equal_rows, find_groups, flatten, join

PAIRS_AT_ONCE = 256
"""Whose signatures are compared: the kernel maps 64 KiB around each, so that this is 32 MiB at most."""


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

    def candidates(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Pairs (earlier row, later row) that agree in a band: each row with the first and with the last before it."""
        for file in self._bands:
            file.flush()
            file.seek(0)
            for first, last, rows in equal_rows(np.fromfile(file, np.uint64, self.rows)):
                yield first, rows
                further = first != last
                yield last[further], rows[further]

    def agreement(self, earlier: Numbers, later: Numbers) -> npt.NDArray[np.float64]:
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


def _agreement(mapped: mmap.mmap, earlier: Numbers, later: Numbers) -> npt.NDArray[np.float64]:
    signatures = np.frombuffer(mapped, np.uint16).reshape(-1, NUMBERS)
    shares: npt.NDArray[np.float64] = (signatures[earlier] == signatures[later]).mean(axis=1)
    return shares


class Similar:
    """What the search has found. `repeats`: rows that are similar to an earlier one with the same label; `groups`: the
    first row of those that are similar, by way of others too, whatever their labels; each [rows].
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.repeats = np.zeros(len(groups), np.bool_)


def find_similar(files: SignatureFiles, labels: npt.NDArray[np.int16], groups: Groups) -> Similar:
    """Joins the `groups` that are similar. Whether a row repeats an earlier one depends on earlier rows alone, so that
    rows which are added later leave it as it is.
    """
    found = Similar(groups.copy())
    for candidates in files.candidates():
        earlier, later = candidates
        apart = find_groups(found.groups, earlier) != find_groups(found.groups, later)
        fresh = ~found.repeats[later] | apart
        earlier, later = earlier[fresh], later[fresh]
        alike = files.agreement(earlier, later) >= files.similarity
        earlier, later = earlier[alike], later[alike]
        found.repeats[later[labels[earlier] == labels[later]]] = True
        join(found.groups, earlier, later)
    flatten(found.groups)
    return found
