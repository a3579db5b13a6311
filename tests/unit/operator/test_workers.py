import asyncio

import pytest
from finetune_operator import workers as module
from finetune_operator.cluster import UnavailableError
from finetune_operator.logs import current_job
from finetune_operator.metrics import Metrics
from finetune_operator.observed import Key
from finetune_operator.request_counter import RequestCounter
from finetune_operator.store import Store
from finetune_operator.workers import Workers
from finetune_operator.workqueue import WorkQueue

A, B = Key("team", "a"), Key("team", "b")


class World:
    def __init__(self) -> None:
        self.queue = WorkQueue[Key](first_delay=0.01)
        self.metrics = Metrics(Store(), lambda: True, lambda: 0, dict, RequestCounter())
        self.done: list[Key] = []
        self.answers: dict[Key, list] = {}

    async def reconcile(self, key):
        answer = self.answers[key].pop(0) if self.answers.get(key) else None
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            answer = None
        self.done.append(key)
        return answer

    def count(self, name):
        return self.metrics.registry.get_sample_value(f"finetune_operator_{name}")


@pytest.fixture
async def world():
    world = World()
    world.workers = Workers(world.queue, world.reconcile, world.metrics, count=2)
    yield world
    await world.workers.stop(0)


async def test_what_fails_is_tried_again_and_disturbs_no_other(world, caplog):
    world.answers = {A: [UnavailableError("exceeded quota"), RuntimeError("a bug"), None]}
    world.queue.add(A)
    world.queue.add(B)
    await asyncio.sleep(0.15)
    assert world.done == [B, A]
    assert world.count("reconcile_errors_total") == 2
    assert world.count("reconcile_duration_seconds_count") == 4
    assert "exceeded quota; trying again in" in caplog.text
    assert caplog.text.count("Traceback") == 1, "a bug has one, a quota has none"


async def test_after_a_success_a_failure_is_a_first_one(world):
    world.answers = {A: [UnavailableError("once"), UnavailableError("twice"), None]}
    world.queue.add(A)
    await asyncio.sleep(0.1)
    assert world.done == [A]
    assert world.queue.retry(A) <= 0.01


async def test_it_looks_again_when_it_was_told_to(world):
    world.answers = {A: [0.02]}
    world.queue.add(A)
    await asyncio.sleep(0.1)
    assert world.done == [A, A]


async def test_a_reconcile_that_hangs_holds_a_worker_for_a_bounded_time(world, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_RECONCILE", 0.02)
    world.answers = {A: [asyncio.Event()], B: [asyncio.Event()]}
    for key in (A, B):
        world.queue.add(key)
    await asyncio.sleep(0.15)
    assert sorted(world.done) == [A, B], "both have been done at their second try"


async def test_stopping_lets_end_what_is_under_way_and_begins_nothing(world):
    gate = asyncio.Event()
    world.answers = {A: [gate], B: [asyncio.Event()]}
    world.queue.add(A)
    world.queue.add(B)
    await asyncio.sleep(0.01)
    stopping = asyncio.create_task(world.workers.stop(0.1))
    await asyncio.sleep(0.01)
    world.queue.add(Key("team", "late"))
    gate.set()
    await asyncio.wait_for(stopping, 1)
    assert world.done == [A], "A has ended, B was cut off, the late one was not begun"


async def test_log_lines_know_the_job_that_they_are_about(world):
    seen = []

    async def reconcile(key):
        seen.append(current_job.get())

    world.workers._reconcile = reconcile
    world.queue.add(A)
    await asyncio.sleep(0.02)
    assert seen == ["team/a"]
