"""Locations -> files on this machine. What is mounted is read in place, everything else is downloaded."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.constants import Reason
from finetune_api.plan import PlanSource
from fsspec.callbacks import Callback

from finetune_trainer.errors import StageError, UserError
from finetune_trainer.storage import display_uri, filesystem, scheme, storage_errors
from finetune_trainer.telemetry.watch import Watch

COPY_BYTES = 8 << 20
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSION = ".gz"


@dataclass(frozen=True)
class SourceFile:
    """A data file on this machine and how people know it."""

    field: str
    """Where its source stands in the spec: dataset.sources[0]."""
    uri: str
    path: Path

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    def at(self, line: int) -> str:
        """A place in the file, for error messages."""
        return f"{self.field}: {self.name} line {line}"


def fetch_source(source: PlanSource, folder: Path, watch: Watch) -> list[SourceFile]:
    """The files of a source: itself, or all data files of the folder that it names, in the order of their names.

    Downloads go to `folder`. Raises UserError (DataNotFound) if there is none or it may not be read, StageError
    for network trouble, Interrupted.
    """
    location, uri = source.location, display_uri(source.location)
    if scheme(location) == "hf" and not location.uri.startswith("hf://datasets/"):
        raise UserError(
            Reason.DATA_NOT_FOUND, f"{source.field}: {uri} names no file of a dataset: hf://datasets/owner/name/path"
        )
    with storage_errors(location, Reason.DATA_NOT_FOUND, source.field):
        files, path = filesystem(location)
        names = _data_files(files, path) if not _is_http(location.uri) and files.isdir(path) else None
        if names is not None and not names:
            raise UserError(
                Reason.DATA_NOT_FOUND, f"{source.field}: the folder {uri} holds no {', '.join(DATA_SUFFIXES)} file"
            )
        found = []
        for name in names if names is not None else [""]:
            remote = f"{path.rstrip('/')}/{name}" if name else path
            shown = f"{uri.rstrip('/')}/{name}" if name else uri
            local = Path(remote)
            if location.path is None:
                local = folder / (name or PurePosixPath(shown).name)
                download(files, remote, local, watch)
            elif not local.is_file():
                raise FileNotFoundError(remote)
            found.append(SourceFile(source.field, shown, local))
    return found


def _data_files(files: Any, path: str) -> list[str]:
    """Relative paths of the data files below `path`, sorted; hidden ones and those in hidden folders are none."""
    return [
        name
        for name in list_files(files, path)
        if PurePosixPath(name.removesuffix(COMPRESSION)).suffix.lower() in DATA_SUFFIXES
        and not any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
    ]


def list_files(files: Any, path: str, max_depth: int | None = None) -> dict[str, dict[str, Any]]:
    """Relative path -> the filesystem's facts about it, for all files below a folder, sorted by path."""
    listing = files.find(path, maxdepth=max_depth, detail=True)
    root = path.rstrip("/")
    return {name.removeprefix(root).lstrip("/"): facts for name, facts in sorted(listing.items())}


def download(files: Any, remote: str, target: Path, watch: Watch) -> None:
    """Copies one file to `target`; a file that is already there is whole and kept.

    Raises the filesystem's errors (see `storage_errors`), StageError if bytes are missing, Interrupted.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    size = files.info(remote).get("size")
    counted = _Counted(watch, size or 0)
    if "file" in files.protocol:
        _copy(Path(remote), partial, counted.relative_update)
    else:
        files.get_file(remote, str(partial), callback=counted)
    # a server may send https compressed, so only the others' sizes can be compared
    if size is not None and "https" not in files.protocol and partial.stat().st_size != size:
        raise StageError(Reason.STAGE_FAILED, f"{target.name} arrived incomplete; it will be tried again")
    partial.replace(target)


class _Counted(Callback):  # type: ignore[misc]  # fsspec has no types
    """Tells a watch about bytes; raising here ends the transfer."""

    def __init__(self, watch: Watch, total: int) -> None:
        super().__init__()
        self._watch, self._total, self._done = watch, total, 0

    def relative_update(self, inc: int = 1) -> None:
        self._done += inc
        self._watch.advance(self._done, self._total or self._done)


def _copy(source: Path, target: Path, count: Callable[[int], None]) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(COPY_BYTES):
            writer.write(chunk)
            count(len(chunk))


def _is_http(uri: str) -> bool:
    return uri.startswith(("https://", "http://"))


def remove_folder(folder: Path) -> None:
    """Removes what a download left, if anything."""
    shutil.rmtree(folder, ignore_errors=True)
