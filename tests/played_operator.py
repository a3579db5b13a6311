"""Replicas of the real operator on a played cluster: all of it runs but kopf, whose watches are played, and HTTP."""

import asyncio
import contextvars
import json
import random
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

import pytest
from finetune_operator import __main__ as operator
from finetune_operator import informer, kube, progress
from finetune_operator.api import ApiError, ApiServer
from finetune_operator.informer import Informer, Watch
from finetune_operator.observed import Manifest
from finetune_operator.settings import Settings
from kubernetes.aio.client import Configuration

from tests.played_api_server import Stream
from tests.played_cluster import PlayedCluster
from tests.virtual_time import SKEW, Clock

WATCH_SECONDS = 75.0
"""After this time a client opens a watch anew (handlers.WATCH_SECONDS, and what is added to it)."""


class Connection(ApiServer):
    """One replica's requests: they travel, they may be refused, and the answer may be lost."""

    def __init__(self, cluster: PlayedCluster, name: str) -> None:
        super().__init__(Configuration(host="http://played"))
        self.cluster = cluster
        self.is_cut = False
        self._name = name

    def _delay(self) -> float:
        return random.uniform(0.001, 0.05) * self.cluster.slowness

    async def request(
        self,
        method: str,
        path: str,
        body: Manifest | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout: float = 10.0,  # noqa: ASYNC109 (as the real one)
    ) -> Manifest:
        answer: asyncio.Future[Manifest] = asyncio.get_running_loop().create_future()
        sent = json.loads(json.dumps(body))

        def arrive() -> None:
            """The request is carried out, whether anybody still waits for it or not."""
            done = self._answer(method, path, dict(query or {}), sent)
            if not answer.done():
                answer.set_result(done)

        if self.is_cut:
            raise ApiError(0, "this process is dead")
        self.cluster.schedule(self._delay(), arrive)
        try:
            async with asyncio.timeout(timeout):
                done = await answer
                await asyncio.sleep(self._delay())
        except TimeoutError as error:
            raise ApiError(0, f"no answer in {timeout:.0f} s") from error
        self.last_answer = Clock.monotonic()
        if done.get("kind") == "Status" and done["code"] >= 400:
            raise ApiError(done["code"], done["message"], done.get("reason", ""))
        return done

    def _answer(self, method: str, path: str, query: Mapping[str, str], body: Manifest | None) -> Manifest:
        cluster = self.cluster
        if cluster.is_down:
            return {"kind": "Status", "code": 503, "message": "connection refused"}
        if cluster.errors:
            code = cluster.errors.pop()
            return {"kind": "Status", "code": code, "message": f"injected {code}", "reason": "Injected"}
        cluster.writer = self._name
        try:
            done: Manifest = json.loads(json.dumps(cluster.answer(method, path, query, body)))
        finally:
            cluster.writer = "the cluster"
        if cluster.lost_answers and method != "GET":
            cluster.lost_answers -= 1
            return {"kind": "Status", "code": 504, "message": "the answer was lost"}
        return done

    async def open_watch(self, watch: Watch, version: int) -> Stream | None:
        await asyncio.sleep(self._delay())
        if self.cluster.is_down:
            raise ApiError(503, "connection refused")
        return self.cluster.watch(*watch, version)


class PlayedWatcher:
    """As kopf does: lists, watches, begins anew; what is missing from a second list it does not tell."""

    def __init__(self, api: Connection, informer: Informer, _namespaces: tuple[str, ...]) -> None:
        self.ended = asyncio.Event()
        self._api = api
        self._informer = informer
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow(watch)) for watch in self._informer.watches]

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.ended.set()

    async def _follow(self, watch: Watch) -> None:
        kind, namespace = watch
        while True:
            with suppress(ApiError):
                listed, version = await self._api.list_all(kind.path(namespace), kind.query)
                for body in listed:
                    self._informer.saw(watch, None, body)
                self._informer.answered(watch, True)
                await self._watch(watch, int(version))
            await asyncio.sleep(1.0)

    async def _watch(self, watch: Watch, version: int) -> None:
        """Until the version is too old."""
        while True:
            try:
                stream = await self._api.open_watch(watch, version)
            except ApiError:
                await asyncio.sleep(random.uniform(1.0, 3.0))
                continue
            if stream is None:
                return
            self._informer.answered(watch, False)
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    while (event := await stream.next()) is not None:
                        version = max(version, int(event[1]["metadata"]["resourceVersion"]))
                        self._informer.saw(watch, *event)
            except TimeoutError:
                pass
            finally:
                self._api.cluster.close(stream)


class Replica:
    """A pod of the operator: its process is started again when it ends."""

    def __init__(self, cluster: PlayedCluster, name: str) -> None:
        self.name = name
        self.skew = [0.0]
        self.deaths: list[BaseException] = []
        self._cluster = cluster
        self._connection = Connection(cluster, name)
        self._process: asyncio.Task[None] | None = None
        context = contextvars.copy_context()
        context.run(SKEW.set, self.skew)
        self._task = asyncio.get_running_loop().create_task(self._run(), context=context)

    async def _run(self) -> None:
        while True:
            self._connection = Connection(self._cluster, self.name)
            settings = Settings(identity=self.name, operator_namespace="system")
            process = operator.Operator(settings, self._connection, Clock.monotonic)
            self._process = asyncio.create_task(process.run())
            try:
                await self._process
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
            except Exception as error:
                self.deaths.append(error)
            await asyncio.sleep(random.uniform(0.5, 8.0))

    def kill(self) -> None:
        """kill -9: nothing more is sent; what is under way is carried out or not."""
        self._connection.is_cut = True
        if self._process is not None:
            self._process.cancel()

    def stop(self) -> None:
        """For good."""
        self.kill()
        self._task.cancel()


def play(monkeypatch: pytest.MonkeyPatch, cluster: PlayedCluster) -> None:
    """Puts the played parts in the place of the real ones."""

    def no_server(*_: object) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def fetch(_: object, url: str) -> bytes:
        await asyncio.sleep(random.uniform(0.001, 0.1))
        said = cluster.progress_at(url.removeprefix("http://").split(":")[0])
        if said is None:
            raise OSError("connection refused")
        return said.to_json().encode()

    monkeypatch.setattr(operator, "Watcher", PlayedWatcher)
    monkeypatch.setattr(operator, "Server", no_server)
    monkeypatch.setattr(progress, "_fetch", fetch)
    for module in (operator, kube, informer, progress):
        monkeypatch.setattr(module, "time", Clock)
    resources: Any = {"resources": [{"name": "finetunejobs"}]}
    cluster.objects["/apis/finetune-operator.io/v1alpha1"] = resources
