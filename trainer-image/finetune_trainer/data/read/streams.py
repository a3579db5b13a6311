"""The bytes of a file without their compression, and its characters without their encoding."""

import codecs
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
from charset_normalizer import from_bytes

from finetune_trainer.data.read.rows import MAX_DECOMPRESSED_BYTES, MAX_RATIO, UNCHECKED_BYTES, invalid_file
from finetune_trainer.fetch import SourceFile

BUFFER_BYTES = 1 << 20

XZ_MEMORY = 128 << 20
"""What `xz -9` compresses takes half of it."""

UNDECODABLE = "\udcff"
"""Stands for bytes that are no character in the file's encoding; `is_unicode` finds it."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

LEGACY_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "mac_roman"),
    *("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"),
)
"""Those that files are still written in. Rare ones would only be mistaken for them."""

LEGACY_SAMPLE_BYTES = 1 << 16
LEGACY_BYTES = 8
"""Fewer bytes that are not UTF-8 are more likely damage than an encoding."""

codecs.register_error("finetune-mark", lambda error: (UNDECODABLE, error.end))  # type: ignore[attr-defined]


class Compression(StrEnum):
    """Its value is Arrow's name for the codec, which has none for xz."""

    GZIP = "gzip"
    ZSTD = "zstd"
    BZ2 = "bz2"
    XZ = "xz"


def recognise_compression(start: bytes) -> Compression | None:
    """By the first bytes of a file."""
    if start.startswith(b"\x1f\x8b"):
        return Compression.GZIP
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F):
        return Compression.ZSTD  # a frame, or one that is skipped, as parallel compressors put it first
    if start.startswith(b"BZh") and start[4:10] in (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90"):
        return Compression.BZ2
    return Compression.XZ if start.startswith(b"\xfd7zXZ\x00") else None


def recognise_encoding(start: bytes, whole: bool) -> str:
    """The codec of a text that begins with these bytes, which are its `whole`, or not.

    By its byte order mark, else UTF-8, if need be with damage; another one only where what is not UTF-8 cannot be
    damage and is text in that. The same bytes always give the same answer.
    """
    for mark, codec in BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return codec
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=whole)
    except UnicodeDecodeError:
        return _legacy_encoding(start) or "utf-8"
    return "utf-8"


def _legacy_encoding(start: bytes) -> str | None:
    sample = start[:LEGACY_SAMPLE_BYTES]
    sample = sample[: sample.rfind(b"\n") + 1] or sample  # no character is cut
    text = sample.decode("utf-8", "surrogateescape")
    wrong = sum("\udc80" <= character <= "\udcff" for character in text)
    right = sum(not character.isascii() for character in text) - wrong  # in GB18030 up to a third, by chance
    if wrong < max(LEGACY_BYTES, 2 * right) or any(map(_is_utf8, sample.splitlines())):
        return None
    found = from_bytes(sample, cp_isolation=list(LEGACY_ENCODINGS)).best()
    if found is None or found.encoding not in LEGACY_ENCODINGS:
        return None
    # of encodings that agree on the sample, the first listed is the most usual
    return next(codec for codec in LEGACY_ENCODINGS if _decoded(sample, codec) == str(found))


def _is_utf8(line: bytes) -> bool:
    """Whether a line is so beyond chance: then the file is a mixture, and no other encoding is right for all of it."""
    text = _decoded(line, "utf-8")
    return text is not None and sum(not character.isascii() for character in text) >= LEGACY_BYTES // 2


def _decoded(sample: bytes, codec: str) -> str | None:
    try:
        return sample.decode(codec)
    except UnicodeDecodeError:
        return None


class _XzStream:
    """Like Arrow's streams: all members of a file, each with its end and its sums. Raises LZMAError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._member = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            chunk = b""
            if self._member.eof:
                chunk = self._next_member()
                if not chunk:
                    break
                self._member = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            elif self._member.needs_input:
                chunk = self._file.read(BUFFER_BYTES)
                if not chunk:
                    raise lzma.LZMAError("the file is cut off")
            data = self._member.decompress(chunk, size)
        return data

    def _next_member(self) -> bytes:
        """Its beginning, behind the zeros that may stand between two."""
        found = self._member.unused_data.lstrip(b"\0")
        while not found and (chunk := self._file.read(BUFFER_BYTES)):
            found = chunk.lstrip(b"\0")
        return found

    def tell(self) -> int:
        """Of the compressed bytes."""
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class _Plain(io.FileIO):
    """Notes how much of it is read."""

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file.path)
        self._position = file.position

    def readinto(self, buffer: Any, /) -> int:
        count: int = super().readinto(buffer)
        self._position.bytes += count
        return count


class _Decompressed(io.RawIOBase):
    """Raises UserError for more bytes than a file of text can hold."""

    def __init__(self, file: SourceFile, compression: Compression) -> None:
        self._file = file
        self._source = _XzStream(file.path) if compression is Compression.XZ else pa.OSFile(str(file.path))
        self._stream = (
            self._source if compression is Compression.XZ else pa.CompressedInputStream(self._source, compression.value)
        )
        self._most = min(MAX_DECOMPRESSED_BYTES, max(UNCHECKED_BYTES, MAX_RATIO * file.path.stat().st_size))
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        chunk = self._stream.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self._read += len(chunk)
        self._file.position.bytes = self._source.tell()
        if self._read > self._most:
            raise invalid_file(
                self._file,
                f"holds more than {self._most >> 20} MiB, which is too much for its size: is it a decompression bomb? "
                "Decompress it first if it is not",
            )
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def open_bytes(file: SourceFile, compression: Compression | None) -> Iterator["io.BufferedReader[Any]"]:
    """Its bytes, decompressed. Raises UserError (DataInvalid) where the archive is damaged, cut off or a bomb."""
    with reading_errors(file, compression):
        raw: io.RawIOBase = _Decompressed(file, compression) if compression else _Plain(file)
        with io.BufferedReader(raw, BUFFER_BYTES) as opened:
            yield opened


@contextmanager
def open_text(
    file: SourceFile, compression: Compression | None, encoding: str, newline: str | None = ""
) -> Iterator[io.TextIOWrapper]:
    """Its characters, with UNDECODABLE for what is none; lines end with CR, LF or CRLF and keep what they end with,
    with `newline` None LF.
    """
    with open_bytes(file, compression) as opened:
        yield io.TextIOWrapper(opened, encoding, errors="finetune-mark", newline=newline)


@contextmanager
def reading_errors(file: SourceFile, compression: Compression | None) -> Iterator[None]:
    """A damaged archive is the user's; a disk that fails is not."""
    try:
        yield
    except (OSError, pa.ArrowException, lzma.LZMAError) as error:
        if compression is None or getattr(error, "errno", None) is not None:  # Arrow's own have none
            raise
        if "limit" in str(error) and isinstance(error, lzma.LZMAError):
            what = f"takes more than {XZ_MEMORY >> 20} MiB of memory to decompress: compress it by xz -9 or less"
            raise invalid_file(file, what) from None
        raise invalid_file(file, f"is damaged: its {compression.value} stream cannot be read to the end") from None
