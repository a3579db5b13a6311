"""Files -> raw rows with their line numbers: JSONL, CSV and Parquet, streamed."""

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
from finetune_api.constants import Reason

from finetune_trainer.errors import UserError
from finetune_trainer.fetch import COMPRESSION, SourceFile

MAX_LINE_BYTES = 16 << 20
"""No row is that long: the file is no JSONL, or a quote was never closed."""

PARQUET_ROWS = 1_000
SNIFFED_BYTES = 1 << 16
PARQUET_MAGIC = b"PAR1"
GZIP_MAGIC = b"\x1f\x8b"
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
DELIMITERS = ",;\t"

csv.field_size_limit(MAX_LINE_BYTES)


class FileKind(StrEnum):
    JSONL = "JSONL"
    CSV = "CSV"
    PARQUET = "Parquet"

    @property
    def tabular(self) -> bool:
        """All rows have the same columns."""
        return self is not FileKind.JSONL


KINDS = {
    ".jsonl": FileKind.JSONL,
    ".ndjson": FileKind.JSONL,
    ".json": FileKind.JSONL,
    ".csv": FileKind.CSV,
    ".tsv": FileKind.CSV,
    ".parquet": FileKind.PARQUET,
}


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in the file; `line` is where it begins, from 1 (Parquet: its number)."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a row is not used. Neither text quotes the row."""

    line: int
    reason: str
    """One of few: rejections are counted by it."""
    detail: str = ""


def is_unicode(text: str) -> bool:
    """False for lone surrogates (of JSON escapes, or for bytes that are not UTF-8): they are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_kind(file: SourceFile) -> FileKind:
    """By the extension of its name, failing that by its content. Raises UserError if it is none of the three."""
    suffix = PurePosixPath(file.name.removesuffix(COMPRESSION)).suffix.lower()
    return KINDS.get(suffix) or _sniff(file)


def read_rows(file: SourceFile, columns: Collection[str] | None = None) -> Iterator[RawRow | Rejection]:
    """All rows in their order; empty lines are none. `columns`: those that are wanted, where others can be spared.

    Raises UserError (DataInvalid) for a file that cannot be read.
    """
    match file_kind(file):
        case FileKind.PARQUET:
            yield from _read_parquet(file, columns)
        case FileKind.CSV:
            yield from _read_csv(file)
        case FileKind.JSONL:
            yield from _read_jsonl(file)


def _invalid(file: SourceFile, what: str) -> UserError:
    return UserError(Reason.DATA_INVALID, f"{file.field}: {file.name} {what}")


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return cast(BinaryIO, gzip.open(path, "rb")) if compressed else path.open("rb")


def _sniff(file: SourceFile) -> FileKind:
    try:
        with _open(file.path) as opened:
            start = opened.read(SNIFFED_BYTES).removeprefix(UTF8_BOM).lstrip()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from None
    if start.startswith(PARQUET_MAGIC):
        return FileKind.PARQUET
    if start.startswith((b"{", b"[")):
        return FileKind.JSONL
    if b"\0" not in start and any(mark.encode() in start.partition(b"\n")[0] for mark in DELIMITERS):
        return FileKind.CSV
    raise _invalid(file, f"is neither JSONL, CSV nor Parquet; name it {', '.join(KINDS)} if it is")


def _unreadable(file: SourceFile, error: Exception) -> Exception:
    """A damaged archive is the user's; a disk that fails is not."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return _invalid(file, "is damaged: its gzip stream cannot be read to the end")


def _lines(file: SourceFile) -> Iterator[bytes]:
    """The lines with their ends, without a byte order mark. Raises UserError for UTF-16 and endless lines."""
    try:
        with _open(file.path) as opened:
            number = 0
            while line := opened.readline(MAX_LINE_BYTES):
                number += 1
                if number == 1:
                    if line.startswith(UTF16_BOMS):
                        raise _invalid(file, "is UTF-16: save it as UTF-8")
                    line = line.removeprefix(UTF8_BOM)
                if len(line) == MAX_LINE_BYTES:
                    raise _invalid(file, f"line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: is it one row?")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from None


def _read_jsonl(file: SourceFile) -> Iterator[RawRow | Rejection]:
    first = True
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        if first and line.lstrip().startswith(b"["):
            raise _invalid(file, "is a JSON array: write one object per line, for example with jq -c '.[]'")
        first = False
        yield _json_row(number, line)


def _json_row(number: int, line: bytes) -> RawRow | Rejection:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        return Rejection(number, "not UTF-8")
    except json.JSONDecodeError as error:
        return Rejection(number, "invalid JSON", f"at character {error.pos + 1}")
    except (ValueError, RecursionError):  # a number with thousands of digits, brackets nested as deeply
        return Rejection(number, "invalid JSON")
    if not isinstance(values, dict):
        return Rejection(number, "invalid JSON", "not an object")
    return RawRow(number, values)


def _read_csv(file: SourceFile) -> Iterator[RawRow | Rejection]:
    # a byte that is not UTF-8 becomes a surrogate, so that only its own row is rejected
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(file))
    head = next(lines, "")
    reader = csv.reader(chain([head], lines), delimiter=max(DELIMITERS, key=head.count), strict=True)
    header = next(_csv_records(file, reader), None)
    if header is None:
        return
    if isinstance(header, Rejection) or len(set(header[1])) < len(header[1]):
        raise _invalid(file, "line 1 is no header: it must name every column once")
    names = [name.strip() for name in header[1]]
    for record in _csv_records(file, reader):
        if isinstance(record, Rejection):
            yield record
        elif len(record[1]) != len(names):
            yield Rejection(record[0], "invalid CSV", f"{len(record[1])} fields where the header has {len(names)}")
        elif not all(map(is_unicode, record[1])):
            yield Rejection(record[0], "not UTF-8")
        else:
            yield RawRow(record[0], dict(zip(names, record[1], strict=True)))


def _csv_records(file: SourceFile, reader: Any) -> Iterator[tuple[int, list[str]] | Rejection]:
    """(Line where it begins, fields) of each record that is not empty."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error) or "end of data" in str(error):
                raise _invalid(file, f"line {line} opens a quote that is never closed") from None
            yield Rejection(line, "invalid CSV", "a quote inside a field must be doubled and the field quoted")
            continue
        if any(fields):
            yield line, fields


def _read_parquet(file: SourceFile, columns: Collection[str] | None) -> Iterator[RawRow | Rejection]:
    number = 0
    try:
        with pq.ParquetFile(file.path) as parquet:
            names = parquet.schema_arrow.names
            wanted = names if columns is None else [name for name in names if name in columns]
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=wanted or names):  # without columns no rows
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(number, values)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own have none
            raise
        raise _invalid(file, f"cannot be read as Parquet after row {number}: is the file whole?") from None
