"""The poller against real HTTP servers that stand for trainer pods, honest and hostile ones."""

import asyncio
import contextlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from finetune_api.constants import JOB_LABEL, Stage
from finetune_api.progress import Progress
from finetune_operator import progress as module
from finetune_operator.observed import Key
from finetune_operator.progress import ProgressPoller, read_progress
from finetune_operator.store import PODS, Store
from hypothesis import given
from hypothesis import strategies as st

KEY = Key("team", "demo")
PROGRESS = Progress(
    stage=Stage.TRAIN, activity="Training", fraction=0.5, training_loss=1.5, updated_at=float(int(time.time()))
)


class Trainer:
    """A pod's endpoint. `page` is what it answers; pods differ by their loopback address."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0
        self.page = self._progress
        self.progress = PROGRESS

    async def _progress(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(text=self.progress.to_json())

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.host)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.page(request)
        finally:
            self.at_once -= 1


class World:
    def __init__(self, trainer: Trainer, port: int) -> None:
        self.trainer = trainer
        self.store = Store()
        self.changed: list[Key] = []
        self.poller = ProgressPoller(self.store, self.changed.append, 0.03, port)

    def pod(self, uid="p1", ip="127.0.0.1", *, phase="Running", state="running", name="demo", version="1", index="0"):
        metadata = {
            "uid": uid,
            "name": uid,
            "namespace": "team",
            "labels": {JOB_LABEL: name},
            "annotations": {"batch.kubernetes.io/job-completion-index": index},
            "resourceVersion": version,
        }
        containers = [{"state": {state: {}}}]
        self.store.put(
            PODS, {"metadata": metadata, "status": {"podIP": ip, "phase": phase, "containerStatuses": containers}}
        )

    async def run(self, seconds: float = 0.2):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.poller.run(), seconds)

    async def run_until(self, is_enough: Callable[[], bool]):
        polling = asyncio.create_task(self.poller.run())
        async with asyncio.timeout(60):
            while True:
                if is_enough():
                    break
                await asyncio.sleep(0.01)
        polling.cancel()


@pytest.fixture
async def world():
    trainer = Trainer()
    application = web.Application()
    application.router.add_get("/progress", trainer.handle)
    application.router.add_get("/elsewhere", trainer._progress)
    async with TestServer(application, host="0.0.0.0") as server:
        yield World(trainer, server.port)


async def test_a_running_pod_is_asked_and_a_change_is_told(world):
    world.pod()
    await world.run(0.1)
    assert world.poller.progress_of("p1") == PROGRESS
    assert len(world.trainer.asked) > 1
    assert world.changed == [KEY], "told once: the same answer again is no news"
    world.trainer.progress = PROGRESS.model_copy(update={"fraction": 0.6})
    await world.run(0.1)
    assert world.poller.progress_of("p1").fraction == 0.6
    assert world.changed == [KEY, KEY]


async def test_only_pods_whose_container_runs_are_asked(world):
    world.pod("pending", phase="Pending", state="waiting")
    world.pod("ended", state="terminated")
    world.pod("done", phase="Succeeded", state="terminated")
    world.pod("addressless", ip=None)
    world.pod("second-node", index="1")
    await world.run(0.1)
    assert world.trainer.asked == []


async def test_what_a_pod_said_is_forgotten_with_it(world):
    world.pod()
    await world.run(0.1)
    world.pod(phase="Succeeded", state="terminated", version="2")
    await world.run(0.1)
    assert world.poller.progress_of("p1") is None


async def hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100_000):
        await response.write(b" " * 10_000)
    return response


async def redirect(_: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")  # where a good answer waits


async def long(_: web.Request) -> web.StreamResponse:
    return web.json_response(text=PROGRESS.to_json() + " " * module.MAX_BYTES)


async def compressed(_: web.Request) -> web.StreamResponse:
    return web.Response(body=zlib.compress(PROGRESS.to_json().encode()), headers={"Content-Encoding": "deflate"})


async def rubbish(_: web.Request) -> web.StreamResponse:
    return web.Response(body=b"\xff\x00 rubbish")


@pytest.mark.parametrize("page", [hang, endless, redirect, long, compressed, rubbish])
async def test_a_hostile_pod_is_ignored_and_hurts_no_other(world, page, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.1)
    honest = world.trainer.page

    async def by_address(request):
        return await (page if request.host.startswith("127.0.0.66") else honest)(request)

    world.trainer.page = by_address
    world.pod("bad", "127.0.0.66", name="bad")
    world.pod("good", "127.0.0.1", name="good")
    began = time.monotonic()
    await world.run(0.3)
    assert time.monotonic() - began < 2
    assert world.poller.progress_of("bad") is None
    assert world.poller.progress_of("good") == PROGRESS
    assert world.changed == [Key("team", "good")]


async def test_a_pod_that_is_still_being_asked_is_not_asked_again(world):
    world.trainer.page = hang
    world.pod()
    await world.run(0.3)
    assert len(world.trainer.asked) == 1


async def test_a_pod_that_never_answers_is_asked_less_often_and_told_of_once(world, caplog):
    caplog.set_level("INFO")
    world.trainer.page = rubbish
    world.pod()
    await world.run(0.9)  # 30 rounds
    assert 3 <= len(world.trainer.asked) <= 8
    assert caplog.text.count("No progress from a pod of team/demo") == 1
    asked = len(world.trainer.asked)
    world.trainer.page = world.trainer._progress
    await world.run(0.9)
    assert len(world.trainer.asked) > asked + 3, "once it answers it is asked as often as the others"
    assert world.poller.progress_of("p1") == PROGRESS


async def test_many_pods_are_asked_side_by_side_but_not_all_at_once(world, monkeypatch):
    async def slow(_):
        await asyncio.sleep(0.02)
        return web.json_response(text=PROGRESS.to_json())

    world.trainer.page = slow
    for number in range(150):
        world.pod(f"p{number}", f"127.0.1.{number + 1}", name=f"job{number}")
    await world.run_until(lambda: len(world.changed) == 150)
    assert 10 < world.trainer.most_at_once <= module.CONCURRENCY


async def test_of_two_hundred_pods_none_is_forgotten_and_none_asked_while_it_is_being_asked(world):
    asked, now, most = Counter(), Counter(), Counter()

    async def page(request):
        asked[request.host] += 1
        now[request.host] += 1
        most[request.host] = max(most[request.host], now[request.host])
        await asyncio.sleep(0.2 if request.host.partition(":")[0].endswith("0") else 0)  # longer than a round
        now[request.host] -= 1
        return await world.trainer._progress(request)

    world.trainer.page = page
    for number in range(200):
        world.pod(f"p{number}", f"127.0.1.{number + 1}", name=f"job{number}")
    await world.run_until(lambda: len(asked) == 200 and min(asked.values()) >= 3)
    assert set(most.values()) == {1}


async def test_of_many_pods_that_have_news_all_the_time_each_is_told_of_in_turn(world, monkeypatch):
    async def page(request):
        world.trainer.progress = PROGRESS.model_copy(update={"step": len(world.trainer.asked)})
        return await world.trainer._progress(request)

    world.trainer.page = page
    for number in range(60):
        world.pod(f"p{number}", f"127.0.1.{number + 1}", name=f"job{number}")
    monkeypatch.setattr(module, "NEWS_PER_ROUND", 0)
    await world.run_until(lambda: len(world.trainer.asked) >= 200)
    assert len(world.changed) == len(set(world.changed)) == 60, "the first word of each at once, and no other one"
    monkeypatch.setattr(module, "NEWS_PER_ROUND", 7)
    await world.run_until(lambda: len(world.changed) >= 180)
    assert len(set(world.changed[60:120])) == len(set(world.changed[120:180])) == 60


# --- what counts as progress


def test_a_progress_document_is_read():
    assert read_progress(PROGRESS.to_json().encode()) == PROGRESS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_may_be_lost(value):
    text = json.dumps({**PROGRESS.to_dict(), "trainingLoss": value}).encode()
    assert read_progress(text).training_loss is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activity", "x" * 129),
        ("device", "x" * 40_000),
        ("precision", "x" * 129),
        ("peakMemoryBytes", 10**400),
        ("step", -(2**60)),
        ("updatedAt", float("inf")),
        ("updatedAt", 9e15),
        ("updatedAt", 1.0),
        ("estimatedRemainingSeconds", float("nan")),
        ("estimatedRemainingSeconds", 1e300),
        ("trainingLoss", 1e300),
        ("fraction", 1.1),
        ("stage", "mine"),
        ("unknown", 1),
        ("stage", None),
    ],
)
def test_values_that_no_trainer_of_ours_sends_are_refused_without_quoting_them(field, value):
    text = json.dumps({**PROGRESS.to_dict(), field: value}).encode()
    with pytest.raises(ValueError) as error:
        read_progress(text)
    assert len(str(error.value)) < 100


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_whatever_else_a_pod_says_is_a_value_error(body):
    with pytest.raises(ValueError):
        read_progress(body)
