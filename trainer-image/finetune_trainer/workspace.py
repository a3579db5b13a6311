"""The shared volume: where things lie, and how they are written so that a kill never leaves half of one."""

import ctypes
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux' renameat2(2): paths are relative to the working directory; swap the two names."""

HASHED_BYTES = 8 << 20


@dataclass(frozen=True)
class Workspace:
    root: Path

    @property
    def model(self) -> Path:
        """The foundation model in Hugging Face layout."""
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        """The adapter of an earlier job that training goes on from, if any."""
        return self.root / "adapter"

    @property
    def data(self) -> Path:
        """Tokenized Arrow shards and their manifest."""
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def artifacts(self) -> Path:
        """What is published: adapter or model, tokenizer, model card, SHA256SUMS."""
        return self.root / "artifacts"

    @property
    def report(self) -> Path:
        """data.json, quarantine.jsonl, training.jsonl, evaluation.json."""
        return self.root / "report"


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    _sync(folder)


def write_file(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Writes the whole file, which may come in parts, or leaves the old one: temporary name, fsync, rename.

    What a killed attempt left is removed first: a file has one writer at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_beside(path):
        left.unlink(missing_ok=True)
    temporary = _name_beside(path)
    try:
        with temporary.open("wb") as file:
            file.writelines(_parts(content))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _parts(content: str | bytes | Iterable[bytes]) -> Iterable[bytes]:
    if isinstance(content, str):
        return (content.encode(),)
    return (content,) if isinstance(content, bytes) else content


def hash_file(path: Path, check: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file. `check` is called every few MiB, and may raise to stop."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASHED_BYTES):
            check()
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its place, all synced, if the block succeeds.

    An older folder at `path` is there until the new one is whole. What a killed attempt left is removed first, so
    that halves do not fill the volume: a folder has one writer at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_beside(path):
        shutil.rmtree(left, ignore_errors=True)
    temporary = _name_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            _sync(inner)
        if not path.exists():
            temporary.rename(path)
        elif not _exchange(temporary, path):
            older = path.rename(_name_beside(path))
            temporary.rename(path)
            temporary = older
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def _left_beside(path: Path) -> Iterator[Path]:
    """What has a name that `_name_beside` gives."""
    return path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, so that no moment is without a folder; False where that is not supported (NFS)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:  # not Linux
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)
