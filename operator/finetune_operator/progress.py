"""Asks running trainer pods how far they are.

What a pod answers is not trusted: its size, its time and every value in it are bounded, and a pod that does not answer
is asked less often, so that one tenant's pods cannot hold up another's.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from finetune_api.constants import TELEMETRY_PORT
from finetune_api.progress import Progress
from pydantic import ValidationError

from finetune_operator.observed import MAX_SKEW_SECONDS, Key, container_of, index_of, is_running
from finetune_operator.store import PODS, Store

logger = logging.getLogger(__name__)

CONCURRENCY = 50
TIMEOUT_SECONDS = 2.0
MAX_BYTES = 64 * 1024
MAX_TEXT = 128
MAX_NUMBER = 2**53
NEWS_PER_ROUND = 5
"""Of so many pods what is new is told in each round: whatever is told is written into a status of some kilobytes."""

LONGEST_PAUSE = 12
"""Rounds between two questions to a pod that never answers."""

FAILURES_TO_TELL = 3


@dataclass
class _Pod:
    """What is known of one pod's answers."""

    key: Key
    url: str
    progress: Progress | None = None
    told: Progress | None = None
    told_at: float = 0.0
    failures: int = 0
    ask_at: float = 0.0
    asking: bool = False


class ProgressPoller:
    """`changed` is called with the FineTuneJob's key when one of its pods has something new to tell; not for each word,
    if many pods have some."""

    def __init__(
        self,
        store: Store,
        changed: Callable[[Key], None],
        every_seconds: float,
        port: int = TELEMETRY_PORT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._changed = changed
        self._every = every_seconds
        self._port = port
        self._clock = clock
        self._pods: dict[str, _Pod] = {}  # by uid
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._news_left = NEWS_PER_ROUND

    def progress_of(self, pod_uid: str) -> Progress | None:
        """The last answer of that pod."""
        pod = self._pods.get(pod_uid)
        return pod.progress if pod else None

    async def run(self) -> None:
        """Asks, for ever. A round does not wait for the one before: a pod that is still being asked is left out."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # _slots limit: their wait is not in the timeout
        async with (
            aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a small answer stays small
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                self._tell_oldest()
                for uid, pod in self._due():
                    pod.asking = True
                    group.create_task(self._ask(session, uid, pod))
                await asyncio.sleep(self._every)

    def _due(self) -> list[tuple[str, _Pod]]:
        """Pods to ask now: of several nodes the first one, which speaks for all. Forgets pods that have ended."""
        running = {}
        for key, body in self._store.all(PODS):
            ip = (body.get("status") or {}).get("podIP")
            has_begun = is_running(body) and "running" in (container_of(body).get("state") or {})
            if ip and has_begun and index_of(body) == 0:
                running[body["metadata"]["uid"]] = (key, self._url(ip))
        self._pods = {uid: pod for uid, pod in self._pods.items() if uid in running}
        for uid, (key, url) in running.items():
            self._pods.setdefault(uid, _Pod(key, url))
        now = self._clock()
        return [(uid, pod) for uid, pod in self._pods.items() if not pod.asking and pod.ask_at <= now]

    def _url(self, ip: str) -> str:
        return f"http://{f'[{ip}]' if ':' in ip else ip}:{self._port}/progress"

    def _tell_oldest(self) -> None:
        """Begins a round: whoever was told of the longest ago comes first."""
        self._news_left = NEWS_PER_ROUND
        for pod in sorted(self._pods.values(), key=lambda pod: pod.told_at):
            self._tell(pod)

    def _tell(self, pod: _Pod) -> None:
        """Tells what is new, if it is the first word of this pod or there is something left of this round."""
        if pod.progress == pod.told or (pod.told is not None and not self._news_left):
            return
        self._news_left -= pod.told is not None
        pod.told, pod.told_at = pod.progress, self._clock()
        self._changed(pod.key)

    async def _ask(self, session: aiohttp.ClientSession, uid: str, pod: _Pod) -> None:
        try:
            async with self._slots:
                progress = read_progress(await _fetch(session, pod.url))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            pod.failures += 1
            pod.ask_at = self._clock() + self._every * (min(2**pod.failures, LONGEST_PAUSE) - 0.5)
            level = logging.INFO if pod.failures == FAILURES_TO_TELL else logging.DEBUG
            logger.log(level, "No progress from a pod of %s at %s: %s", pod.key, pod.url, error or type(error).__name__)
        except Exception:  # one pod's answer never ends the others' polling
            pod.ask_at = self._clock() + self._every * LONGEST_PAUSE
            logger.exception("The answer of a pod of %s could not be handled", pod.key)
        else:
            pod.failures, pod.ask_at = 0, 0.0
            pod.progress = progress
            if uid in self._pods:
                self._tell(pod)
        finally:
            pod.asking = False


async def _fetch(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.get(url, allow_redirects=False) as response:
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        body = b""
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_BYTES:
                raise ValueError(f"an answer of more than {MAX_BYTES} bytes")
        return body


def read_progress(body: bytes) -> Progress:
    """Raises ValueError for what is not a `Progress`, or holds values that no trainer of ours sends."""
    try:
        progress = Progress.model_validate_json(body)
    except ValidationError as error:
        raise ValueError(f"not a Progress document: {error.error_count()} errors") from None
    for name, value in progress:
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"{name} is longer than {MAX_TEXT} characters")
        if isinstance(value, int | float) and not (abs(value) <= MAX_NUMBER or _is_lost_loss(name, value)):
            raise ValueError(f"{name} is out of range")
    if abs(progress.updated_at - time.time()) > MAX_SKEW_SECONDS:
        raise ValueError("updatedAt is more than a day off")
    return progress


def _is_lost_loss(name: str, value: float) -> bool:
    """A loss may well be nan or infinite; no other number may."""
    return name.endswith("_loss") and isinstance(value, float) and not math.isfinite(value)
