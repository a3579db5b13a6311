"""Tells people by Kubernetes Events what became of their jobs, behind the work itself.

As in client-go, whoever has an Event only hands it over, and one task writes them, one by one: no job waits for the
news about another one, and of a thousand jobs at once the children come first.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable

from finetune_api.constants import API_VERSION, FIELD_MANAGER, KIND

from finetune_operator.api import ApiError, ApiServer, api_path
from finetune_operator.cluster import ClusterError, Event
from finetune_operator.observed import Manifest, Resource, format_time

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1024
"""What the API server takes."""

MAX_WAITING = 10_000
"""Of some KiB each."""


class EventRecorder:
    """`seconds_to_write` is asked before each write: how long it may take; it raises if there may be none."""

    def __init__(self, api: ApiServer, seconds_to_write: Callable[[], float], identity: str = FIELD_MANAGER) -> None:
        self._api = api
        self._seconds_to_write = seconds_to_write
        self._identity = identity
        self._waiting: dict[str, Manifest] = {}  # by path; the oldest first
        self._work = asyncio.Event()

    def record(self, resource: Resource, event: Event) -> None:
        """Has the event written once, however often it is recorded. Never raises: events are a courtesy."""
        body = self._body(resource, event)
        path = api_path("v1", "events", resource.key.namespace, body["metadata"]["name"])
        if path not in self._waiting and len(self._waiting) >= MAX_WAITING:
            logger.warning("Event %s of %s was not recorded: too many wait", event.reason, resource.key)
            return
        self._waiting.setdefault(path, body)
        self._work.set()

    async def run(self) -> None:
        """Writes what is recorded, for ever."""
        while True:
            await self._work.wait()
            await self.flush()

    async def flush(self) -> None:
        """Writes what waits."""
        while self._waiting:
            path = next(iter(self._waiting))
            await self._write(self._waiting[path])  # one that is cut off here still waits
            self._waiting.pop(path, None)
        self._work.clear()

    async def _write(self, body: Manifest) -> None:
        about = body["involvedObject"]
        what = f"Event {body['reason']} of {about['namespace']}/{about['name']}"
        try:
            path = api_path("v1", "events", about["namespace"])
            await self._api.request("POST", path, body, timeout=self._seconds_to_write())
        except ClusterError:  # not the leader any more
            logger.debug("%s was not recorded", what)
        except ApiError as error:
            if error.reason != "AlreadyExists" and "NamespaceTerminating" not in error.causes:
                logger.warning("%s was not recorded: %s", what, error)

    def _body(self, resource: Resource, event: Event) -> Manifest:
        """A core/v1 Event. Its name follows from what it says, so that it exists once."""
        identity = "\n".join((resource.uid, event.type, event.reason, event.key))
        now = format_time(time.time())
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{resource.key.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
                "namespace": resource.key.namespace,
            },
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": resource.key.namespace,
                "name": resource.key.name,
                "uid": resource.uid,
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:MAX_MESSAGE],
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._identity,
        }
