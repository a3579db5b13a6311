"""`finetune`: runs a FineTuneJob on this machine, or checks its manifest. No cluster is asked for anything."""

import argparse
import asyncio
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

import yaml
from finetune_api.constants import CONTROLLER, ExitCode
from finetune_api.report import EVALUATION_REPORT, EvaluationReport
from finetune_api.rules import local_only
from finetune_api.status import FineTuneJobStatus
from finetune_api.text import visible_lines
from finetune_api.v1alpha1 import FineTuneJob
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from finetune_operator.controller import reconcile
from finetune_operator.decision import Context
from finetune_operator.display import Display, Terminal, current_stage, make_display, print_document, print_evidence
from finetune_operator.local import LocalCluster, LocalLayout
from finetune_operator.manifest_file import ManifestFileError, point_out, read_job
from finetune_operator.observed import Resource
from finetune_operator.run_folder import RunError, RunFolder, admit, is_users_error
from finetune_operator.settings import Settings
from finetune_operator.validate import Request, validate
from finetune_operator.validation_table import make_console, print_validation

SAMPLE_ROWS = 1000
TURN_SECONDS = 0.3
"""Between two looks at the running process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done; 64 the user's to mend; 75 stopped, go on with the same command; 1 anything else."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ManifestFileError as error:
        print(error, file=sys.stderr)
    except RunError as error:
        print(f"finetune: {error}", file=sys.stderr)
    except OSError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("finetune: stopped", file=sys.stderr)
        return ExitCode.TRY_AGAIN
    return ExitCode.USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Fine-tunes a language model as a FineTuneJob manifest says, on this machine.",
        epilog="Exit codes: 0 done, 64 something in manifest or data must be mended, 75 stopped and to be continued, "
        "1 any other failure.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="prepare, train and publish, with live progress",
        description="Runs the job: prepares the data, trains, evaluates and publishes. Run it again after Ctrl-C or a "
        "crash and it goes on from the last checkpoint.",
    )
    run.set_defaults(command=_run)
    run.add_argument("file", type=Path, metavar="FILE", help="manifest of one FineTuneJob (YAML)")
    run.add_argument("--output", type=Path, metavar="DIR", help="folder of the run (runs/NAME beside the manifest)")
    run.add_argument("--fresh", action="store_true", help="discard an earlier run in that folder")
    _add_places(run)

    check = commands.add_parser(
        "check",
        help="check manifests by the API server's rules",
        description="Checks types, bounds and rules of each manifest, without a cluster.",
    )
    check.set_defaults(command=_check)
    check.add_argument("files", type=Path, nargs="+", metavar="FILE", help="manifest of one FineTuneJob (YAML)")

    validate = commands.add_parser(
        "validate",
        help="check a manifest and a sample of its data, without training",
        description="Checks the manifest, then reads a sample of the data and judges it as the job would: cleaning, "
        "labels, splits, the model's tokenizer. Nothing is trained or kept, and no weights are fetched.",
        epilog="Exit codes: 0 valid, 64 errors were found, 75 stopped, 1 the data could not be judged (network).",
    )
    validate.set_defaults(command=_validate)
    validate.add_argument("file", type=Path, metavar="FILE", help="manifest of one FineTuneJob (YAML)")
    validate.add_argument(
        "--sample",
        type=_sample,
        default=SAMPLE_ROWS,
        metavar="N",
        help=f"rows of each source, from the beginnings of its files ({SAMPLE_ROWS}); 'all' or 0 reads everything",
    )
    validate.add_argument(
        "-o", "--output", choices=("table", "json", "yaml"), default="table", help="how to print it (table)"
    )
    validate.add_argument(
        "--report", type=Path, metavar="DIR", help="folder that gets data.html, data.json and quarantine.jsonl"
    )
    validate.add_argument("--strict", action="store_true", help="warnings, too, end with exit code 64")
    _add_places(validate)

    commands.add_parser("version", help="print the version").set_defaults(command=_version)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    """Options for what only a cluster has."""
    parser.add_argument(
        "--volume",
        type=_mapping,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder that stands for a claim (pvc://NAME/...) or a ConfigMap (configmap://NAME/...)",
    )
    parser.add_argument(
        "--secret",
        type=_mapping,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder with the keys of a Secret as files; left out, credentials come from the environment or ~/.aws",
    )


def _sample(text: str) -> int | None:
    """None: all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor 'all'")
    return int(text) or None


def _mapping(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder}")
    return name, Path(folder)


def _version(_: argparse.Namespace) -> int:
    print(version("finetune-operator"))
    return ExitCode.DONE


def _check(options: argparse.Namespace) -> int:
    code = ExitCode.DONE
    for path in options.files:
        try:
            job = read_job(path)
        except ManifestFileError as error:
            print(error)
            code = ExitCode.USER_ERROR
        else:
            findings = local_only(job)
            where = " for `finetune run`; a cluster would refuse it:" if findings else ""
            print(f"{path}: {job.metadata['name']} is valid{where}", *point_out(path, findings), sep="\n")
    return code


def _validate(options: argparse.Namespace) -> int:
    request = Request(options.file, options.sample, dict(options.volume), dict(options.secret), options.report)
    with Terminal(stderr=True).status(Text(f"Validating {options.file}")) if sys.stderr.isatty() else nullcontext():
        validation, code, log = validate(request)
    if options.output == "json":
        print(json.dumps(validation.to_dict(), indent=2))
    elif options.output == "yaml":
        print(yaml.safe_dump(validation.to_dict(), sort_keys=False, allow_unicode=True), end="")
    else:
        print_validation(make_console(), validation)
    if log:
        print(
            "finetune: the data stage ended without a result; the end of its log:",
            visible_lines(log),
            sep="\n",
            file=sys.stderr,
        )
    if options.strict and validation.findings and code == ExitCode.DONE:
        return ExitCode.USER_ERROR
    return code


def _run(options: argparse.Namespace) -> int:
    job = read_job(options.file)
    run = RunFolder(options.output or options.file.parent / "runs" / job.metadata["name"])
    layout = LocalLayout(run.path, options.file.parent, dict(options.volume), dict(options.secret))
    findings = layout.findings(job.spec)
    if findings:
        raise ManifestFileError(*point_out(options.file, findings))
    if job.spec.suspend:
        raise RunError("spec.suspend is true: nothing would run; set it to false")
    if job.spec.managed_by not in (None, CONTROLLER):
        raise RunError(f"spec.managedBy is {job.spec.managed_by}, which is to carry the job out; leave it out")
    with run.locked() as lock:
        return asyncio.run(_follow(options, job, run, layout, lock))


async def _follow(options: argparse.Namespace, job: FineTuneJob, run: RunFolder, layout: LocalLayout, lock: int) -> int:
    """Drives the run to its end, or to a signal, and says how it went."""
    document = admit(run, job, time.time(), options.fresh)
    console = Terminal()
    if Resource.read(document).status.completion_time:
        console.print(f"This run has already ended in {run.path}; --fresh runs it again.", soft_wrap=True)
    display = make_display(console, f"{job.metadata['name']}: {job.spec.task} by {job.spec.method.type}, in {run.path}")
    async with LocalCluster(run, document, layout, display.event, lock) as cluster:
        with display:
            stopped = await _drive(cluster, Context(Settings(), layout), display)
        if stopped:
            return _say_how_to_go_on(cluster.status, options)
        _print_end(console, cluster, Path(layout.workspace(Resource.read(document), job.spec)))
        return _exit_code(cluster.status)


async def _drive(cluster: LocalCluster, context: Context, display: Display) -> bool:
    """The operator's loop, for one job. True if a signal ended it: the first asks to save, the second kills."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            cluster.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        while not stop.is_set():
            await reconcile(cluster, cluster.key, context, time.time())
            status = cluster.status
            display.show(status, cluster.progress)
            if status.phase is not None and status.phase.finished:
                return False
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TURN_SECONDS)
        display.stopping()
        await cluster.stop()
        return True
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _exit_code(status: FineTuneJobStatus) -> int:
    if status.failure is None:
        return ExitCode.DONE
    return ExitCode.USER_ERROR if is_users_error(status.failure) else 1


def _say_how_to_go_on(status: FineTuneJobStatus, options: argparse.Namespace) -> int:
    command = [*_program(), "run", str(options.file)]
    if options.output:
        command += ["--output", str(options.output)]
    for flag, mappings in (("--volume", options.volume), ("--secret", options.secret)):
        for name, folder in mappings:
            command += [flag, f"{name}={folder}"]
    stage = current_stage(status)
    print(f"Stopped{f' in {stage}' if stage else ''}; what is done is kept. Go on with:\n  {shlex.join(command)}")
    return ExitCode.TRY_AGAIN


def _program() -> list[str]:
    """How the user called us, in words that a shell understands."""
    program = Path(sys.argv[0])
    if program.suffix == ".py":
        return [sys.executable, "-m", "finetune_operator.cli"]
    return [program.name if shutil.which(program.name) == sys.argv[0] else sys.argv[0]]


def _print_end(console: Console, cluster: LocalCluster, workspace: Path) -> None:
    """The document, the evidence, and where to find things."""
    status = cluster.status
    print_document(console, cluster.document)
    report = _read_report(workspace / "report" / EVALUATION_REPORT) if status.result else None
    if report is not None:
        print_evidence(console, report)
    failure = status.failure
    if failure is not None:
        console.print(f"Failed: {status.message}", soft_wrap=True)
        log = cluster.log(failure.stage) if failure.stage else None
        if log is not None:
            console.print(f"Log: {log}", soft_wrap=True)
    elif status.result and status.result.artifact:
        artifact = status.result.artifact
        console.print(f"{artifact.format}: {artifact.uri.removeprefix('file://')}", soft_wrap=True)


def _read_report(path: Path) -> EvaluationReport | None:
    try:
        return EvaluationReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


if __name__ == "__main__":
    sys.exit(main())
