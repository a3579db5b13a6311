"""An API server in virtual time: what is written to it its watches tell, a little later, or not at all."""

import asyncio
import contextvars
import json
import random
from collections.abc import Callable
from typing import Any

from finetune_operator.observed import Manifest, format_time
from finetune_operator.store import Kind

from tests.fake_kubernetes import FakeKubernetes, collections_of, is_selected
from tests.virtual_time import Clock

Observer = Callable[[str, str, Manifest | None, Manifest | None], None]
"""Is told of every change: by whom, path, before, after."""


class Stream:
    """A watch: yields (type, object) until it breaks."""

    def __init__(self, kind: Kind, namespace: str | None) -> None:
        self._collection, self._query = kind.path(namespace), kind.query
        self._events: asyncio.Queue[tuple[float, str, Manifest] | None] = asyncio.Queue()
        self.deaf = False
        """It tells nothing, and does not break either: until the client gives it up."""

    def offer(self, change: str, path: str, body: Manifest) -> None:
        if self._collection in collections_of(path) and is_selected(body, self._query):
            due = asyncio.get_running_loop().time() + random.uniform(0.001, 0.2)
            self._events.put_nowait((due, change, body))

    def end(self) -> None:
        self._events.put_nowait(None)

    async def next(self) -> tuple[str, Manifest] | None:
        while True:
            event = await self._events.get()
            if event is None:
                return None
            if not self.deaf:
                await asyncio.sleep(max(0.0, event[0] - asyncio.get_running_loop().time()))
                return event[1], event[2]


class PlayedApiServer(FakeKubernetes):
    """Faults are `is_down`, `errors`, `lost_answers`, `slowness` and `break_watches`."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.writer = "the cluster"
        """Who makes the change that happens now."""
        self.is_down = False
        self.slowness = 1.0
        self.errors: list[int] = []
        """HTTP statuses with which the next requests are refused."""
        self.lost_answers = 0
        """So many of the next writes are done, and nobody hears of it."""
        self.streams: list[Stream] = []
        self.oldest_version = 0
        """A watch cannot begin before it: the past was compacted."""
        self._observer = observer
        self._context = contextvars.copy_context()  # the cluster's clock is right
        self._history: list[tuple[int, str, str, Manifest]] = []

    def now(self) -> str:
        return format_time(Clock.time())

    def put(self, path: str, body: Manifest) -> Manifest:
        old = self.objects.get(path)
        body = json.loads(json.dumps(body))
        if old is not None:
            if _content(old) == _content(body):
                return old  # as the real one does: a write that changes nothing is no event
            generation = old["metadata"].get("generation", 1) + (old.get("spec") != body.get("spec"))
        else:
            generation = 1
        body["metadata"] = {**(body.get("metadata") or {}), "generation": generation}
        new = super().put(path, body)
        self._changed("MODIFIED" if old else "ADDED", path, old, new)
        return new

    def remove(self, path: str) -> Manifest:
        old = super().remove(path)
        last = {**old, "metadata": {**old["metadata"], "resourceVersion": str(self._version)}}
        self._changed("DELETED", path, old, None, last)
        return old

    def _changed(self, change: str, path: str, old: Manifest | None, new: Manifest | None, told: Any = None) -> None:
        """Tells the watches: `told`, if it is not `new`."""
        self._observer(self.writer, path, old, new)
        self._history.append((self._version, change, path, told or new))
        for stream in self.streams:
            stream.offer(change, path, told or new)

    def watch(self, kind: Kind, namespace: str | None, version: int) -> Stream | None:
        """None: too old (410)."""
        if version < self.oldest_version:
            return None
        stream = Stream(kind, namespace)
        for number, change, path, body in self._history:
            if number > version:
                stream.offer(change, path, body)
        self.streams.append(stream)
        return stream

    def close(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)

    def break_watches(self, *, too_old: bool = False) -> None:
        if too_old:
            self.oldest_version = self._version + 1
            self._version += 1
        for stream in self.streams:
            stream.end()
        self.streams.clear()

    def _later(self, what: Callable[[Any], None], about: Any, earliest: float, latest: float) -> None:
        """Has the cluster do it, after a time that is drawn."""

        def act() -> None:
            before, self.writer = self.writer, "the cluster"
            try:
                what(about)
            finally:
                self.writer = before

        self.schedule(random.uniform(earliest, latest), act)

    def schedule(self, delay: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(delay, act, context=self._context)


def _content(body: Manifest) -> Manifest:
    ours = ("resourceVersion", "uid", "creationTimestamp", "generation", "namespace", "name")
    metadata = {name: value for name, value in (body.get("metadata") or {}).items() if name not in ours}
    return {**body, "metadata": metadata}
