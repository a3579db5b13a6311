"""Keeps the store true to the cluster, and knows how old its knowledge is.

kopf's watches feed it. A watch that had to start anew (its resourceVersion was too old) lists again and cannot tell
what was deleted meanwhile, so after every list of kopf's, and every few minutes anyway, we list ourselves and compare.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from finetune_operator.api import ApiError, ApiServer
from finetune_operator.observed import Manifest
from finetune_operator.store import KINDS, Kind, Store, version_of

logger = logging.getLogger(__name__)

RESYNC_SECONDS = 300.0
RETRY_SECONDS = 5.0
OVERDUE_SECONDS = 300.0
"""Every watch is opened anew each minute (see handlers), so silence of this length cannot be a quiet cluster."""

REACHABLE_SECONDS = 30.0
"""The Lease is asked for every two seconds: without an answer for so long, it is the API server that is away."""

Watch = tuple[Kind, str | None]
"""What one watch is about: a kind in one namespace, or in all."""


class Informer:
    def __init__(self, api: ApiServer, store: Store, namespaces: Sequence[str]) -> None:
        self.synced = asyncio.Event()
        """Set when everything was listed once: before, an object that is not in the store may well exist."""
        self.watches: Sequence[Watch] = [(kind, name) for kind in KINDS for name in (namespaces or (None,))]
        self._api = api
        self._store = store
        self._unsynced = set(self.watches)
        self._proven = dict.fromkeys(self.watches, time.monotonic())
        self._due: asyncio.Queue[Watch] = asyncio.Queue()

    def saw(self, watch: Watch, kind: str | None, body: Manifest) -> None:
        """Takes a watch event; `kind` is ADDED, MODIFIED, DELETED, or None for a listed object."""
        self._proven[watch] = time.monotonic()
        if kind == "DELETED":
            self._store.remove(body["metadata"]["uid"], version_of(body))
        else:
            self._store.put(watch[0], body)

    def answered(self, watch: Watch, listed: bool) -> None:
        """The API server has answered the list or opened the watch."""
        self._proven[watch] = time.monotonic()
        if listed:
            self._due.put_nowait(watch)

    def ages(self) -> dict[str, float]:
        """Per kind the seconds since its oldest watch was last proven to work: by an event or by being opened."""
        now = time.monotonic()
        ages: dict[str, float] = {}
        for (kind, _), proven in self._proven.items():
            ages[kind.plural] = max(ages.get(kind.plural, 0.0), now - proven)
        return ages

    def health(self) -> tuple[bool, str]:
        """False if this process should be started anew: a watch hangs although the API server answers others.

        Before the first lists it waits for the CRD or for rights; a new start would not help.
        """
        ages = self.ages()
        words = "\n".join(f"{name}: the watch was proven to work {age:.0f} s ago" for name, age in ages.items())
        answered = self._api.last_answer
        is_reachable = answered is not None and time.monotonic() - answered < REACHABLE_SECONDS
        return not (self.synced.is_set() and is_reachable and max(ages.values()) > OVERDUE_SECONDS), words

    async def run(self) -> None:
        """Lists whatever is due, for ever."""
        while True:
            try:
                watch = await asyncio.wait_for(self._due.get(), RESYNC_SECONDS)
            except TimeoutError:
                for each in self.watches:
                    self._due.put_nowait(each)
                continue
            await self._resync(watch)

    async def _resync(self, watch: Watch) -> None:
        kind, namespace = watch
        try:
            listed, version = await self._api.list_all(kind.path(namespace), kind.query)
        except ApiError as error:
            logger.warning("Cannot list %s: %s", kind.plural, error)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._due.put_nowait, watch)
            return
        differences = self._store.replace(kind, listed, version, namespace=namespace)
        if watch in self._unsynced:
            self._unsynced.discard(watch)
            logger.info("Listed %d %s in %s", len(listed), kind.plural, namespace or "all namespaces")
            if not self._unsynced:
                self.synced.set()
        elif differences:
            logger.debug("A new list of %s differed in %d objects", kind.plural, differences)
