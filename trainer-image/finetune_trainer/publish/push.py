"""artifacts/ -> output.uri: a folder of a volume, an object store, or a repository of the Hugging Face hub.

SHA256SUMS always comes last, so that a reader can tell a whole upload from one that is still under way.
"""

import concurrent.futures
import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.constants import Reason
from finetune_api.plan import Location
from fsspec.callbacks import Callback

from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.publish.sums import CARD, SUMS, artifact_files, published_names
from finetune_trainer.storage import display_uri, filesystem, hf_token, scheme, storage_errors
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.workspace import new_folder

FIELD = "output.uri"
CHUNK = 16 * 2**20
"""Bytes copied between two looks at the request to stop."""

Report = Callable[[int], None]
"""Told how many bytes were sent so far; raises Interrupted when it is time to stop."""


def stop_if_asked(telemetry: Telemetry) -> None:
    """Raises Interrupted after SIGTERM: what is not published yet is made again from the workspace."""
    if telemetry.stop_requested.is_set():
        raise Interrupted("stopped while publishing; the next attempt publishes again")


def push(folder: Path, location: Location, telemetry: Telemetry, done: float = 0) -> None:
    """Brings all files of `folder` to `location`, and removes there what an earlier push left.

    `done` is the share of the stage's progress that is already made. Raises UserError(OutputFailed) if the
    location does not exist or may not be written to, StageError(OutputFailed) for what may work the next time.
    """
    names = [*sorted(artifact_files(folder), key=CARD.__eq__), SUMS]  # the card proves that the hashes are ours
    total = sum((folder / name).stat().st_size for name in names)

    def report(sent: int) -> None:
        telemetry.update(fraction=done + (1 - done) * sent / total)
        stop_if_asked(telemetry)

    telemetry.update(activity="Uploading", fraction=done)
    try:
        with storage_errors(location, Reason.OUTPUT_FAILED, FIELD):
            if location.path is not None:
                _copy(folder, names, location, report)
            elif scheme(location) == "hf":
                _push_to_hub(folder, names, location, telemetry)
            else:
                _upload(folder, names, location, report)
    except StageError as error:
        if error.reason is Reason.STAGE_FAILED:  # the network
            error.reason = Reason.OUTPUT_FAILED
        raise


def _copy(folder: Path, names: list[str], location: Location, report: Report) -> None:
    """Into a folder of a volume or of this machine, which is replaced as a whole."""
    target, uri = Path(location.path or ""), display_uri(location)
    if target.exists() and _holds_others(target):
        message = (
            f"{FIELD}: {uri} holds other files than a published model as it was left; name a new or an empty folder"
        )
        raise UserError(Reason.OUTPUT_FAILED, message)
    sent = 0
    try:
        with new_folder(target) as new:
            for name in names:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("rb") as source, (new / name).open("wb") as copy:
                    while chunk := source.read(CHUNK):
                        copy.write(chunk)
                        sent += len(chunk)
                        report(sent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(Reason.OUTPUT_FAILED, f"{FIELD}: no space left in {uri}") from error
        if error.errno == errno.EROFS:
            raise UserError(Reason.OUTPUT_FAILED, f"{FIELD}: {uri} is on a read-only volume") from error
        raise


def _holds_others(target: Path) -> bool:
    """Whether anything would be lost with the target but an earlier push."""
    try:
        ours = {target / name for name in published_names(lambda name: (target / name).read_bytes())}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        ours = set()
    folders = {folder for path in ours for folder in path.parents}
    return not target.is_dir() or any(path not in ours | folders for path in target.rglob("*"))


def _upload(folder: Path, names: list[str], location: Location, report: Report) -> None:
    """To an object store, file by file."""
    files, root = filesystem(location)
    root = root.rstrip("/")
    try:
        before = published_names(lambda name: files.cat_file(f"{root}/{name}"))
    except (FileNotFoundError, PermissionError):  # the first upload, or credentials that may only write
        before = set()
    sent = 0
    for name in names:
        if name == SUMS:
            _remove(files, [f"{root}/{old}" for old in sorted(before.difference(names))])
        files.put_file(str(folder / name), f"{root}/{name}", callback=_UploadCallback(report, sent))
        sent += (folder / name).stat().st_size
        report(sent)


def _remove(files: Any, paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # an earlier attempt had come so far
            files.rm_file(path)


class _UploadCallback(Callback):  # type: ignore[misc]  # fsspec has no types
    """Hears from fsspec how much of a file was sent; what `report` raises ends the upload."""

    def __init__(self, report: Report, sent_before: int) -> None:
        super().__init__()
        self._report, self._sent_before = report, sent_before

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        self._report(self._sent_before + self.value)


def _push_to_hub(folder: Path, names: list[str], location: Location, telemetry: Telemetry) -> None:
    """As one commit; a repository that does not exist is made, and is private."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repository = location.uri.removeprefix("hf://").rstrip("/")
    if repository.count("/") != 1:
        message = f"{FIELD}: {location.uri} is no model repository; write hf://owner/name"
        raise UserError(Reason.OUTPUT_FAILED, message)
    api = HfApi(token=hf_token(location))

    def commit() -> None:
        api.create_repo(repository, private=True, exist_ok=True)
        try:
            before = published_names(lambda name: Path(api.hf_hub_download(repository, name)).read_bytes())
        except RemoteEntryNotFoundError:
            before = set()
        old = sorted(before.difference(names))
        message = "Publish a fine-tuned model"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=old or None)

    _run_until_stopped(commit, telemetry)


def _run_until_stopped(work: Callable[[], None], telemetry: Telemetry) -> None:
    """Runs what cannot be stopped beside this thread, and leaves it to the process's end if it must stop."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="push", daemon=True).start()
    while not concurrent.futures.wait([future], timeout=0.2).done:
        stop_if_asked(telemetry)
    future.result()
