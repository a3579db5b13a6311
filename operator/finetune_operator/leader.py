"""Leader election by a Lease (coordination.k8s.io/v1): of several replicas one acts.

The protocol is client-go's (tools/leaderelection). Nobody compares clocks: a replica waits until it has itself seen
the Lease unchanged for its whole duration, measured from when it *saw* the last change, and so from after it was made.
The leader stops acting `RENEW_DEADLINE` after it *began* its last successful renewal. Every write of the leader is
given up before `DURATION` has passed since then (`seconds_to_write`), so that no two replicas act at one time; what
a slow API server still carries out of an abandoned request is harmless, as every write names the uid it is meant for.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime

from finetune_operator.api import ApiError, ApiServer, api_path
from finetune_operator.cluster import UnavailableError
from finetune_operator.observed import Manifest

logger = logging.getLogger(__name__)

DURATION = 15.0
RENEW_DEADLINE = 10.0
RETRY_PERIOD = 2.0
REQUEST_TIMEOUT = 4.0
LONGEST_WRITE = 10.0

API = "coordination.k8s.io/v1"


class LeadershipLostError(Exception):
    """This replica must stop acting at once."""


class LeaderElection:
    """`await acquire()`, act while `await hold()` does not raise, then `await release()`."""

    def __init__(
        self,
        api: ApiServer,
        namespace: str,
        name: str,
        identity: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._clock = clock
        self._renewed: float | None = None  # when the last successful renewal began; None: not the leader
        self._held: Manifest | None = None  # the Lease as we have last written it: it need not be read to be renewed
        self._seen = ("", 0.0)  # the Lease's resourceVersion, and when it was first seen
        self._trouble = ""

    @property
    def leading(self) -> bool:
        return self._renewed is not None and self._clock() < self._renewed + RENEW_DEADLINE

    def seconds_to_write(self) -> float:
        """How long a write that begins now may take. Raises UnavailableError if this replica may not write."""
        if self._renewed is None or not self.leading:
            raise UnavailableError("this replica is not the leader")
        return min(LONGEST_WRITE, self._renewed + DURATION - self._clock())

    async def look(self) -> None:
        """Begins to measure how long the Lease stays unchanged, which `acquire` would begin with."""
        with contextlib.suppress(ApiError):  # acquire tells of it
            await self._read()

    async def acquire(self) -> None:
        """Waits until this replica is the leader, however long that takes."""
        logger.info("Waiting for the Lease %s/%s as %s", self._namespace, self._name, self._identity)
        while True:
            if await self._try():
                break
            await asyncio.sleep(RETRY_PERIOD * random.uniform(1.0, 1.2))
        logger.info("This replica leads")

    async def hold(self) -> None:
        """Renews the Lease until it cannot be or is another's; then raises LeadershipLostError."""
        while self.leading:
            await asyncio.sleep(RETRY_PERIOD)
            await self._try()
        if self._renewed is None:
            raise LeadershipLostError("another replica holds the Lease")
        self._renewed = None
        words = self._trouble or "this process, or the API server, was too slow"
        raise LeadershipLostError(f"the Lease was not renewed within {RENEW_DEADLINE:.0f} s: {words}")

    async def release(self) -> None:
        """Lets another replica lead at once; without this it would wait for the Lease to run out."""
        if self._renewed is None:
            return
        self._renewed = None
        try:
            lease = await self._api.request("GET", self._path(), timeout=REQUEST_TIMEOUT)
            if lease["spec"].get("holderIdentity") == self._identity:
                # the same words as client-go: nobody holds it, and it runs out in a second
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                await self._api.request("PUT", self._path(), lease, timeout=REQUEST_TIMEOUT)
                logger.info("The Lease is released")
        except ApiError as error:
            logger.warning("The Lease was not released: %s", error)

    def _path(self) -> str:
        return api_path(API, "leases", self._namespace, self._name)

    async def _try(self) -> bool:
        """Takes or renews the Lease, if it is free or ours."""
        began = self._clock()
        try:
            taken = await self._take()
        except ApiError as error:
            taken = False
            if error.status != 409:  # somebody was faster
                self._tell(str(error))
        else:
            self._trouble = ""
        if taken:
            self._renewed = began
        return taken

    async def _take(self) -> bool:
        if self._held is not None:
            try:
                return await self._write(self._held)
            except ApiError as error:
                self._held = None  # whatever became of it: read it anew
                if error.status != 409:
                    raise
        try:
            lease = await self._read()
        except ApiError as error:
            if error.status != 404:
                raise
            metadata = {"name": self._name, "namespace": self._namespace}
            lease = {"apiVersion": API, "kind": "Lease", "metadata": metadata}
            return await self._write(lease, "POST", api_path(API, "leases", self._namespace))
        spec = lease.get("spec") or {}
        runs_out = self._seen[1] + (spec.get("leaseDurationSeconds") or DURATION)
        if spec.get("holderIdentity") not in (None, "", self._identity) and self._clock() < runs_out:
            self._renewed = None  # it was moved: not a moment longer do two act
            return False
        return await self._write(lease)

    async def _read(self) -> Manifest:
        """The Lease, of which it is noted since when it is as it is. Raises ApiError."""
        lease = await self._api.request("GET", self._path(), timeout=REQUEST_TIMEOUT)
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        return lease

    async def _write(self, lease: Manifest, method: str = "PUT", path: str = "") -> bool:
        """In our name. Raises ApiError: 409 if it is not any more as it was read."""
        lease = {**lease, "spec": self._spec(lease.get("spec") or {})}
        self._held = await self._api.request(method, path or self._path(), lease, timeout=REQUEST_TIMEOUT)
        self._seen = (self._held["metadata"]["resourceVersion"], self._clock())
        return True

    def _spec(self, old: Manifest) -> Manifest:
        """The Lease in our name. The API server refuses it (409) if the Lease has changed since it was read."""
        if old.get("holderIdentity") == self._identity:
            return {**old, "leaseDurationSeconds": int(DURATION), "renewTime": _now()}
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(DURATION),
            "acquireTime": _now(),
            "renewTime": _now(),
            "leaseTransitions": (old.get("leaseTransitions") or 0) + 1 if old else 0,
        }

    def _tell(self, trouble: str) -> None:
        """Once per trouble, not every two seconds."""
        if trouble != self._trouble:
            self._trouble = trouble
            logger.warning("The Lease %s/%s: %s", self._namespace, self._name, trouble)


def _now() -> str:
    """For people: no replica decides by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
