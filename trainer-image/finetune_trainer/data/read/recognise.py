"""What a file is: told by its content, and by its name only where the content could be several things."""

import contextlib
import csv
import io
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import PurePosixPath

from finetune_trainer.data.read.rows import invalid_file
from finetune_trainer.data.read.streams import (
    Compression,
    open_bytes,
    recognise_compression,
    recognise_encoding,
)
from finetune_trainer.fetch import COMPRESSION_SUFFIXES, SourceFile

SNIFFED_BYTES = 1 << 20
SNIFFED_RECORDS = 100
DELIMITERS = ",;\t|"


class FileKind(StrEnum):
    JSONL = "JSONL"
    JSON = "JSON"
    """One array, or objects that span lines."""
    CSV = "CSV"
    TEXT = "Text"
    PARQUET = "Parquet"
    ARROW = "Arrow"
    ARROW_STREAM = "ArrowStream"

    @property
    def tabular(self) -> bool:
        """All rows have the same columns."""
        return self not in (FileKind.JSONL, FileKind.JSON)


@dataclass(frozen=True, slots=True)
class FileFacts:
    """How a file is read. `encoding` is Python's name of the codec, unset for what is no text."""

    kind: FileKind
    compression: Compression | None = None
    encoding: str | None = None
    delimiter: str | None = None


KINDS = {
    ".jsonl": FileKind.JSONL,
    ".ndjson": FileKind.JSONL,
    ".json": FileKind.JSONL,
    ".csv": FileKind.CSV,
    ".tsv": FileKind.CSV,
    ".txt": FileKind.TEXT,
    ".text": FileKind.TEXT,
    ".parquet": FileKind.PARQUET,
    ".arrow": FileKind.ARROW,
    ".feather": FileKind.ARROW,
}
"""By the extension of a name."""

COLUMNAR = ((b"PAR1", FileKind.PARQUET), (b"ARROW1", FileKind.ARROW), (b"\xff\xff\xff\xff", FileKind.ARROW_STREAM))

FOREIGN = (
    (b"PK\x03\x04", "a zip archive (or a spreadsheet): unpack it, or save it as CSV"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x04\x22\x4d\x18", "compressed by lz4: compress it by gzip, zstd, bz2 or xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"%PDF", "a PDF: extract its text"),
    (b"SQLite format 3\0", "an SQLite database: export its table"),
    (b"\x89HDF", "an HDF5 file: save it as Parquet"),
    (b"\x93NUMPY", "a NumPy array: save it as Parquet"),
    (b"FEA1", "a Feather file of version 1: save it as version 2"),
    (b"PARE", "an encrypted Parquet file: decrypt it"),
    (b"ORC", "an ORC file: save it as Parquet"),
    (b"Obj\x01", "an Avro file: save it as Parquet"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the data: run git lfs pull"),
    (b"<!DOCTYPE", "HTML or XML: is it an error page of the server?"),
    (b"<html", "HTML or XML: is it an error page of the server?"),
    (b"<?xml", "HTML or XML: is it an error page of the server?"),
)
"""How a file begins -> what it is and what to do, where it is none that can be read."""

OBJECTS_IN_ARRAY = re.compile(r"\[\s*\{")


def recognise_file(file: SourceFile) -> FileFacts:
    """Raises UserError (DataInvalid) for a file that is none of the kinds, or is damaged where it begins."""
    with file.path.open("rb") as opened:
        compression = recognise_compression(opened.read(16))
    with open_bytes(file, compression) as stream:
        start = stream.read(SNIFFED_BYTES)
    columnar = next((kind for magic, kind in COLUMNAR if start.startswith(magic)), None)
    if columnar and compression:
        raise invalid_file(file, f"is a {columnar.value} file compressed by {compression.value}: decompress it")
    if columnar:
        return FileFacts(columnar)
    if what := _foreign(start):
        raise invalid_file(file, f"is {what}")
    whole = len(start) < SNIFFED_BYTES
    encoding = recognise_encoding(start, whole)
    text = start.decode(encoding, "finetune-mark").lstrip("\ufeff")
    kind = _text_kind(file, text)
    return FileFacts(kind, compression, encoding, _delimiter(text, whole) if kind is FileKind.CSV else None)


def _foreign(start: bytes) -> str | None:
    for magic, what in FOREIGN:
        if start.startswith(magic):
            return what
    if recognise_compression(start):
        return "compressed twice: decompress it once"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if any(start[zero : zero + 3 : 2] == b"\0\0" and 0 not in start[1 - zero : 4 : 2] for zero in (0, 1)):
        return "UTF-16 without a byte order mark: save it as UTF-8"
    return None


def _text_kind(file: SourceFile, text: str) -> FileKind:
    """JSON is told by its content; tables and plain text can look like each other."""
    named = _kind_by_name(file)
    if named in (FileKind.PARQUET, FileKind.ARROW) and text:
        raise invalid_file(file, f"is no {named.value} file, though its name says so")
    lines = (line.strip() for line in io.StringIO(text, newline=None) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    may_be_json = named in (None, FileKind.JSONL)
    if first.startswith("{") and (may_be_json or first == "{" or _is_json(first)):
        return FileKind.JSON if first == "{" else FileKind.JSONL
    if first.startswith("[") and (may_be_json or OBJECTS_IN_ARRAY.match(text.lstrip())):
        return FileKind.JSONL if second and _is_json(first) else FileKind.JSON
    if named is not None:
        return named
    if "\0" not in text and any(mark in first for mark in DELIMITERS):
        return FileKind.CSV
    what = "is of no kind that can be read" if first else "is empty"
    raise invalid_file(file, f"{what}; if it is data, give it a name that ends in {', '.join(KINDS)}")


def _kind_by_name(file: SourceFile) -> FileKind | None:
    name = file.name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return KINDS.get(PurePosixPath(name).suffix)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _delimiter(text: str, whole: bool) -> str:
    """The one that cuts most records into as many fields as the header, and the header into most."""

    def score(delimiter: str) -> tuple[float, int]:
        lengths = _record_lengths(text, delimiter)
        if not whole:
            lengths = lengths[:-1] or lengths  # the last one may be cut
        if not lengths or lengths[0] < 2:
            return (0, 0)
        return (sum(length == lengths[0] for length in lengths) / len(lengths), lengths[0])

    return max(DELIMITERS, key=score)


def _record_lengths(text: str, delimiter: str) -> list[int]:
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    lengths: list[int] = []
    with contextlib.suppress(csv.Error):  # what was read before it counts
        lengths.extend(len(record) for record in islice(records, SNIFFED_RECORDS) if record)
    return lengths
