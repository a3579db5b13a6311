"""`finetune validate`: judges a manifest and a sample of its data as a job would, on this machine, and leaves nothing.

The data is judged by the trainer's own stage, prepare, in a process of its own and a temporary folder. It reads a
sample and fetches of the model what a tokenizer needs, no weights.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finetune_api.constants import ExitCode, Reason, Stage
from finetune_api.kubernetes import LocalReference
from finetune_api.plan import Location, Plan, PlanSample
from finetune_api.progress import Result
from finetune_api.report import DATA_PAGE, DATA_REPORT, QUARANTINE, DataFinding, DataReport, Level, Remark
from finetune_api.rules import Finding, local_only
from finetune_api.v1alpha1 import FineTuneJob
from finetune_api.validation import Validation, ValidationFinding
from pydantic import ValidationError

from finetune_operator.local import LocalLayout
from finetune_operator.local_job import TETHER, TRAINER
from finetune_operator.manifest_file import ManifestFileError, point_out, read_job
from finetune_operator.observed import Resource
from finetune_operator.plans import build_plan
from finetune_operator.run_folder import RunError, created

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL: there is nothing to save."""

LOG_LINES = 20
"""Of a stage that ended without a word."""

REPORTS = (DATA_REPORT, DATA_PAGE, QUARANTINE)


@dataclass(frozen=True)
class Request:
    """`rows`: most of each source; None: all. `report`: folder that gets the reports."""

    file: Path
    rows: int | None
    volumes: Mapping[str, Path] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    report: Path | None = None


class Validated(NamedTuple):
    """`code`: the exit code. `log`: the end of the stage's log, if it failed without a word."""

    validation: Validation
    code: int
    log: str = ""


class _Ended(NamedTuple):
    code: int
    result: Result | None
    log: str


def validate(request: Request) -> Validated:
    """Raises KeyboardInterrupt on SIGINT, SIGTERM and SIGHUP, OSError if a folder cannot be made."""
    try:
        job = read_job(request.file)
    except ManifestFileError as error:
        wrong = [
            ValidationFinding(
                level=Level.ERROR,
                reason=Reason.INVALID_SPEC,
                field=problem.field or None,
                message=problem.message,
                line=problem.line,
            )
            for problem in error.found
        ]
        return _validated(request, None, wrong, None)
    found = [*_cluster_only(job), *_out_of_reach(job, request)]
    if any(finding.level is Level.ERROR for finding in found):
        return _validated(request, job, _located(request.file, found), None)
    if request.report is not None:
        request.report.mkdir(parents=True, exist_ok=True)
    tokenize = all(finding.reason is not Remark.MODEL_UNREACHABLE for finding in found)
    with _signals_interrupt(), tempfile.TemporaryDirectory(prefix="finetune-validate-") as folder:
        ended, report = _judge_data(job, request, Path(folder), tokenize)
    if report is not None:
        found += [_in_spec(finding) for finding in report.findings]
    if not (report and any(finding.level is Level.ERROR for finding in found)):
        found += _failure(ended)
    return _validated(request, job, _located(request.file, found), report, ended)


class _SampleLayout(LocalLayout):
    """Where things lie for the stage that reads a sample. What is only in a cluster keeps its name."""

    def __init__(self, folder: Path, request: Request) -> None:
        super().__init__(folder, request.file.parent, request.volumes, request.secrets)

    def locate(self, uri: str, secret: LocalReference | None) -> Location:
        try:
            return super().locate(uri, secret)
        except RunError:
            return Location(uri=uri)


def _out_of_reach(job: FineTuneJob, request: Request) -> Iterator[DataFinding]:
    """Sources without which nothing can be judged, and the model, without which the data alone is. Whatever else the
    job would need is not needed here.
    """
    layout = LocalLayout(Path(tempfile.gettempdir()), request.file.parent, request.volumes, request.secrets)
    for found in layout.findings(job.spec):
        if found.field.startswith("spec.dataset."):
            yield DataFinding(level=Level.ERROR, reason=Reason.DATA_NOT_FOUND, field=found.field, message=found.message)
        elif found.field.startswith("spec.model."):
            message = f"{found.message}. Without it tokens are not counted"
            yield DataFinding(level=Level.WARNING, reason=Remark.MODEL_UNREACHABLE, field=found.field, message=message)


def _cluster_only(job: FineTuneJob) -> Iterator[DataFinding]:
    for found in local_only(job):
        message = f"a cluster would refuse it: {found.message}"
        yield DataFinding(level=Level.WARNING, reason=Remark.CLUSTER_ONLY, field=found.field, message=message)


def _judge_data(job: FineTuneJob, request: Request, folder: Path, tokenize: bool) -> tuple[_Ended, DataReport | None]:
    resource = Resource.read(created(job, job.spec.to_dict(), time.time()))
    plan = build_plan(resource, job.spec, Stage.PREPARE, _SampleLayout(folder, request))
    workspace = folder / "workspace"
    sample = PlanSample(rows=request.rows, tokenize=tokenize)
    ended = _run_prepare(plan.model_copy(update={"workspace": str(workspace), "cache": None, "sample": sample}), folder)
    reports = workspace / "report"
    if request.report is not None:
        for name in REPORTS:
            with suppress(FileNotFoundError):
                shutil.copyfile(reports / name, request.report / name)
    try:
        return ended, DataReport.model_validate_json((reports / DATA_REPORT).read_bytes())
    except FileNotFoundError:
        return ended, None


def _run_prepare(plan: Plan, folder: Path) -> _Ended:
    """The stage as `finetune run` starts it. Whatever ends this function ends the process, too."""
    paths = {name: folder / name for name in ("plan.json", "result.json", "log", "tmp")}
    paths["plan.json"].write_text(plan.to_json(), encoding="utf-8")
    paths["tmp"].mkdir()
    environment = os.environ | {
        "FINETUNE_TELEMETRY_HOST": "127.0.0.1",
        "FINETUNE_TELEMETRY_PORT": "0",
        "FINETUNE_TERMINATION_LOG": str(paths["result.json"]),
        "TMPDIR": str(paths["tmp"]),
    }
    with paths["log"].open("wb") as log:
        process = subprocess.Popen(
            [*TETHER, str(os.getpid()), *TRAINER, plan.stage.value, "--plan", str(paths["plan.json"])],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal is for us; we pass it on
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # processes of its own among them
            process.wait()
    try:
        result = Result.model_validate_json(paths["result.json"].read_bytes())
    except (FileNotFoundError, ValidationError):
        result = None
    lines = paths["log"].read_text(encoding="utf-8", errors="replace").splitlines()
    return _Ended(code, result, "\n".join(lines[-LOG_LINES:]))


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(ended: _Ended) -> list[DataFinding]:
    """What a stage says that did not succeed, and did not say it in the report."""
    if ended.code == ExitCode.DONE:
        return []
    reason, message = Reason.STAGE_FAILED, f"the data could not be judged: exit code {ended.code}"
    if ended.code < 0:
        message = f"the data could not be judged: its process was ended by {signal.Signals(-ended.code).name}"
    if ended.result is not None and ended.result.message:
        reason, message = ended.result.reason or reason, ended.result.message
    return [DataFinding(level=Level.ERROR, reason=reason, message=message)]


def _in_spec(finding: DataFinding) -> DataFinding:
    return finding.model_copy(update={"field": f"spec.{finding.field}"}) if finding.field else finding


def _located(path: Path, findings: Iterable[DataFinding]) -> list[ValidationFinding]:
    """With their lines; errors first, then in the order of the file."""
    located = [
        ValidationFinding(
            **dict(found), line=point_out(path, [Finding(found.field, "")])[0].line if found.field else None
        )
        for found in findings
    ]
    return sorted(located, key=lambda found: (found.level is not Level.ERROR, found.line or 0))


def _validated(
    request: Request,
    job: FineTuneJob | None,
    findings: list[ValidationFinding],
    data: DataReport | None,
    ended: _Ended | None = None,
) -> Validated:
    valid = all(finding.level is not Level.ERROR for finding in findings)
    name = job.metadata["name"] if job else None
    validation = Validation(manifest=str(request.file), job=name, valid=valid, findings=findings, data=data)
    if ended is not None and ended.code not in (ExitCode.DONE, ExitCode.USER_ERROR):
        return Validated(validation, 1, "" if ended.result else ended.log)
    return Validated(validation, ExitCode.DONE if valid else ExitCode.USER_ERROR)
