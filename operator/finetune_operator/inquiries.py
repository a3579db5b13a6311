"""Questions to the API server about what no watch tells of: why a pod does not start, what its queue says of a Job.

Each is asked again as long as somebody wants to know, later and later while the answer stays the same. But for a few at
the beginning, all together are asked at most once a second: the API server looks through all events of a namespace to
answer one, and a thousand jobs that wait are to cost no more than a few.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from finetune_operator import kueue
from finetune_operator.api import ApiError, ApiServer, api_path
from finetune_operator.observed import Manifest

logger = logging.getLogger(__name__)

FIRST_PAUSE = 5.0
LONGEST_PAUSE = 60.0
PACE_SECONDS = 1.0
"""Between two questions, whoever they are about..."""

AT_ONCE = 10
"""...but for so many that were not asked before: nothing is asked again while others wait to be asked at all."""

FORGOTTEN_SECONDS = 2 * LONGEST_PAUSE
"""An answer that nobody has wanted for so long is not kept."""


Ask = Callable[[], Awaitable[Sequence[Manifest]]]


@dataclass
class _Answer:
    items: Sequence[Manifest]
    asked: float
    wanted: float
    pause: float = FIRST_PAUSE


class Inquiries:
    def __init__(self, api: ApiServer, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._answers: dict[str, _Answer] = {}
        self._paid_until = 0.0  # each question costs PACE_SECONDS

    async def events_about(self, body: Manifest) -> Sequence[Manifest]:
        """`reason` and `message` of the Events about an object, oldest first."""
        uid, namespace = body["metadata"]["uid"], body["metadata"]["namespace"]

        async def ask() -> Sequence[Manifest]:
            selector = {"fieldSelector": f"involvedObject.uid={uid}"}
            events, _ = await self._api.list_all(api_path("v1", "events", namespace), selector)
            return [
                {"reason": event.get("reason"), "message": event.get("message") or ""}
                for event in sorted(events, key=_last_seen)
            ]

        return await self._answer(uid, f"the events of {body['metadata']['name']}", ask)

    async def workload_of(self, job: Manifest) -> Manifest | None:
        """What Kueue says of a Job: `spec` and `status` of its Workload; None if there is none, or no Kueue."""
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]

        async def ask() -> Sequence[Manifest]:
            selector = {"labelSelector": f"{kueue.JOB_UID_LABEL}={uid}"}
            for version in kueue.API_VERSIONS:
                try:
                    workloads, _ = await self._api.list_all(api_path(version, "workloads", namespace), selector)
                except ApiError as error:
                    if error.status != 404:
                        raise
                else:
                    return [{part: workload.get(part) or {} for part in ("spec", "status")} for workload in workloads]
            return ()

        change = job["metadata"].get("generation")  # suspended anew, it is asked anew
        found = await self._answer(f"{uid} {change}", f"the Workload of {job['metadata']['name']}", ask)
        return found[0] if found else None

    async def _answer(self, key: str, what: str, ask: Ask) -> Sequence[Manifest]:
        """The answer that is known, or a new one if it is time; a help for people, so it never fails."""
        now, known = self._clock(), self._answers.get(key)
        items: Sequence[Manifest] = known.items if known else ()
        if known is not None:
            known.wanted = now
            if now < known.asked + known.pause:
                return items
        if now < self._paid_until - (0 if known else AT_ONCE * PACE_SECONDS):
            return items
        self._paid_until = max(self._paid_until, now) + PACE_SECONDS
        try:
            items = await ask()
        except ApiError as error:
            logger.log(logging.DEBUG if known else logging.WARNING, "Cannot read %s: %s", what, error)
        is_the_same = known is not None and items == known.items
        pause = min(2 * known.pause, LONGEST_PAUSE) if known and is_the_same else FIRST_PAUSE
        self._answers = {k: a for k, a in self._answers.items() if now - a.wanted < FORGOTTEN_SECONDS}
        self._answers[key] = _Answer(items, now, now, pause)
        return items


def _last_seen(event: Manifest) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp", ""))
