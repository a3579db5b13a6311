"""Examples on disk between the pass that reads them and the one that tokenizes them, in their order."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from finetune_trainer.data.examples import Example
from finetune_trainer.data.work import Packed


class Chunk(NamedTuple):
    """Consecutive examples of one file; `start` is the number of the first among all."""

    file: int
    start: int
    examples: list[Example]


class _Place(NamedTuple):
    file: int
    start: int
    offset: int
    length: int
    size: int


class Spool:
    """One file, written once and then read any number of times. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w+b")
        self._places: list[_Place] = []
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def write(self, file: int, rows: int, examples: Packed) -> None:
        if rows:
            offset = self._file.seek(0, 2)
            self._file.write(examples.content)
            self._places.append(_Place(file, self._rows, offset, len(examples.content), examples.size))
            self._rows += rows

    def chunks(self) -> Iterator[Chunk]:
        return map(self._read, self._places)

    def pick(self, rows: Sequence[int]) -> Iterator[tuple[int, int, Example]]:
        """(Number, file, example) of some rows, by their ascending numbers. Others are unpacked only beside them."""
        at, chunk = -1, Chunk(0, 0, [])
        for row in rows:
            place = bisect_right(self._places, row, key=lambda place: place.start) - 1
            if place != at:
                at, chunk = place, self._read(self._places[place])
            yield row, chunk.file, chunk.examples[row - chunk.start]

    def _read(self, place: _Place) -> Chunk:
        self._file.seek(place.offset)
        packed = Packed(self._file.read(place.length), place.size)
        return Chunk(place.file, place.start, packed.unpack())

    def file_of(self, row: int) -> int:
        """The file of a row, by its number among all."""
        return self._places[bisect_right(self._places, row, key=lambda place: place.start) - 1].file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
