import asyncio

import pytest
from finetune_operator.workqueue import WorkQueue


async def take(queue: WorkQueue[str]) -> str:
    return await asyncio.wait_for(queue.get(), 1)


async def is_quiet(queue: WorkQueue[str], seconds: float = 0.03) -> bool:
    try:
        await asyncio.wait_for(queue.get(), seconds)
    except TimeoutError:
        return True
    return False


async def test_a_key_that_is_added_often_comes_once():
    queue = WorkQueue[str]()
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    assert len(queue) == 2
    assert [await take(queue), await take(queue)] == ["a", "b"]
    assert await is_quiet(queue)


async def test_a_key_added_while_it_is_worked_on_comes_again_afterwards_and_not_before():
    queue = WorkQueue[str]()
    queue.add("a")
    await take(queue)
    queue.add("a")
    queue.add("a")
    assert await is_quiet(queue), "two workers would have the same key"
    queue.done("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert await is_quiet(queue)


async def test_no_key_is_ever_with_two_workers_and_the_last_add_is_always_followed_by_a_run():
    queue = WorkQueue[int]()
    active: set[int] = set()
    added = dict.fromkeys(range(5), 0)
    seen = dict.fromkeys(range(5), 0)

    async def work() -> None:
        while True:
            key = await queue.get()
            assert key not in active
            active.add(key)
            seen[key] = added[key]
            await asyncio.sleep(0.001)
            active.discard(key)
            queue.done(key)

    workers = [asyncio.create_task(work()) for _ in range(3)]
    for number in range(300):
        added[number % 5] += 1
        queue.add(number % 5)
        if number % 7 == 0:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.1)
    assert not any(worker.done() for worker in workers)
    for worker in workers:
        worker.cancel()
    assert seen == added


async def test_add_after_keeps_the_earliest_time():
    queue = WorkQueue[str]()
    queue.add_after("a", 30)
    queue.add_after("a", 0.02)
    queue.add_after("a", 10)
    assert len(queue) == 0
    assert await take(queue) == "a"
    queue.done("a")
    assert await is_quiet(queue), "the later times were replaced"


async def test_failures_wait_longer_and_longer_up_to_a_bound_and_success_starts_anew():
    queue = WorkQueue[str](first_delay=1, longest_delay=8)
    delays = [queue.retry("a") for _ in range(200)]
    for delay, longest in zip(delays, [1, 2, 4, 8, *[8] * 196], strict=True):
        assert 0.75 * longest <= delay <= longest
    assert len(set(delays)) > 10, "no jitter: jobs that failed together would come back together"
    assert queue.retry("b") <= 1, "one key's failures are not another's"
    queue.forget("a")
    assert queue.retry("a") <= 1


async def test_a_retried_key_comes_back():
    queue = WorkQueue[str](first_delay=0.01)
    queue.add("a")
    await take(queue)
    queue.retry("a")
    queue.done("a")
    assert await take(queue) == "a"


async def test_a_cancelled_worker_takes_nothing_with_it():
    queue = WorkQueue[str]()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    queue.add("a")
    assert await take(queue) == "a"


async def test_lanes_take_turns_so_that_a_long_one_holds_up_no_other():
    queue = WorkQueue[str](lane_of=lambda key: key[0])
    for number in range(5):
        queue.add(f"a{number}")
    queue.add("b0")
    queue.add("c0")
    queue.add("b1")
    assert [await take(queue) for _ in range(8)] == ["a0", "b0", "c0", "a1", "b1", "a2", "a3", "a4"]
    queue.add("a5")
    queue.add("a0")  # still worked on: it lines up when that is done
    queue.add("b2")
    queue.done("a0")
    assert [await take(queue) for _ in range(3)] == ["a5", "b2", "a0"]
    assert await is_quiet(queue)
