"""Hours in seconds: an event loop whose clock jumps to the next timer as soon as there is nothing else to do.

What runs on it is deterministic, as long as it waits for timers and futures only.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

EPOCH = 1_800_000_000.0
"""Wall clock time at which a virtual loop begins."""

SKEW: ContextVar[list[float] | None] = ContextVar("skew", default=None)
"""By how many seconds the wall clock of the machine that the current task plays is wrong; may be changed while it runs."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits for ever")
        if not ready and timeout is not None:
            self._loop.now += timeout
        return ready


class Clock:
    """Stands in the place of the module `time` in code that is run on a virtual loop."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()

    @staticmethod
    def time() -> float:
        skew = SKEW.get()
        return EPOCH + asyncio.get_running_loop().time() + (skew[0] if skew else 0.0)


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
