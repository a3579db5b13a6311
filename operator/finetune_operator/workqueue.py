"""A queue of keys that are worked on by several workers, but one key never by two at once.

The semantics are those of client-go's workqueue (k8s.io/client-go/util/workqueue): adding is idempotent, a key that is
added while it is worked on comes again afterwards, failures wait exponentially longer. Beyond that it is fair: keys
wait in lanes, which take turns, so that a long lane holds up no other one. For one event loop.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class WorkQueue(Generic[Item]):
    def __init__(
        self,
        first_delay: float = 0.25,
        longest_delay: float = 60.0,
        lane_of: Callable[[Item], Hashable] = lambda _: None,
    ) -> None:
        """The first failure of a key waits about `first_delay` seconds, each further one twice as long."""
        self._first_delay = first_delay
        self._longest_delay = longest_delay
        self._lane_of = lane_of
        self._lanes: dict[Hashable, deque[Item]] = {}  # none is empty
        self._turns: asyncio.Queue[Hashable] = asyncio.Queue()  # each lane once
        self._wanted: set[Item] = set()  # waits in its lane, or is active and comes again
        self._active: set[Item] = set()
        self._timers: dict[Item, asyncio.TimerHandle] = {}
        self._failures: dict[Item, int] = {}

    def __len__(self) -> int:
        """Keys that wait for a worker, without those that wait for a time."""
        return len(self._wanted)

    def add(self, item: Item) -> None:
        if item in self._wanted:
            return
        self._wanted.add(item)
        if item not in self._active:
            self._line_up(item)

    def _line_up(self, item: Item) -> None:
        name = self._lane_of(item)
        if name not in self._lanes:
            self._lanes[name] = deque()
            self._turns.put_nowait(name)
        self._lanes[name].append(item)

    def add_after(self, item: Item, delay: float) -> None:
        """Adds it in `delay` seconds, or earlier if an earlier time is set already."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(item)
        if timer is not None:
            if timer.when() <= loop.time() + delay:
                return
            timer.cancel()
        self._timers[item] = loop.call_later(delay, self._fire, item)

    def _fire(self, item: Item) -> None:
        del self._timers[item]
        self.add(item)

    async def get(self) -> Item:
        """Waits for a key; the caller owes a `done`."""
        name = await self._turns.get()
        item = self._lanes[name].popleft()
        if self._lanes[name]:
            self._turns.put_nowait(name)
        else:
            del self._lanes[name]
        self._wanted.discard(item)
        self._active.add(item)
        return item

    def done(self, item: Item) -> None:
        self._active.discard(item)
        if item in self._wanted:
            self._line_up(item)

    def retry(self, item: Item) -> float:
        """Adds it after a delay that grows with its failures since the last `forget`; returns the delay in seconds."""
        failures = self._failures.get(item, 0)
        self._failures[item] = failures + 1
        longest = min(self._longest_delay, self._first_delay * 2.0 ** min(failures, 30))
        delay = longest * random.uniform(0.75, 1.0)  # many jobs that failed together come back apart
        self.add_after(item, delay)
        return delay

    def forget(self, item: Item) -> None:
        """It succeeded: its next failure is a first one."""
        self._failures.pop(item, None)
