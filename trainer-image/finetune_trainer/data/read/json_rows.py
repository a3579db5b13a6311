"""JSON -> rows: one per line, or the elements of an array, which is never held as a whole."""

import json
import re
from collections.abc import Iterator
from typing import Any

from finetune_trainer.data.read import rows
from finetune_trainer.data.read.lines import numbered_lines
from finetune_trainer.data.read.recognise import FileFacts
from finetune_trainer.data.read.rows import (
    MAX_COLUMNS,
    MAX_NESTING,
    RawRow,
    Rejection,
    invalid_file,
    is_unicode,
    too_long,
    undecodable,
)
from finetune_trainer.data.read.streams import open_text
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile

CHUNK_CHARACTERS = 1 << 18
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
"""A whole string, or a mark that is in none; a lone quote opens a string that goes on in the next chunk."""


TOO_DEEP = ("nested too deeply", f"more than {MAX_NESTING} lists and objects within each other")


class RefusedValueError(ValueError):
    """JSON that is none, or whose value would not be what was written; neither text quotes it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def read_jsonl(file: SourceFile, facts: FileFacts) -> Iterator[RawRow | Rejection]:
    """A row per line that is not empty."""
    assert facts.encoding
    for number, line in numbered_lines(file, facts):
        if line is None:
            yield too_long(number)
        elif stripped := line.strip().lstrip("\ufeff"):  # files that were joined have marks in their midst
            yield json_row(number, stripped, facts.encoding)


def read_json(file: SourceFile, facts: FileFacts) -> Iterator[RawRow | Rejection]:
    """A row per element of an array, or per object. Raises UserError for an array without an end."""
    assert facts.encoding
    elements = _Elements(file)
    with open_text(file, facts.compression, facts.encoding, newline=None) as text:
        while chunk := text.read(CHUNK_CHARACTERS):
            for number, element in elements.feed(chunk):
                yield json_row(number, element, facts.encoding)
    elements.close()


def json_row(number: int, text: str, encoding: str) -> RawRow | Rejection:
    """The object that a text is."""
    if not is_unicode(text):
        return undecodable(number, encoding)
    try:
        values = parse_json(text)
    except RefusedValueError as error:
        return Rejection(number, error.reason, error.detail)
    if not isinstance(values, dict):
        return Rejection(number, "invalid JSON", "not an object")
    if len(values) > MAX_COLUMNS:
        return Rejection(number, "too many columns", f"{len(values)}; at most {MAX_COLUMNS}")
    return RawRow(number, values)


def parse_json(text: str) -> Any:
    """The value that a text is. Raises RefusedValueError where it would not be what was written."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise RefusedValueError("invalid JSON", f"at character {error.pos + 1}") from None
    except RecursionError:
        raise RefusedValueError(*TOO_DEEP) from None
    except RefusedValueError:
        raise
    except ValueError:  # a number with thousands of digits
        raise RefusedValueError("invalid JSON", "") from None
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(value) > MAX_NESTING:
        raise RefusedValueError(*TOO_DEEP)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise RefusedValueError("duplicate key", "an object has a key twice: which value counts?")
    return values


def _no_number(_name: str) -> None:
    raise RefusedValueError("not a number", "NaN and Infinity are not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise RefusedValueError("not a number", "a number is too large to be kept")
    return value


def _depth(values: Any) -> int:
    level, depth = [values], 0
    while level:
        depth += 1
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for children in inner for v in children if isinstance(v, (dict, list))]
    return depth


class _Elements:
    """Cuts a growing text into the elements of an array, or into objects that follow each other: by brackets alone, so
    that a broken one costs only itself. Raises UserError where one has no end.
    """

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._text = ""
        """From where the next element begins; `_line` is its line, and up to `_position` it is understood."""
        self._line = 1
        self._position = 0
        self._depth = 0
        self._array: bool | None = None
        self._ended = False

    def feed(self, chunk: str) -> Iterator[tuple[int, str]]:
        """(Line where it begins, text) of the elements that end in the chunk."""
        self._text += chunk
        begin = 0
        while token := TOKEN.search(self._text, self._position):
            whole_string = token.end() - token.start() > 1
            mark = "" if whole_string else token.group()
            if mark == '"':
                break
            self._position = token.end()
            end = self._end(mark, token.start())
            if end is not None:
                yield from self._cut(begin, end, separated=mark == ",")
                begin = self._position
        else:
            self._position = len(self._text)
        self._text = self._text[begin:]
        self._position -= begin
        if self._ended and self._text.strip():
            raise invalid_file(self._file, f"goes on after the end of its array in line {self._next_line()}")
        if len(self._text) > rows.MAX_ROW_CHARACTERS:
            raise self._endless()

    def close(self) -> None:
        """At the end of the text."""
        if self._text.strip() or (self._array and not self._ended):
            raise self._endless()

    def _end(self, mark: str, start: int) -> int | None:
        """Where the element ends, if it does by this mark."""
        base = 1 if self._array else 0
        if self._array and self._depth == base and mark in (",", "]"):
            self._ended = mark == "]"
            self._depth -= self._ended
            return start
        if mark in ("{", "["):
            self._depth += 1
            if self._array is None:
                self._array = mark == "["
                return self._position if self._array else None
        elif mark in ("}", "]") and self._depth > base:
            self._depth -= 1
            return self._position if self._depth == 0 else None
        return None

    def _cut(self, begin: int, end: int, separated: bool) -> Iterator[tuple[int, str]]:
        raw = self._text[begin:end]
        if len(raw) > rows.MAX_ROW_CHARACTERS:
            raise self._endless()
        element = raw.lstrip()
        line = self._line + raw.count("\n", 0, len(raw) - len(element))
        self._line += self._text.count("\n", begin, self._position)
        if (element or separated) and not (self._array and element == "["):
            yield line, element.rstrip()

    def _next_line(self) -> int:
        return self._line + self._text.count("\n", 0, len(self._text) - len(self._text.lstrip()))

    def _endless(self) -> UserError:
        return invalid_file(
            self._file,
            f"is cut off or damaged: what begins in line {self._next_line()} has no end, or is longer than "
            f"{rows.MAX_ROW_CHARACTERS >> 20} Mi characters",
        )
