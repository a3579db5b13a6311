"""What reading a file gives, and the limits beyond which a file or a row is refused."""

from dataclasses import dataclass
from typing import Any

from finetune_api.constants import Reason

from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile

MAX_ROW_CHARACTERS = 16 << 20
"""No row is that long: the file is another kind than it seems, or a quote was never closed."""

MAX_COLUMNS = 4096
MAX_NESTING = 100
"""Objects and lists within each other in one row."""

MAX_RATIO = 200
"""Bytes that a compressed byte, and rows that a byte of a columnar file, may stand for. Text shrinks to a tenth, text
that repeats itself to a hundredth."""

UNCHECKED_BYTES = 1 << 30
UNCHECKED_ROWS = 1 << 24
"""As long as it is less than this, a file may hold any multiple of its size."""

MAX_DECOMPRESSED_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in the file; `line` is where it begins, from 1 (Parquet, Arrow: its number)."""

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
    """False for lone surrogates (of JSON escapes, or for bytes that cannot be decoded): they are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def too_long(line: int) -> Rejection:
    return Rejection(line, "row is too long", f"more than {MAX_ROW_CHARACTERS >> 20} Mi characters: is it one row?")


def undecodable(line: int, encoding: str) -> Rejection:
    return Rejection(line, f"not {encoding.removesuffix('-sig').upper()}")


def invalid_file(file: SourceFile, what: str) -> UserError:
    """For a file that cannot be read, or not to its end."""
    return UserError(Reason.DATA_INVALID, f"{file.field}: {file.name} {what}")


def check_columns(file: SourceFile, names: list[str]) -> None:
    """Raises UserError for a table whose columns cannot be told apart, or with too many."""
    if len(names) > MAX_COLUMNS:
        raise invalid_file(file, f"has {len(names)} columns; at most {MAX_COLUMNS} can be read")
    if len(set(names)) < len(names):
        raise invalid_file(file, "names a column twice: rename one")
