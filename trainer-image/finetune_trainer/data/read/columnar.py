"""Parquet and Arrow -> rows, some at a time."""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.data.read.recognise import FileFacts, FileKind
from finetune_trainer.data.read.rows import (
    MAX_RATIO,
    UNCHECKED_ROWS,
    RawRow,
    Rejection,
    check_columns,
    invalid_file,
    undecodable,
)
from finetune_trainer.data.read.streams import BUFFER_BYTES
from finetune_trainer.fetch import SourceFile

ROWS_AT_ONCE = 1_000
BYTES_AT_ONCE = 8 << 20
"""Less rows at once if they are long; as Python objects they take several times as much."""

CONVERSION_ERRORS = (ValueError, OverflowError, pa.ArrowException)


def read_columnar(file: SourceFile, facts: FileFacts, columns: Collection[str] | None) -> Iterator[RawRow | Rejection]:
    """All rows, with those `columns` that there are; with all if there are none, so that they can be named.

    Raises UserError for a damaged file.
    """
    read = _parquet_batches if facts.kind is FileKind.PARQUET else _arrow_batches
    batches = read(file, facts.kind, columns)
    number = 0
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # Arrow's own have none
                raise
            raise invalid_file(
                file, f"cannot be read as {facts.kind.value} after row {number}: is the file whole?"
            ) from None
        if batch is None:
            return
        yield from _rows(batch, number + 1)
        number += batch.num_rows


def _rows(batch: Any, first: int) -> Iterator[RawRow | Rejection]:
    try:
        for number, values in enumerate(_values(batch), start=first):
            yield RawRow(number, values)
    except CONVERSION_ERRORS:  # before the first one: one by one, so that a bad one costs only itself
        for place in range(batch.num_rows):
            yield _row(batch.slice(place, 1), first + place)


def _values(batch: Any) -> list[dict[str, Any]]:
    nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
    rows: list[dict[str, Any]] = batch.to_pylist()
    return [{**row, **{name: _without_nulls(row[name]) for name in nested}} for row in rows] if nested else rows


def _without_nulls(value: Any) -> Any:
    """Objects without keys that are null. Such a file gives every object the keys that any other one has, so that a
    null and a key that was never written are the same there.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _row(batch: Any, number: int) -> RawRow | Rejection:
    try:
        return RawRow(number, _values(batch)[0])
    except UnicodeDecodeError:
        return undecodable(number, "utf-8")
    except CONVERSION_ERRORS:
        return Rejection(number, "invalid value", "Python cannot hold one of its values, such as a date")


def _parquet_batches(file: SourceFile, _kind: FileKind, columns: Collection[str] | None) -> Iterator[Any]:
    # a buffer: without one, a whole column of a row group is in memory
    with pq.ParquetFile(file.path, buffer_size=BUFFER_BYTES, page_checksum_verification=True) as parquet:
        facts = parquet.metadata
        _check_rows(file, facts.num_rows)
        size = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
        wanted = _wanted(file, parquet.schema_arrow.names, columns)
        rows, file_size = 0, file.path.stat().st_size
        for batch in parquet.iter_batches(_rows_at_once(size, facts.num_rows), columns=wanted):
            rows += batch.num_rows
            file.position.bytes = file_size * rows // facts.num_rows
            yield batch


def _arrow_batches(file: SourceFile, kind: FileKind, columns: Collection[str] | None) -> Iterator[Any]:
    with pa.memory_map(str(file.path)) as opened:
        if kind is FileKind.ARROW:
            reader = pa.ipc.open_file(opened)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(opened)
            batches = iter(reader)
        wanted = _wanted(file, reader.schema.names, columns)
        rows = 0
        for whole in batches:
            rows += whole.num_rows
            _check_rows(file, rows)
            file.position.bytes += whole.nbytes
            batch = whole.select(wanted)
            _check_buffers(batch)
            step = _rows_at_once(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, step):
                yield batch.slice(start, step)


def _wanted(file: SourceFile, names: list[str], columns: Collection[str] | None) -> list[str]:
    """Never none: without columns there would be no rows."""
    check_columns(file, names)
    return (names if columns is None else [name for name in names if name in columns]) or names


def _rows_at_once(size: int, rows: int) -> int:
    """`size`: bytes of so many `rows`, as the file says."""
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * rows // max(size, 1)))


def _check_rows(file: SourceFile, rows: int) -> None:
    size = file.path.stat().st_size
    if rows > max(UNCHECKED_ROWS, MAX_RATIO * size):
        raise invalid_file(file, f"claims {rows} rows in {size} bytes: is it a decompression bomb?")


def _check_buffers(batch: Any) -> None:
    """Raises ArrowInvalid where reading would leave the buffers. Text that is not UTF-8 is found row by row."""
    for column in batch.columns:
        text = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        (column.view(text) if text else column).validate(full=True)
