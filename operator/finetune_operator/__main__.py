"""`finetune-operator`: puts the parts together and runs them until SIGTERM.

Every replica watches; the one that holds the Lease acts. Whatever fails for good ends the process: its successor
starts from the cluster's state, as after any crash.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable

from finetune_api.constants import GROUP, KIND, PLURAL, VERSION
from kubernetes.aio.config import ConfigException

from finetune_operator import controller
from finetune_operator.api import ApiError, ApiServer, load_configuration
from finetune_operator.decision import Context
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.handlers import Watcher
from finetune_operator.informer import Informer
from finetune_operator.kube import KubeCluster
from finetune_operator.layout import PodLayout
from finetune_operator.leader import LeaderElection, LeadershipLostError
from finetune_operator.logs import start_logging
from finetune_operator.metrics import Metrics
from finetune_operator.observed import Key
from finetune_operator.progress import ProgressPoller
from finetune_operator.server import Server
from finetune_operator.settings import Settings
from finetune_operator.store import Store
from finetune_operator.workers import Workers
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger("finetune_operator")

STOP_SECONDS = 1.0
"""What is under way may end within this time; all of it may be cut off without harm."""


class WatchesEndedError(Exception):
    """Without watches nothing can go on."""


class Operator:
    """One replica."""

    def __init__(self, settings: Settings, api: ApiServer, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._api = api
        self._store = Store()
        self._queue: WorkQueue[Key] = WorkQueue(lane_of=lambda key: key.namespace)
        self._informer = Informer(api, self._store, settings.watch_namespaces)
        identity = _identity(settings)
        self._election = LeaderElection(api, settings.operator_namespace, settings.lease_name, identity, clock)
        self._poller = ProgressPoller(self._store, self._queue.add, settings.poll_seconds, clock=clock)
        self._recorder = EventRecorder(api, self._election.seconds_to_write, identity)
        self._cluster = KubeCluster(
            api,
            self._store,
            self._election.seconds_to_write,
            self._poller.progress_of,
            self._recorder.record,
            reads_workloads=settings.kueue,
        )
        self._context = Context(settings, PodLayout())
        self._metrics = Metrics(
            self._store,
            lambda: self._election.leading,
            lambda: len(self._queue),
            self._informer.ages,
            api.counter,
        )

    async def run(self) -> None:
        """Until cancelled, or until something fails for good (an ExceptionGroup says what)."""
        server = Server(self._settings.http_port, self._informer.health, self._is_ready, self._metrics.registry)
        async with server, asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._informer.run())
            await self._election.look()
            await self._informer.synced.wait()
            await self._election.acquire()
            group.create_task(self._poller.run())
            group.create_task(self._recorder.run())
            await self._lead()

    async def _watch(self) -> None:
        await _wait_for_resource(self._api)
        watcher = Watcher(self._api, self._informer, self._settings.watch_namespaces)
        watcher.start()
        try:
            await watcher.ended.wait()
            raise WatchesEndedError("the watches have ended")
        finally:
            watcher.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watcher.ended.wait(), STOP_SECONDS)

    async def _lead(self) -> None:
        self._store.changed = self._queue.add
        for key in self._store.known():
            self._queue.add(key)
        workers = Workers(self._queue, self._reconcile, self._metrics)
        try:
            await self._election.hold()
        finally:
            await workers.stop(STOP_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._recorder.flush(), STOP_SECONDS)
            await self._election.release()

    async def _reconcile(self, key: Key) -> float | None:
        return await controller.reconcile(self._cluster, key, self._context, time.time())

    def _is_ready(self) -> tuple[bool, str]:
        synced = self._informer.synced.is_set()
        return synced, "ok" if synced else "the first lists are not complete yet; the log says why"


def _identity(settings: Settings) -> str:
    """The pod's name is unique; a process without one makes itself a name."""
    if settings.identity != Settings.identity:
        return settings.identity
    return f"{settings.identity}-{socket.gethostname()}-{uuid.uuid4().hex[:8]}"


async def _wait_for_resource(api: ApiServer) -> None:
    """Returns when the API server knows FineTuneJobs; says what it waits for."""
    told = ""
    while True:
        try:
            answer = await api.request("GET", f"/apis/{GROUP}/{VERSION}")
        except ApiError as error:
            trouble = str(error) if error.status != 404 else ""
        else:
            if any(resource.get("name") == PLURAL for resource in answer.get("resources") or ()):
                return
            trouble = ""
        trouble = trouble or f"{KIND} is not installed in this cluster: kubectl apply -f crds/finetunejobs.yaml"
        if trouble != told:
            logger.warning("Waiting: %s", trouble)
            told = trouble
        await asyncio.sleep(2)


async def _run_until_signal(settings: Settings) -> int:
    """Exit code: 0 after a signal, 1 after a failure."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        api = ApiServer(await load_configuration())
    except ConfigException as error:
        logger.critical("No cluster: %s", error)
        return 1
    work = asyncio.create_task(Operator(settings, api).run())
    signalled = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, signalled), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            logger.info("Stopping")
            work.cancel()
        await work
    except asyncio.CancelledError:
        return 0
    except Exception as error:
        for cause in error.exceptions if isinstance(error, ExceptionGroup) else (error,):
            expected = isinstance(cause, LeadershipLostError | WatchesEndedError | OSError)
            logger.critical("Ending: %s", cause, exc_info=None if expected else cause)
        return 1
    finally:
        signalled.cancel()
        await api.close()
    return 1


def main() -> int:
    try:
        settings = Settings.from_environment()
        start_logging(settings.log_level)
    except ValueError as error:
        print(f"finetune-operator: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_run_until_signal(settings))


if __name__ == "__main__":
    sys.exit(main())
