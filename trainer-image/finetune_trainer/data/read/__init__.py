"""Files -> raw rows with their line numbers, streamed: memory does not grow with the file."""

from collections.abc import Collection, Iterator, Sequence

from finetune_trainer.data.read.columnar import read_columnar
from finetune_trainer.data.read.csv_rows import read_csv
from finetune_trainer.data.read.json_rows import RefusedValueError, parse_json, read_json, read_jsonl
from finetune_trainer.data.read.lines import read_text
from finetune_trainer.data.read.recognise import FileFacts, FileKind, recognise_file
from finetune_trainer.data.read.rows import RawRow, Rejection, is_unicode
from finetune_trainer.fetch import SourceFile

__all__ = [
    "FileFacts",
    "FileKind",
    "RawRow",
    "RefusedValueError",
    "Rejection",
    "first_with_rows",
    "is_unicode",
    "parse_json",
    "read_rows",
    "recognise_file",
]


def read_rows(file: SourceFile, columns: Collection[str] | None = None) -> Iterator[RawRow | Rejection]:
    """All rows in their order; empty lines are none. `columns`: those that are wanted, where others can be spared.
    `file.position` tells meanwhile how much of it is read.

    Raises UserError (DataInvalid) for a file that cannot be read.
    """
    facts = recognise_file(file)
    file.position.bytes = 0
    match facts.kind:
        case FileKind.JSONL:
            yield from read_jsonl(file, facts)
        case FileKind.JSON:
            yield from read_json(file, facts)
        case FileKind.CSV:
            yield from read_csv(file, facts)
        case FileKind.TEXT:
            yield from read_text(file, facts)
        case _:
            yield from read_columnar(file, facts, columns)


def first_with_rows(files: Sequence[SourceFile]) -> SourceFile:
    """The first file that has a row at all, if any: writers of many parts leave some empty."""
    return next((file for file in files if next(read_rows(file), None)), files[0])
