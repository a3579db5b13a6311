"""Training in several processes: starts those of this node, and says how they ended as one.

The processes are started by torchrun's launcher, one per GPU (or one, on CPU). Each runs the same stage and leaves an
`End`; what the pod tells the cluster is the end of the one that is to blame. No torch is imported before `launch`.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from finetune_api.base import Document
from finetune_api.constants import (
    MASTER_ADDRESS_VARIABLE,
    MASTER_PORT_VARIABLE,
    NODE_RANK_VARIABLE,
    ExitCode,
    Reason,
    Stage,
)
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Result
from pydantic import ValidationError

from finetune_trainer.errors import Interrupted
from finetune_trainer.failure import OUT_OF_MEMORY

logger = logging.getLogger(__name__)

MEETING_SECONDS = 900
"""How long the nodes wait for each other."""

STOP_SECONDS = 100
"""From SIGTERM until processes that have not saved and ended are killed: less than the pod's grace period."""

ENDS_VARIABLE = "FINETUNE_ENDS"
"""Folder where the processes of a node leave their ends."""

PR_SET_PDEATHSIG = 1
"""Of Linux' prctl(2)."""

MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


class End(Document):
    """How a process ended."""

    code: int
    result: Result


def processes(plan: Plan) -> int:
    """How many processes train together, on all nodes."""
    return plan.device.nodes * max(1, plan.device.gpus) if plan.stage is Stage.TRAIN else 1


def is_worker() -> bool:
    """Whether this process is one that `launch` has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Number of this process among all that train together; the first one speaks for all."""
    return int(os.environ["RANK"]) if is_worker() else 0


def local_rank() -> int:
    """Number of this process on its node, and of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if is_worker() else 0


def end_with_launcher() -> None:
    """Has the kernel kill this process when its launcher is gone: nobody else would."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_end(result: Result, code: int) -> None:
    """Tells the launcher how this process ended."""
    path = Path(os.environ[ENDS_VARIABLE]) / f"{local_rank()}.json"
    path.write_text(End(code=code, result=result).to_json(), encoding="utf-8")


def launch(plan: Plan, plan_path: Path, stop_requested: threading.Event, tell: Callable[[Result], None]) -> End:
    """Runs this node's processes to their end. SIGTERM reaches them, and they have STOP_SECONDS to save.

    `tell` writes the termination message where this process has to end at once.
    Raises Interrupted if the other nodes did not come.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if stop_requested.is_set():
        raise Interrupted("stopped before the stage began")
    address, port = os.environ.get(MASTER_ADDRESS_VARIABLE, "127.0.0.1"), os.environ.get(MASTER_PORT_VARIABLE)
    node, local = int(os.environ.get(NODE_RANK_VARIABLE, "0")), max(1, plan.device.gpus)
    killed_before = _out_of_memory()
    codes: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as folder:
        os.environ[ENDS_VARIABLE] = folder
        config = LaunchConfig(
            min_nodes=plan.device.nodes,
            max_nodes=plan.device.nodes,
            nproc_per_node=local,
            run_id=plan.job.uid,
            role="trainer",
            rdzv_backend="static",
            rdzv_endpoint=f"{address}:{port or _free_port()}",
            rdzv_configs={"rank": node, "timeout": MEETING_SECONDS},
            max_restarts=0,  # that is the Job's, which knows of all nodes
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=STOP_SECONDS,
        )
        logger.info("Starting %d processes on node %d of %d", local, node, plan.device.nodes)
        command = ("-P", "-m", "finetune_trainer", plan.stage.value, "--plan", str(plan_path))
        try:
            with _stopping_while_it_waits(tell):
                elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            codes = {failure.local_rank: failure.exitcode for failure in error.failures.values()}
        except SignalException:
            logger.info("Stopped by a signal")
        except DistError as error:
            logger.warning("The nodes did not meet: %s", error)
            raise Interrupted(f"the {plan.device.nodes} nodes did not all come to {address} in time") from None
        ends = {number: end for number in range(local) if (end := _read_end(Path(folder), number))}
    return judge(ends, codes, local, out_of_memory=_out_of_memory() > killed_before, on_gpus=plan.device.gpus > 0)


def judge(ends: Mapping[int, End], codes: Mapping[int, int], count: int, *, out_of_memory: bool, on_gpus: bool) -> End:
    """The end of `count` processes as one, from what they left and their exit codes (negative: a signal).

    A mistake of the user's comes first, then a process that failed by itself, then one that was killed. Those that only
    lost the others, or were stopped, are to be tried again.
    """
    left = [ends[number] for number in sorted(ends)]
    for final in (lambda code: code == ExitCode.USER_ERROR, lambda code: code not in (*ExitCode,)):
        if blamed := next((end for end in left if final(end.code)), None):
            return blamed
    silent = {number: code for number, code in sorted(codes.items()) if code and number not in ends}
    for number, code in silent.items():
        if end := _end_of_silent(number, code, out_of_memory=out_of_memory, on_gpus=on_gpus):
            return end
    interrupted = [end for end in left if end.code == ExitCode.TRY_AGAIN]
    if interrupted:
        return max(interrupted, key=lambda end: end.result.step or -1)
    if len(left) == count:
        return left[0]
    message = "a process of this training was killed: it goes on from the newest checkpoint"
    return _try_again(message)


def _end_of_silent(number: int, code: int, *, out_of_memory: bool, on_gpus: bool) -> End | None:
    """Of a process that could not say anything; None if it may have been for the loss of the others."""
    if -code == signal.SIGKILL and out_of_memory:
        return End(code=128 + signal.SIGKILL, result=_failed(Reason.OOM_KILLED, OUT_OF_MEMORY))
    # NCCL's watchdog aborts a process that has lost the others
    if -code in (signal.SIGKILL, signal.SIGTERM) or (on_gpus and -code == signal.SIGABRT):
        return None
    how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return End(
        code=code if code > 0 else 128 - code,
        result=_failed(Reason.STAGE_FAILED, f"process {number} of this node {how} and said nothing: look at the log"),
    )


def _failed(reason: Reason, message: str) -> Result:
    return Result(stage=Stage.TRAIN, outcome=Outcome.FAILED, reason=reason, message=message)


def _try_again(message: str) -> End:
    result = Result(stage=Stage.TRAIN, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message=message)
    return End(code=int(ExitCode.TRY_AGAIN), result=result)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read_end(folder: Path, number: int) -> End | None:
    try:
        return End.model_validate_json((folder / f"{number}.json").read_bytes())
    except (OSError, ValidationError):
        return None


def _out_of_memory(events: Path = MEMORY_EVENTS) -> int:
    """Processes of this container that the kernel has killed for want of memory."""
    try:
        return int(dict(line.split() for line in events.read_text().splitlines()).get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _stopping_while_it_waits(tell: Callable[[Result], None]) -> Iterator[None]:
    """While the nodes wait for each other, no Python code runs in the main thread, and so no signal handler: a thread
    of its own ends the process then. Once the workers run, the launcher has put its own handlers in place.
    """
    ours = signal.getsignal(signal.SIGTERM)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())

    def watch() -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and signal.getsignal(signal.SIGTERM) is ours:
                end = _try_again("stopped while the nodes waited for each other")
                tell(end.result)
                os._exit(end.code)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()
