"""Workers take keys from the queue and reconcile them; what fails is tried again, later and later."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from finetune_operator.cluster import UnavailableError
from finetune_operator.logs import current_job
from finetune_operator.metrics import Metrics
from finetune_operator.observed import Key
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

LONGEST_RECONCILE = 60.0
WORKERS = 24
"""They wait for the API server nearly all the time."""

Reconcile = Callable[[Key], Awaitable[float | None]]
"""Returns the seconds after which to look again, None to wait for an event."""


class Workers:
    def __init__(self, queue: WorkQueue[Key], reconcile: Reconcile, metrics: Metrics, count: int = WORKERS) -> None:
        self._queue = queue
        self._reconcile = reconcile
        self._metrics = metrics
        self._stopping = False
        self._busy: set[asyncio.Task[None] | None] = set()
        self._tasks = [asyncio.create_task(self._work(), name=f"worker {number}") for number in range(count)]

    async def stop(self, grace_seconds: float) -> None:
        """No key is begun any more; what is under way may end within the grace."""
        self._stopping = True
        for task in self._tasks:
            if task not in self._busy:
                task.cancel()
        await asyncio.wait(self._tasks, timeout=grace_seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _work(self) -> None:
        while not self._stopping:
            key = await self._queue.get()
            self._busy.add(asyncio.current_task())
            current_job.set(str(key))
            try:
                await self._turn(key)
            finally:
                self._queue.done(key)
                current_job.set("")
                self._busy.discard(asyncio.current_task())

    async def _turn(self, key: Key) -> None:
        try:
            with self._metrics.reconcile_duration.time():
                async with asyncio.timeout(LONGEST_RECONCILE):
                    look_again = await self._reconcile(key)
        except UnavailableError as error:
            self._metrics.reconcile_errors.inc()
            logger.warning("%s; trying again in %.1f s", error, self._queue.retry(key))
        except Exception:
            self._metrics.reconcile_errors.inc()
            logger.exception("The reconcile failed; trying again in %.1f s", self._queue.retry(key))
        else:
            self._queue.forget(key)
            if look_again is not None:
                self._queue.add_after(key, look_again)
