"""`finetune-trainer prepare|train|publish --plan plan.json`: runs one stage and tells the cluster how it ended."""

import argparse
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune_api.constants import ExitCode, Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Result
from pydantic import ValidationError

from finetune_trainer.environment import prepare_environment
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.failure import describe_failure, format_trace
from finetune_trainer.launch import end_with_launcher, is_worker, launch, leave_end, processes, rank
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.logs import adopt_library_logs, start_logging
from finetune_trainer.telemetry.telemetry import port_from_environment

logger = logging.getLogger("finetune_trainer")

STAGE_MODULES = {
    Stage.PREPARE: "finetune_trainer.prepare",
    Stage.TRAIN: "finetune_trainer.train.run",
    Stage.PUBLISH: "finetune_trainer.publish.run",
}
"""Each has `run(plan, telemetry) -> Result`; imported only when it runs, for torch takes seconds."""

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LOG_VARIABLE = "FINETUNE_TERMINATION_LOG"

EXIT_CODES = {
    Outcome.SUCCEEDED: ExitCode.DONE,
    Outcome.FAILED: ExitCode.USER_ERROR,
    Outcome.INTERRUPTED: ExitCode.TRY_AGAIN,
}
"""Of a stage that ended by itself; one that returns Failed has judged the user's work (the gate)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stage and returns the exit code; every end, also a bad one, leaves a termination message."""
    stop_requested = threading.Event()
    if is_worker():
        end_with_launcher()
    _stop_on_signals(stop_requested)  # before all else: what has no handler does not reach process 1 of a container
    parser = argparse.ArgumentParser(prog="finetune-trainer", description="One stage of a FineTuneJob.")
    parser.add_argument("stage", choices=[stage.value for stage in Stage], help="the stage to run")
    parser.add_argument("--plan", required=True, type=Path, help="plan.json, written by the operator")
    options = parser.parse_args(arguments)
    stage = Stage(options.stage)
    trace = partial(format_trace, stage=stage)
    start_logging("", trace)
    try:
        plan = read_plan(options.plan, stage)
        start_logging(f"{plan.job.namespace}/{plan.job.name}", trace)
        if rank() > 0:  # all processes come by the same places
            logging.getLogger().setLevel(logging.WARNING)
        if processes(plan) > 1 and not is_worker():
            end = launch(plan, options.plan, stop_requested, write_termination_message)
            result, code = end.result, end.code
        else:
            result = run_stage(plan, stop_requested)
            code = int(EXIT_CODES[result.outcome])
    except (Exception, KeyboardInterrupt) as error:
        result, code = describe_failure(error, stage)
        expected = isinstance(error, (StageError, KeyboardInterrupt)) and error.__cause__ is None
        logger.log(
            logging.INFO if result.outcome is Outcome.INTERRUPTED else logging.ERROR,
            "%s: %s",
            result.reason,
            result.message,
            exc_info=None if expected else error,
        )
    if is_worker():
        _end_worker(result, code)
    write_termination_message(result)
    logger.info("%s %s, exit code %d", stage.value, result.outcome.value.lower(), code)
    return code


def read_plan(path: Path, stage: Stage) -> Plan:
    """Raises UserError if it is not a plan for this stage, StageError if it cannot be read."""
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StageError(Reason.STAGE_FAILED, f"cannot read the plan {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        message = f"{path}: {field}: {first['msg']}; operator and trainer image must be of the same version"
        raise UserError(Reason.INVALID_SPEC, message) from None
    if plan.stage is not stage:
        raise UserError(Reason.INVALID_SPEC, f"{path}: this is a plan for {plan.stage}, not for {stage}")
    return plan


def run_stage(plan: Plan, stop_requested: threading.Event) -> Result:
    """Runs the plan's stage with telemetry and an environment for the libraries."""
    port = port_from_environment() if rank() == 0 else None
    telemetry = Telemetry(plan.stage, plan.job, port, stop_requested)
    with tempfile.TemporaryDirectory(prefix="finetune-", ignore_cleanup_errors=True) as temporary, telemetry:
        prepare_environment(plan, Path(temporary))
        logger.info("%s starts", plan.stage.value)
        module = importlib.import_module(STAGE_MODULES[plan.stage])
        adopt_library_logs()
        if stop_requested.is_set():
            raise Interrupted("stopped before the stage began")
        result: Result = module.run(plan, telemetry)
        return result


def _stop_on_signals(stop_requested: threading.Event) -> None:
    """SIGTERM and Ctrl-C ask the stage to save and stop; a second Ctrl-C ends it at once."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stop_requested.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _end_worker(result: Result, code: int) -> NoReturn:
    """Ends at once: threads that wait for a process that is gone may keep the interpreter."""
    leave_end(result, code)
    logging.shutdown()
    os._exit(code)


def write_termination_message(result: Result) -> None:
    """Writes it where the kubelet reads it, or FINETUNE_TERMINATION_LOG says; not outside a pod."""
    named = os.environ.get(TERMINATION_LOG_VARIABLE)
    path = Path(named) if named else TERMINATION_LOG
    if not named and not path.exists():  # the kubelet mounts the file; elsewhere there is no reader
        return
    try:
        path.write_text(result.to_termination_message(), encoding="utf-8")
    except (OSError, ValueError) as error:
        logger.warning("The termination message could not be written to %s: %s", path, error)


if __name__ == "__main__":
    sys.exit(main())
