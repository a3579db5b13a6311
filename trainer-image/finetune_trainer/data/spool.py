"""Examples on disk between the pass that reads them and the one that tokenizes them, in their order."""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from finetune_trainer.data.examples import Example
from finetune_trainer.data.work import Packed

LINE_BYTES = 8


class Chunk(NamedTuple):
    """Consecutive examples of one file, with their lines there; `start` is the number of the first among all."""

    file: int
    start: int
    lines: "array[int]"
    examples: list[Example]


class _Place(NamedTuple):
    """Of a chunk: its lines, then its examples."""

    file: int
    start: int
    rows: int
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

    def write(self, file: int, lines: "array[int]", examples: Packed) -> None:
        if lines:
            offset = self._file.seek(0, 2)
            self._file.write(lines.tobytes() + examples.content)
            length = len(examples.content)
            self._places.append(_Place(file, self._rows, len(lines), offset, length, examples.size))
            self._rows += len(lines)

    def chunks(self) -> Iterator[Chunk]:
        return map(self._read, self._places)

    def pick(self, rows: Sequence[int]) -> Iterator[Example]:
        """Some rows, by their ascending numbers. Others are unpacked only beside them."""
        at, chunk = None, Chunk(0, 0, array("Q"), [])
        for row in rows:
            place = self._place_of(row)
            if place is not at:
                at, chunk = place, self._read(place)
            yield chunk.examples[row - chunk.start]

    def locate(self, row: int) -> tuple[int, int]:
        """(File, line there) of a row, by its number among all."""
        place = self._place_of(row)
        self._file.seek(place.offset + LINE_BYTES * (row - place.start))
        return place.file, array("Q", self._file.read(LINE_BYTES))[0]

    def _place_of(self, row: int) -> _Place:
        return self._places[bisect_right(self._places, row, key=lambda place: place.start) - 1]

    def _read(self, place: _Place) -> Chunk:
        self._file.seek(place.offset)
        lines = array("Q", self._file.read(LINE_BYTES * place.rows))
        packed = Packed(self._file.read(place.length), place.size)
        return Chunk(place.file, place.start, lines, packed.unpack())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
