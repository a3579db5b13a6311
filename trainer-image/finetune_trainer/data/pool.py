"""Batches worked on by all CPUs that this process may use; what comes out does not depend on how many those are."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from finetune_api.constants import Reason
from finetune_api.plan import PlanDataset

from finetune_trainer.data.review.decisions import Decisions
from finetune_trainer.data.work import Batch, BatchWorker, WorkedBatch
from finetune_trainer.environment import cpu_limit
from finetune_trainer.errors import StageError, UserError

BYTES_PER_PROCESS = 4 << 20
"""A process takes a second to start; less input than this is worked on faster without it."""

AHEAD = 2
"""Batches per process that wait or are worked on."""


def process_count(total_bytes: int) -> int:
    """How many processes are worth while for files of `total_bytes`; 1: this one alone."""
    cpus = min(len(os.sched_getaffinity(0)), cpu_limit() or 1 << 16)
    return max(1, min(cpus, total_bytes // BYTES_PER_PROCESS))


def work_batches(
    batches: Iterator[Batch], dataset: PlanDataset, processes: int = 1, decisions: Decisions | None = None
) -> Iterator[WorkedBatch]:
    """The batches, worked on, in their order. Ends with the UserError that `batches` ends with, if it does.

    Raises UserError for settings that cannot be met, StageError if a process is killed.
    """
    worker = BatchWorker(dataset, decisions)
    if processes == 1:
        yield from map(worker.work, batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads as they are
    pool = ProcessPoolExecutor(processes, context, _start, (dataset, decisions))
    try:
        yield from _in_order(pool, batches, processes * AHEAD)
    except BrokenProcessPool:
        raise StageError(
            Reason.STAGE_FAILED, "a process that prepares data was killed, most likely for want of memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[Batch], ahead: int) -> Iterator[WorkedBatch]:
    pending: deque[Future[WorkedBatch]] = deque()
    failure: UserError | None = None
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) > ahead:
                yield pending.popleft().result()
    except UserError as error:  # what was read before it still counts
        failure = error
    while pending:
        yield pending.popleft().result()
    if failure:
        raise failure


def _start(dataset: PlanDataset, decisions: Decisions | None = None) -> None:
    """In a new process: it ends with its parent, which alone is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _workers.append(BatchWorker(dataset, decisions))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(batch: Batch) -> WorkedBatch:
    return _workers[0].work(batch)


_workers: list[BatchWorker] = []
"""In a process of the pool: its own."""
