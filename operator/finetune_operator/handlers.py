"""kopf wiring: its watches feed the informer. kopf decides nothing and writes nothing.

kopf runs in a thread with an event loop of its own: at its end it cancels every task of its loop, and it would take
the signals for itself.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import aiohttp
import kopf
from finetune_api.constants import GROUP

from finetune_operator.api import ApiServer
from finetune_operator.informer import Informer, Watch
from finetune_operator.store import KINDS, Kind

logger = logging.getLogger(__name__)

WATCH_SECONDS = 60
"""A watch is opened anew after this time; being opened proves that it works, also where nothing happens."""


class _Backoffs(Iterable[float]):
    """Seconds between the tries of a request. Without an end: a watch never gives up."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1.0, 2.0, 4.0, 8.0), itertools.repeat(10.0))


class _NoStorage(kopf.DiffBaseStorage, kopf.ProgressStorage):
    """kopf would copy every object twice, to find out what has changed since it was handled: nobody asks for that."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence

    def store(self, **_: Any) -> None: ...

    def purge(self, **_: Any) -> None: ...

    def touch(self, **_: Any) -> None: ...


def kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True  # its peering freezes replicas of one priority; we have a Lease
    settings.posting.enabled = False
    settings.scanning.disabled = True  # needs rights on namespaces and CRDs
    settings.persistence.diffbase_storage = settings.persistence.progress_storage = _NoStorage()
    settings.persistence.finalizer = f"{GROUP}/none"  # kopf removes this one where it finds it; nobody sets it
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = _Backoffs()
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + 15  # a watch that fell silent does not hang
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    settings.queueing.worker_limit = None  # a limit below the number of objects blocks the start
    settings.queueing.idle_timeout = 1
    settings.queueing.exit_timeout = 0.5
    settings.process.ultimate_exiting_timeout = None
    for kind in KINDS:
        if kind.selector:
            settings.watching.label_selectors[kind.api_version, kind.plural] = kind.selector
    return settings


class Watcher(threading.Thread):
    """Runs kopf until `stop`. `ended` is set when it has ended, also by itself; the log says why."""

    def __init__(self, api: ApiServer, informer: Informer, namespaces: tuple[str, ...]) -> None:
        super().__init__(name="kopf", daemon=True)
        self.ended = asyncio.Event()
        self._api = api
        self._informer = informer
        self._namespaces = namespaces
        self._loop = asyncio.get_running_loop()
        self._stop_flag = threading.Event()
        self._told: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._watches = {kind.path(namespace): (kind, namespace) for kind, namespace in informer.watches}

    def run(self) -> None:
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry(),
                    settings=kopf_settings(),
                    clusterwide=not self._namespaces,
                    namespaces=self._namespaces,
                    stop_flag=self._stop_flag,
                )
            )
        except Exception:
            logger.exception("The watches have failed")
        finally:
            self._tell(self.ended.set)

    def stop(self) -> None:
        self._stop_flag.set()

    def _tell(self, function: Callable[..., object], *arguments: Any) -> None:
        """Has the main loop call it. A loop that has not come to it yet is not woken again for the next one."""
        self._told.append((function, arguments))
        if len(self._told) == 1:
            with contextlib.suppress(RuntimeError):  # the main loop is closed already
                self._loop.call_soon_threadsafe(self._listen)

    def _listen(self) -> None:
        while self._told:
            function, arguments = self._told.popleft()
            function(*arguments)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for kind in KINDS:
            kopf.on.event(kind.api_version, kind.plural, id=kind.plural, registry=registry)(self._handler(kind))
        return registry

    def _handler(self, kind: Kind) -> Any:
        watches: dict[str | None, Watch] = {watch[1]: watch for watch in self._informer.watches if watch[0] is kind}

        async def on_event(event: Any, **_: Any) -> None:
            body = event["object"]
            watch = watches.get(body["metadata"].get("namespace")) or watches[None]
            self._tell(self._informer.saw, watch, event["type"], body)

        return on_event

    async def _login(self, **_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=self._api.url, aiohttp_session=self._api.open_session(self._observe))

    async def _observe(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Notes every list and watch that the API server grants."""
        response = await handler(request)
        watch = self._watches.get(request.url.path)
        if watch is not None and response.status < 400:
            self._tell(self._informer.answered, watch, "watch" not in request.url.query)
        return response
