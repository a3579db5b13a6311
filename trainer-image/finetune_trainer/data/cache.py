"""Prepared data of earlier jobs, by what it was made from: the same sources, settings, model's tokenizer and code.

    <cache>/<sources key>-<tokenizer key>/data/...  report/...  SHA256SUMS

The files are hard links to those of the workspaces, so they take no space of their own, and live on in a workspace
when the cache forgets them. Where a volume has no hard links there is no cache.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import finetune_api
from finetune_api.plan import Plan
from finetune_api.report import DATA_REPORT, QUARANTINE, REVIEW, DataReport
from pydantic import ValidationError

from finetune_trainer.data.personal_data.protect import read_key
from finetune_trainer.data.pipeline import OpenedSource
from finetune_trainer.data.store import DataManifest, read_manifest
from finetune_trainer.errors import StageError
from finetune_trainer.fetch import SourceFile
from finetune_trainer.publish.sums import SUMS, write_sums
from finetune_trainer.workspace import Workspace, hash_file, new_folder, write_file

logger = logging.getLogger(__name__)

KEPT_ENTRIES = 16
"""The least recently used go."""

REPORTS = (DATA_REPORT, QUARANTINE, REVIEW)
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*chat_template*", "*.model", "*.tiktoken", "*.jinja")
PLACES: Any = {
    "review": {"decisions"},
    "sources": True,
    "validation": {"sources"},
    "test": {"sources"},
    "personal_data": {"key_dir"},
}
"""Of the dataset's settings: where things are, not what they are."""

LIBRARIES = (
    *("ftfy", "google-re2", "phonenumbers", "pycld2", "python-stdnum", "rensa", "scikit-learn", "tokenizers"),
    "transformers",
)
"""Whose next version may read, clean or encode a text in another way."""


class Found(NamedTuple):
    manifest: DataManifest
    report: DataReport


def hash_sources(
    plan: Plan, sources: Sequence[OpenedSource], hashes: dict[SourceFile, str], decisions: dict[SourceFile, str]
) -> str:
    """Of all that decides which rows there are and what they say: files, settings, and the code that reads them.

    hashes, decisions: of the files of the sources, and of those of dataset.review.decisions.
    """
    dataset = plan.dataset
    secret = read_key(dataset.personal_data) if dataset.personal_data else None
    settings = dataset.model_dump(mode="json", exclude=PLACES)
    files = [
        [file.field, file.uri, hashes[file], opened.format.value, opened.source.columns.to_dict(), list(opened.ignored)]
        for opened in sources
        for file in opened.files
    ]
    files += [[file.field, file.uri, digest] for file, digest in decisions.items()]
    parts = [plan.task.value, plan.dpo is not None, plan.training.max_length, settings, files, _hash_code()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16, key=secret[:64] if secret else b"").hexdigest()


def hash_tokenizer(model: Path) -> str:
    """Of the files that decide which tokens a text has, and how many at most."""
    paths = {path for pattern in (*TOKENIZER_FILES, "config.json") for path in model.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _hash_code() -> str:
    """Of this project's own modules for data, and the versions of libraries."""
    digest = hashlib.sha256(json.dumps([version(name) for name in LIBRARIES]).encode())
    for folder in (Path(__file__).parent, Path(finetune_api.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class PreparedCache:
    """The entries in a folder, which other jobs may use at the same time. Without a folder there are none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def knows(self, sources: str) -> bool:
        """Whether there is prepared data of these sources, by any tokenizer: they were found good."""
        return self._folder is not None and any(self._folder.glob(f"{sources}-*"))

    def restore(self, sources: str, tokenizer: str, workspace: Workspace, check: Callable[[], None]) -> Found | None:
        """Links an entry's files into the workspace, once their hashes prove right; None if there is none."""
        entry = self._entry(sources, tokenizer)
        if entry is None or not entry.is_dir():
            return None
        try:
            os.utime(entry)
            _verify(entry, check)
            found = Found(read_manifest(entry / "data"), DataReport.model_validate_json(_read(entry, DATA_REPORT)))
            with new_folder(workspace.data) as folder:
                _link(entry / "data", folder)
            for name in REPORTS:
                if (entry / "report" / name).is_file():
                    write_file(workspace.report / name, _read(entry, name))
        except (OSError, ValueError, StageError, ValidationError) as error:
            logger.warning("Prepared data of an earlier job cannot be used (%s): it is made anew", error)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        return found

    def store(self, sources: str, tokenizer: str, workspace: Workspace, check: Callable[[], None]) -> None:
        """Keeps what lies prepared in the workspace, if the volume can; the job does not depend on it."""
        entry = self._entry(sources, tokenizer)
        if entry is None:
            return
        temporary = entry.with_name(f".{uuid.uuid4().hex}")
        try:
            _link(workspace.data, temporary / "data")
            (temporary / "report").mkdir()
            for name in REPORTS:
                if (workspace.report / name).is_file():
                    shutil.copyfile(workspace.report / name, temporary / "report" / name)
            write_sums(temporary, check)
            shutil.rmtree(entry, ignore_errors=True)
            temporary.rename(entry)
            self._forget(entry.parent)
        except OSError as error:
            logger.info("Prepared data is not kept for later jobs: %s", error.strerror)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _entry(self, sources: str, tokenizer: str) -> Path | None:
        return self._folder / f"{sources}-{tokenizer}" if self._folder else None

    def _forget(self, folder: Path) -> None:
        entries = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=_last_use, reverse=True)
        for entry in entries[KEPT_ENTRIES:]:
            shutil.rmtree(entry, ignore_errors=True)


def _last_use(entry: Path) -> float:
    with contextlib.suppress(OSError):  # another job has just removed it
        return entry.stat().st_mtime
    return 0.0


def _link(source: Path, target: Path) -> None:
    for path in _files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, place)


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _verify(entry: Path, check: Callable[[], None]) -> None:
    """Raises ValueError if a file is not what it was."""
    for line in (entry / SUMS).read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ", 1)
        if hash_file(entry / name, check) != digest:
            raise ValueError(f"{name} is damaged")


def _read(entry: Path, name: str) -> bytes:
    return (entry / "report" / name).read_bytes()
