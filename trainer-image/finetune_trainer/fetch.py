"""Locations -> files on this machine. What is mounted is read in place, everything else is downloaded."""

import dataclasses
import hashlib
import posixpath
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from finetune_api.constants import Reason
from finetune_api.plan import PlanSource
from fsspec.callbacks import Callback

from finetune_trainer.errors import StageError, UserError
from finetune_trainer.storage import display_uri, filesystem, scheme, storage_errors
from finetune_trainer.telemetry.watch import Watch

COPY_BYTES = 8 << 20
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
FOREIGN_NAMES = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the data."""

WILDCARDS = re.compile(r"[*?\[]")


@dataclass
class Position:
    """How many bytes of a file its reader has read."""

    bytes: int = 0


@dataclass(frozen=True)
class SourceFile:
    """A data file on this machine and how people know it."""

    field: str
    """Where its source stands in the spec: dataset.sources[0]."""
    uri: str
    path: Path
    position: Position = dataclasses.field(default_factory=Position, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    def at(self, line: int) -> str:
        """A place in the file, for error messages."""
        return f"{self.field}: {self.name} line {line}"


class FoundFiles(NamedTuple):
    """The files of a source, in the order of their names, and the URIs of those beside them that are no data."""

    files: list[SourceFile]
    ignored: list[str]


def fetch_source(source: PlanSource, folder: Path, watch: Watch) -> FoundFiles:
    """The files of a source: itself, all data files of the folder that it names, or all that its pattern fits.

    Downloads go to `folder`. Raises UserError (DataNotFound) if there is none or it may not be read, or (DataInvalid)
    if it is outside of what was mounted; StageError for network trouble, Interrupted.
    """
    location, uri = source.location, display_uri(source.location)
    if scheme(location) == "hf" and not location.uri.startswith("hf://datasets/"):
        raise UserError(
            Reason.DATA_NOT_FOUND, f"{source.field}: {uri} names no file of a dataset: hf://datasets/owner/name/path"
        )
    with storage_errors(location, Reason.DATA_NOT_FOUND, source.field):
        files, path = filesystem(location)
        if any("**" in part and part != "**" for part in path.split("/")):
            raise UserError(
                Reason.DATA_NOT_FOUND,
                f"{source.field}: {uri} is no pattern: ** stands for folders, alone between slashes",
            )
        root, names, ignored = _find(files, path, listed=not _is_http(location.uri))
        shown_root = uri.removesuffix(path.removeprefix(root).lstrip("/"))
        for name in names + ignored:
            if ".." in PurePosixPath(name).parts:
                raise UserError(Reason.DATA_INVALID, f"{source.field}: a name leads out of its folder: {name}")
        if not names:
            suffixes = ", ".join(DATA_SUFFIXES)
            what = f"the folder {uri} holds no {suffixes} file" if root == path else f"{uri} fits no file"
            raise UserError(Reason.DATA_NOT_FOUND, f"{source.field}: {what}")
        found = []
        for name in names:
            remote, shown = _join(root, name), _join(shown_root, name)
            local = Path(remote)
            if location.path is None:
                # a server's names may be too long for a file, the same but for a slash, or a way out of the folder
                local = folder / hashlib.sha256(remote.encode()).hexdigest()
                download(files, remote, local, watch)
            elif not local.is_file():
                raise FileNotFoundError(remote)
            else:
                _check_inside_mount(source, local)
            found.append(SourceFile(source.field, shown, local))
    return FoundFiles(found, [_join(shown_root, name) for name in ignored])


def _join(folder: str, name: str) -> str:
    return f"{folder}{'' if folder.endswith('/') else '/'}{name}" if name else folder


def _find(files: Any, path: str, listed: bool) -> tuple[str, list[str], list[str]]:
    """(Root, relative paths of data files below it, those of other files), sorted; an empty path is the root itself.

    A name that exists is no pattern, whatever characters it has. What fits a pattern is data, unless it is hidden."""
    if listed and files.isdir(path):
        names = list(list_files(files, path))
        data = [name for name in names if _is_data(name)]
        return path, data, sorted({*names} - {*data})
    wildcard = WILDCARDS.search(path) if listed else None
    if wildcard is None or files.isfile(path):
        return path, [""], []
    root = path[: wildcard.start()].rpartition("/")[0]
    found = files.glob(path, detail=True).items()
    # a link on this machine is of no type
    fitting = {
        name.removeprefix(root).lstrip("/")
        for name, facts in found
        if facts["type"] == "file" or (facts["type"] != "directory" and files.isfile(name))
    }
    hidden = {name for name in fitting if _is_hidden(name)}
    return root, sorted(fitting - hidden), sorted(hidden)


def _is_data(name: str) -> bool:
    plain = name.lower()
    for suffix in COMPRESSION_SUFFIXES:
        plain = plain.removesuffix(suffix)
    path = PurePosixPath(plain)
    return path.suffix in DATA_SUFFIXES and path.name not in FOREIGN_NAMES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _check_inside_mount(source: PlanSource, file: Path) -> None:
    """In a volume that others write to, a link may lead to what this pod alone can read."""
    location = source.location
    if location.path is None or scheme(location) == "file":
        return
    inner = posixpath.normpath(f"/{location.uri.partition('://')[2].partition('/')[2]}").lstrip("/")
    mount = Path(location.path.rstrip("/").removesuffix(inner))
    if not file.resolve().is_relative_to(mount.resolve()):
        raise UserError(
            Reason.DATA_INVALID,
            f"{source.field}: {display_uri(location)} holds a link that leads out of its volume: {file.name}",
        )


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
