"""Lines of text, and plain text as rows."""

from collections.abc import Iterator

from finetune_trainer.data.read import rows
from finetune_trainer.data.read.recognise import FileFacts
from finetune_trainer.data.read.rows import RawRow, Rejection, is_unicode, too_long, undecodable
from finetune_trainer.data.read.streams import open_text
from finetune_trainer.fetch import SourceFile

LINE_ENDS = ("\n", "\r")
TEXT_COLUMN = "text"
NUL_BYTES = ("NUL bytes", "is the file damaged, or no text?")


def numbered_lines(file: SourceFile, facts: FileFacts) -> Iterator[tuple[int, str | None]]:
    """The lines with what they end with, from 1; None instead of one that is too long to be a row."""
    assert facts.encoding
    with open_text(file, facts.compression, facts.encoding) as text:
        number = 0
        while line := text.readline(rows.MAX_ROW_CHARACTERS):
            number += 1
            if len(line) < rows.MAX_ROW_CHARACTERS or line.endswith(LINE_ENDS):
                yield number, line
                continue
            while (rest := text.readline(rows.MAX_ROW_CHARACTERS)) and not rest.endswith(LINE_ENDS):
                pass
            yield number, None


def read_text(file: SourceFile, facts: FileFacts) -> Iterator[RawRow | Rejection]:
    """A row per line that is not empty, as `datasets` reads text; its column is `text`."""
    assert facts.encoding
    for number, line in numbered_lines(file, facts):
        if line is None:
            yield too_long(number)
        elif not line.strip():
            continue
        elif not is_unicode(line):
            yield undecodable(number, facts.encoding)
        elif "\0" in line:
            yield Rejection(number, *NUL_BYTES)
        else:
            yield RawRow(number, {TEXT_COLUMN: line.rstrip("\r\n")})
