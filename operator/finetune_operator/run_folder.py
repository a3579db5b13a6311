"""The folder of one `finetune run`, and the part of an API server that the run needs: keeping the resource.

job.json        the FineTuneJob with its status
children.json   its Jobs and their pods
plans/          the plan of each stage
logs/           output and termination message of each attempt
workspace/      model, data, checkpoints, artifacts and report
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api.constants import ExitCode
from finetune_api.status import FailureStatus
from finetune_api.v1alpha1 import FineTuneJob

from finetune_operator.observed import Manifest, Resource, condition_of, format_time

MUTABLE = {"suspend", "limits"}
"""Fields of the spec that may change after creation, as the CRD's rules have it."""


LOCK_SECONDS = 3.0


class RunError(Exception):
    """The run cannot begin; the message tells the user what to do."""


class RunFolder:
    """The files of one run. Hold `locked` while using it: a run has one master."""

    OWN = ("children.json", "plans", "logs", "workspace", "job.json")
    """What a run makes; job.json, the first and the last of them, is the sign of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Yields the lock's descriptor: processes that inherit it keep the folder locked while they live.

        Raises RunError if another `finetune run` holds it, or if the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"the run needs a folder it can write to: {self.path}: {error.strerror}") from None
        try:
            if not _lock(descriptor):
                raise RunError(f"another `finetune run` is at work in {self.path}; wait for it or stop it")
            yield descriptor
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Removes an earlier run, and nothing else that may lie in the folder.

        Raises RunError if there was no run, and yet something has the name of what a run makes.
        """
        found = [self.path / name for name in self.OWN if os.path.lexists(self.path / name)]
        if found and self.path / "job.json" not in found:
            raise RunError(f"{found[0]} is there and was not made by a run; choose another folder with --output")
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def read(self, name: str) -> Manifest | None:
        """Raises RunError if the file is not one of ours."""
        try:
            content = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            raise RunError(f"{self.path / name} is damaged; start again with --fresh") from None
        return dict(content)

    def write(self, name: str, content: Mapping[str, Any] | str) -> None:
        """Replaces the file in one step."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def _lock(descriptor: int) -> bool:
    """Whether the lock was got. A process that was just killed holds it until its memory is freed."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def admit(run: RunFolder, job: FineTuneJob, now: float, fresh: bool = False) -> Manifest:
    """The resource of this run, as an API server would keep it: a new one, or the one to go on with.

    A failed run may be tried again: where the user had something to mend, or changed the spec, it starts from
    nothing; otherwise from the stage that failed.
    Raises RunError if the folder holds a run of another spec.
    """
    known, spec = None if fresh else run.read("job.json"), job.spec.to_dict()
    if known is not None:
        changed = sorted(
            field
            for field in (known["spec"].keys() | spec.keys()) - MUTABLE
            if known["spec"].get(field) != spec.get(field)
        )
        failure = Resource.read(known).status.failure
        if changed and not failure:
            raise RunError(
                f"{run.path} holds a run of this job with another spec (changed: {', '.join(changed)}). "
                "Use --fresh to discard that run, or give the job another metadata.name or --output"
            )
        if failure and (changed or is_users_error(failure)):
            known = None
        elif failure:
            known = _without_failure(run, known)
    if known is None:
        run.clear()
    document = created(job, spec, now) if known is None else _updated(known, spec)
    run.write("job.json", document)
    return document


def is_users_error(failure: FailureStatus) -> bool:
    """Whether the same spec and data would fail again."""
    return failure.stage is None or failure.exit_code == ExitCode.USER_ERROR


def _without_failure(run: RunFolder, known: Manifest) -> Manifest:
    """As before the failed stage, whose Job runs anew."""
    children = run.read("children.json") or {}
    run.write(
        "children.json", {stage: child for stage, child in children.items() if not condition_of(child["job"], "Failed")}
    )
    gone = {"phase", "message", "conditions", "attempt", "completionTime", "failure"}
    return {**known, "status": {name: value for name, value in known["status"].items() if name not in gone}}


def created(job: FineTuneJob, spec: Manifest, now: float) -> Manifest:
    """The resource as an API server would make it."""
    metadata = {
        **job.metadata,
        "namespace": job.metadata.get("namespace", "default"),
        "uid": str(uuid.uuid4()),
        "generation": 1,
        "creationTimestamp": format_time(now),
    }
    return {"apiVersion": job.api_version, "kind": job.kind, "metadata": metadata, "spec": spec, "status": {}}


def _updated(known: Manifest, spec: Manifest) -> Manifest:
    metadata = known["metadata"]
    if known["spec"] != spec:
        metadata = {**metadata, "generation": metadata["generation"] + 1}
    return {**known, "metadata": metadata, "spec": spec}
