"""CSV and its relatives -> rows; the first record names the columns."""

import csv
from collections.abc import Iterator
from typing import Any

from finetune_trainer.data.read import rows
from finetune_trainer.data.read.lines import NUL_BYTES, numbered_lines
from finetune_trainer.data.read.recognise import FileFacts
from finetune_trainer.data.read.rows import RawRow, Rejection, check_columns, invalid_file, is_unicode, undecodable
from finetune_trainer.fetch import SourceFile

csv.field_size_limit(rows.MAX_ROW_CHARACTERS)


def read_csv(file: SourceFile, facts: FileFacts) -> Iterator[RawRow | Rejection]:
    """A row per record that is not empty. Raises UserError for a header that is none and a quote without an end."""
    assert facts.encoding and facts.delimiter
    reader = csv.reader(_lines(file, facts), delimiter=facts.delimiter, strict=True)
    records = _records(file, reader)
    header = next(records, None)
    if header is None:
        return
    if isinstance(header, Rejection) or not all(map(is_unicode, header[1])):
        raise invalid_file(file, "line 1 is no header: it must name every column")
    names = [name.strip() for name in header[1]]
    check_columns(file, names)
    for record in records:
        if isinstance(record, Rejection):
            yield record
            continue
        line, fields = record
        if len(fields) != len(names):
            yield Rejection(line, "invalid CSV", f"{len(fields)} fields where the header has {len(names)}")
        elif not all(map(is_unicode, fields)):
            yield undecodable(line, facts.encoding)
        elif any("\0" in field for field in fields):
            yield Rejection(line, *NUL_BYTES)
        else:
            yield RawRow(line, dict(zip(names, fields, strict=True)))


def _lines(file: SourceFile, facts: FileFacts) -> Iterator[str]:
    for number, line in numbered_lines(file, facts):
        if line is None:  # whether a quote is open behind it nobody knows
            raise invalid_file(
                file, f"line {number} is longer than {rows.MAX_ROW_CHARACTERS >> 20} Mi characters: is it one row?"
            )
        yield line


def _records(file: SourceFile, reader: Any) -> Iterator[tuple[int, list[str]] | Rejection]:
    """(Line where it begins, fields) of each record that is not empty."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error) or "end of data" in str(error):
                raise invalid_file(file, f"line {line} opens a quote that is never closed") from None
            yield Rejection(line, "invalid CSV", "a quote inside a field must be doubled and the field quoted")
            continue
        if any(fields):
            yield line, fields
