"""Applies FineTuneJobs and sees when something is done about each: the user's side of the benchmark."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from finetune_api.constants import API_VERSION, JOB_LABEL, KIND, PLURAL, STAGE_LABEL, Stage
from finetune_operator.api import ApiError, ApiServer, api_path, load_configuration

from benchmarks.operator.fake_nodes import SCHEDULING

NAME = "operator-benchmark"
"""Of the namespace, the StorageClass and, with a number, the volumes."""

CONNECTIONS = 20
METADATA_ONLY = {"Accept": "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"}


def job_name(number: int) -> str:
    return f"job-{number}"


def make_job(number: int) -> dict[str, Any]:
    """A classification on one GPU with a volume of its own."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": job_name(number)},
        "spec": {
            "task": "Classification",
            "model": {"uri": "hf://acme/encoder"},
            "dataset": {"sources": [{"uri": "s3://bucket/train.jsonl"}], "test": {"fraction": 0.2}},
            "resources": {"gpus": 1, "gpuMemory": "80Gi"},
            "workspace": {"size": "1Gi", "storageClassName": NAME},
            "scheduling": SCHEDULING,
        },
    }


class Jobs:
    """The namespace of one scenario."""

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self.applied: dict[str, float] = {}
        """Job -> time.monotonic() when the request was sent that makes it."""
        self.acted_on: dict[str, float] = {}
        """Job -> time.monotonic() when its first child Job, the last child of its first stage, was seen."""
        self.changes = 0
        """Of FineTuneJobs, as the API server tells of them: each write that changed something is one."""

    async def apply(self, numbers: Iterable[int], per_second: float | None = None) -> None:
        """At that rate, or all at once over CONNECTIONS connections."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for place, number in enumerate(numbers):
                if per_second is not None:
                    await asyncio.sleep(max(0.0, began + place / per_second - time.monotonic()))
                group.create_task(self._apply(number))

    async def _apply(self, number: int) -> None:
        async with self._slots:
            self.applied[job_name(number)] = time.monotonic()
            await self._api.request("POST", api_path(API_VERSION, PLURAL, NAME), make_job(number), timeout=60)

    async def wait_until_acted_on(self, seconds: float) -> None:
        """Raises TimeoutError, with the number of those that wait."""
        end = time.monotonic() + seconds
        while waiting := self.applied.keys() - self.acted_on.keys():
            if time.monotonic() > end:
                raise TimeoutError(f"{len(waiting)} of {len(self.applied)} jobs have no child Job after {seconds:g} s")
            await asyncio.sleep(0.1)

    def delays(self) -> list[float]:
        """Seconds from application to first child Job, the shortest first."""
        return sorted(self.acted_on[name] - moment for name, moment in self.applied.items())

    async def watch(self) -> None:
        """Fills `acted_on` and `changes`, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(
                self._watch("batch/v1", "jobs", {"labelSelector": f"{STAGE_LABEL}={Stage.PREPARE}"}, self._saw_child)
            )
            group.create_task(self._watch(API_VERSION, PLURAL, {}, self._saw_job))

    def _saw_child(self, event: Any) -> None:
        self.acted_on.setdefault(event["object"]["metadata"]["labels"][JOB_LABEL], time.monotonic())

    def _saw_job(self, event: Any) -> None:
        self.changes += event["type"] == "MODIFIED"

    async def _watch(self, version: str, plural: str, query: dict[str, str], saw: Callable[[Any], None]) -> None:
        """Goes on where it was when the API server closes it, as it does with watchers that it finds slow."""
        path = api_path(version, plural, NAME)
        _, seen = await self._api.list_all(path, query)
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._api.open_session() as session:
            while True:
                parameters = {**query, "watch": "1", "resourceVersion": seen}
                url = self._api.url + path
                async with session.get(url, params=parameters, headers=METADATA_ONLY, timeout=timeout) as answer:
                    with suppress(aiohttp.ClientPayloadError):  # it was cut off
                        async for line in answer.content:
                            event = json.loads(line)
                            if event["type"] == "ERROR":
                                raise RuntimeError(f"the watch of {plural} has lost its place: {event['object']}")
                            seen = event["object"]["metadata"]["resourceVersion"]
                            saw(event)


@asynccontextmanager
async def namespace(volumes: int) -> AsyncIterator[Jobs]:
    """A fresh namespace, with volumes for its jobs' claims. All of it is gone afterwards."""
    api = ApiServer(await load_configuration())
    core, storage = "/api/v1", "/apis/storage.k8s.io/v1/storageclasses"
    try:
        await api.request("POST", f"{core}/namespaces", {"metadata": {"name": NAME}})
        storage_class = {"provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"}
        await api.request("POST", storage, {"metadata": {"name": NAME}, **storage_class})
        await _each(volumes, lambda number: api.request("POST", f"{core}/persistentvolumes", _volume(number)))
        jobs = Jobs(api)
        async with asyncio.TaskGroup() as group:  # a watch that fails ends the scenario
            watch = group.create_task(jobs.watch())
            yield jobs
            watch.cancel()
    finally:
        await _empty(api)
        await _remove(api, f"{core}/namespaces/{NAME}")
        await _remove(api, f"{storage}/{NAME}")
        await _each(volumes, lambda number: _remove(api, f"{core}/persistentvolumes/{NAME}-{number}"))
        await api.close()


def _volume(number: int) -> dict[str, Any]:
    return {
        "metadata": {"name": f"{NAME}-{number}"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "hostPath": {"path": f"/{NAME}"},  # nobody mounts it
            "storageClassName": NAME,
        },
    }


async def _each(count: int, act: Callable[[int], Awaitable[Any]]) -> None:
    slots = asyncio.Semaphore(CONNECTIONS)

    async def one(number: int) -> None:
        async with slots:
            await act(number)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


async def _empty(api: ApiServer) -> None:
    """The namespace's own end would wait for the pods' grace period, although nobody uses it."""
    now = {"propagationPolicy": "Background", "gracePeriodSeconds": 0}
    with suppress(ApiError):
        for version, plural in ((API_VERSION, PLURAL), ("batch/v1", "jobs"), ("v1", "pods")):
            await api.request("DELETE", api_path(version, plural, NAME), now, timeout=120)
        while True:
            await asyncio.sleep(0.5)
            if not (await api.request("GET", api_path("v1", "pods", NAME), query={"limit": "1"}))["items"]:
                break


async def _remove(api: ApiServer, path: str) -> None:
    """Waits until it is gone; that it never was is no error."""
    with suppress(ApiError):
        await api.request("DELETE", path, timeout=60)
        while True:
            await api.request("GET", path, timeout=60)
            await asyncio.sleep(0.2)
