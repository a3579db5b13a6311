"""The port to a cluster that is this machine: `finetune run` drives the same reconcile, and a pod is a process."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import aiohttp
from finetune_api.constants import Stage
from finetune_api.dataset import Source
from finetune_api.kubernetes import LocalReference
from finetune_api.plan import Location
from finetune_api.progress import Progress
from finetune_api.rules import Finding
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from pydantic import ValidationError

from finetune_operator.cluster import Event
from finetune_operator.layout import CACHE
from finetune_operator.local_job import LocalJob
from finetune_operator.observed import Key, Manifest, Observed, Resource, manifest_hash_of, merge_patch, stage_of
from finetune_operator.run_folder import RunError, RunFolder

PROGRESS_TIMEOUT = aiohttp.ClientTimeout(total=1)


class LocalLayout:
    """Where things lie for a process of this machine."""

    def __init__(
        self,
        run: Path,
        manifest_folder: Path,
        volumes: Mapping[str, Path] | None = None,
        secrets: Mapping[str, Path] | None = None,
    ) -> None:
        """`volumes`: folders that stand for claims and ConfigMaps; `secrets`: folders with a Secret's keys as files."""
        self._run = run.resolve()
        self._manifest_folder = manifest_folder.resolve()
        self._volumes = volumes or {}
        self._secrets = secrets or {}

    def workspace(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        volume = self._volume(spec)
        return str(volume / f"{resource.key.name}-{resource.uid[:8]}" if volume else self._run / "workspace")

    def cache(self, spec: FineTuneJobSpec) -> str:
        """That of a run stays in its folder when it is begun afresh."""
        return str((self._volume(spec) or self._run) / CACHE)

    def _volume(self, spec: FineTuneJobSpec) -> Path | None:
        """The folder that stands for the workspace's claim, if any."""
        folder = self._volumes.get(spec.workspace.claim_name or "")
        return folder and folder.resolve()

    def workspace_uri(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        return f"file://{self.workspace(resource, spec)}/artifacts"

    def plan_path(self, resource: Resource, stage: Stage) -> str:
        return str(self._run / "plans" / f"{stage}.json")

    def locate(self, uri: str, secret: LocalReference | None) -> Location:
        """A Secret without a folder is left to the environment and the usual files of the user (~/.aws, HF_TOKEN …).

        Raises RunError for a claim or ConfigMap that has no folder here.
        """
        scheme, _, rest = uri.partition("://")
        path = None
        if scheme == "file":
            path = str((self._manifest_folder / rest).resolve())
        elif scheme in ("pvc", "configmap"):
            name, _, inner = rest.partition("/")
            if name not in self._volumes:
                raise RunError(f"{uri} is only in a cluster; say which folder stands for it: --volume {name}=FOLDER")
            path = str(self._volumes[name].resolve() / inner)
        folder = self._secrets.get(secret.name) if secret else None
        return Location(uri=uri, path=path, secret_dir=str(folder.resolve()) if folder else None)

    def findings(self, spec: FineTuneJobSpec) -> list[Finding]:
        """All that the spec asks for and this machine has not: several nodes, and every URI that has no place here."""
        found = []
        if spec.resources.nodes > 1:
            words = "`finetune run` has this machine only; leave it out, and the same batches are trained here"
            found.append(Finding("spec.resources.nodes", f"found {spec.resources.nodes}: {words}"))
        for field, uri in _uris(spec):
            try:
                self.locate(uri, None)
            except RunError as error:
                found.append(Finding(field, str(error)))
        return found


def _uris(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    """Field and value of every URI."""

    def of_sources(field: str, sources: list[Source] | None) -> Iterator[tuple[str, str]]:
        for index, source in enumerate(sources or ()):
            yield f"spec.dataset.{field}[{index}].uri", source.uri

    yield "spec.model.uri", spec.model.uri
    if spec.model.adapter:
        yield "spec.model.adapter.uri", spec.model.adapter.uri
    yield from of_sources("sources", spec.dataset.sources)
    for name, split in (("validation", spec.dataset.validation), ("test", spec.dataset.test)):
        yield from of_sources(f"{name}.sources", split.sources if split else None)
    for index, file in enumerate((spec.dataset.review.decisions if spec.dataset.review else None) or ()):
        yield f"spec.dataset.review.decisions[{index}].uri", file.uri
    if spec.output.uri:
        yield "spec.output.uri", spec.output.uri


class LocalCluster:
    """The Cluster port for exactly one FineTuneJob. Use as an async context manager: no process outlives it."""

    def __init__(
        self,
        run: RunFolder,
        document: Manifest,
        layout: LocalLayout,
        on_event: Callable[[Event], None],
        lock: int,
    ) -> None:
        self.document = document
        """The resource with its newest status."""
        self.progress: Progress | None = None
        """The newest word of the running process."""
        self._run = run
        self._layout = layout
        self._on_event = on_event
        self._lock = lock
        self._emitted: set[Event] = set()
        self._session: aiohttp.ClientSession | None = None
        self._logs = run.path / "logs"
        self._jobs = {
            Stage(stage): LocalJob(child["job"], child["pods"], self._logs, (lock,))
            for stage, child in (run.read("children.json") or {}).items()
        }
        self._policies: dict[str, str | None] = {}
        self._saved = ""

    @property
    def key(self) -> Key:
        return Resource.read(self.document).key

    @property
    def status(self) -> FineTuneJobStatus:
        return Resource.read(self.document).status

    def log(self, stage: Stage) -> Path | None:
        """Output of the newest attempt of a stage."""
        job = self._jobs.get(stage)
        return job.log if job else None

    async def observe(self, key: Key) -> tuple[Resource, Observed] | None:
        for job in self._jobs.values():
            await job.advance(time.time())
        self._save()
        self.progress = await self._ask_progress()
        jobs = {stage: job.manifest for stage, job in self._jobs.items()}
        pods = {stage: tuple(job.pods) for stage, job in self._jobs.items()}
        return Resource.read(self.document), Observed(jobs, pods, self.progress, policies=self._policies)

    async def refresh(self, key: Key) -> None:
        """Here nothing is ever behind."""

    async def create(self, resource: Resource, manifest: Manifest) -> None:
        """Jobs become processes, and a plan's ConfigMap a file; of volumes and policies this machine needs none."""
        stage = stage_of(manifest)
        if manifest["kind"] == "NetworkPolicy":
            self._policies[manifest["metadata"]["name"]] = manifest_hash_of(manifest)
        if stage is None or stage in self._jobs:
            return
        if manifest["kind"] == "ConfigMap":
            path = Path(self._layout.plan_path(resource, stage))
            self._run.write(str(path.relative_to(self._run.path)), manifest["data"]["plan.json"])
        elif manifest["kind"] == "Job":
            # nobody else shares this machine's queue: a Job that would wait for Kueue starts at once
            suspend = bool(resource.spec.get("suspend"))
            admitted = {**manifest, "spec": {**manifest["spec"], "suspend": suspend}}
            self._jobs[stage] = LocalJob.new(admitted, time.time(), self._logs, (self._lock,))
            self._save()

    async def change_job(self, resource: Resource, stage: Stage, patch: Manifest) -> None:
        job = self._jobs[stage]
        changed = merge_patch(job.manifest, patch)
        suspend = changed["spec"]["suspend"]
        if suspend != job.manifest["spec"]["suspend"]:
            await job.set_suspend(suspend, time.time())
        job.manifest.update(metadata=changed["metadata"], spec=changed["spec"])
        self._save()

    async def delete_child(self, resource: Resource, stage: Stage) -> None:
        job = self._jobs.pop(stage, None)
        if job is not None:
            await job.stop(time.time())
            self._save()

    async def delete(self, resource: Resource) -> None:
        """A time to live is for a cluster's memory: what a run made here are the user's own files."""

    async def write_status(self, resource: Resource, status: FineTuneJobStatus) -> None:
        self.document["status"] = status.to_dict()
        self._run.write("job.json", self.document)

    def emit(self, resource: Resource, event: Event) -> None:
        if event not in self._emitted:
            self._emitted.add(event)
            self._on_event(event)

    async def stop(self) -> None:
        """Asks the running process to save and end, and waits for it."""
        for job in self._jobs.values():
            await job.stop(time.time())
        self._save()

    def kill(self) -> None:
        """Ends the running process at once."""
        for job in self._jobs.values():
            job.kill()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=PROGRESS_TIMEOUT)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            self.kill()
            if self._session is not None:
                await self._session.close()

    def _save(self) -> None:
        children = {stage: {"job": job.manifest, "pods": job.pods} for stage, job in self._jobs.items()}
        text = json.dumps(children, indent=2)
        if text != self._saved:
            self._run.write("children.json", text)
            self._saved = text

    async def _ask_progress(self) -> Progress | None:
        """The running process' /progress; its last word while it is too busy to answer."""
        port, stage = next(((job.port, stage) for stage, job in self._jobs.items() if job.port), (None, None))
        if port is None or self._session is None:
            return None
        try:
            async with self._session.get(f"http://127.0.0.1:{port}/progress") as response:
                return Progress.model_validate_json(await response.read())
        except (aiohttp.ClientError, TimeoutError, ValidationError):
            return self.progress if self.progress and self.progress.stage is stage else None
