"""A run folder with a local cluster and a job in it, whose processes are `fake_trainer`s."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from finetune_api.constants import JOB_LABEL, STAGE_LABEL, Stage
from finetune_api.rules import parse_job
from finetune_operator.cluster import Event
from finetune_operator.local import LocalCluster, LocalLayout
from finetune_operator.local_job import LocalJob
from finetune_operator.observed import Manifest, Resource
from finetune_operator.run_folder import RunFolder, admit

from tests import specs

TRAIN = Stage.TRAIN


def manifest(**changes: object) -> Manifest:
    return specs.manifest(specs.CLASSIFICATION, changes, name="demo")


def job_manifest(run: Path, **spec: object) -> Manifest:
    """A child Job for train, as `render` makes it."""
    template = {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "trainer", "args": ["train", "--plan", str(run / "plans" / "train.json")]}],
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [64]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    labels = {JOB_LABEL: "demo", STAGE_LABEL: "train"}
    return {
        "kind": "Job",
        "metadata": {"name": "demo-train", "labels": labels},
        "spec": {
            "backoffLimit": 2,
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": labels}, "spec": template},
            **spec,
        },
    }


def config_map(run: Path) -> Manifest:
    plan = {"workspace": str(run / "workspace")}
    metadata = {"name": "demo-train", "labels": {STAGE_LABEL: "train"}}
    return {"kind": "ConfigMap", "metadata": metadata, "data": {"plan.json": json.dumps(plan)}}


class World:
    """A run folder with a cluster in it."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder / "run")
        self.layout = LocalLayout(self.run.path, folder)
        self.events: list[Event] = []

    @asynccontextmanager
    async def cluster(self, job: Manifest | None = None) -> AsyncIterator[LocalCluster]:
        with self.run.locked() as lock:
            document = admit(self.run, parse_job(manifest()), time.time())
            async with LocalCluster(self.run, document, self.layout, self.events.append, lock) as cluster:
                if job is not None:
                    await cluster.create(Resource.read(document), config_map(self.run.path))
                    await cluster.create(Resource.read(document), job)
                yield cluster

    def job(self, **spec: object) -> Manifest:
        return job_manifest(self.run.path, **spec)

    def local_job(self, **spec: object) -> LocalJob:
        """The Job alone, with its plan; the test is its clock."""
        plan = config_map(self.run.path)["data"]["plan.json"]
        self.run.write("plans/train.json", plan)
        return LocalJob.new(self.job(**spec), 0.0, self.run.path / "logs", ())

    async def working(self) -> int:
        """Waits until the process is at work, and gives its pid."""
        workspace = self.run.path / "workspace"
        async with asyncio.timeout(30):
            while not (workspace / "working").exists():  # noqa: ASYNC110  (another process makes it)
                await asyncio.sleep(0.02)
        return int((workspace / "pid").read_text())

    def tries(self) -> int:
        return int((self.run.path / "workspace" / "tries-train").read_text())
