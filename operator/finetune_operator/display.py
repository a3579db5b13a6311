"""What `finetune run` shows: a live picture at a terminal, plain lines in a pipe, and the evidence at the end."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import yaml
from finetune_api.constants import Phase, Stage
from finetune_api.progress import Progress
from finetune_api.report import EVALUATION_REPORT, Evaluation, EvaluationReport
from finetune_api.status import FineTuneJobStatus, MemoryStatus
from finetune_api.text import visible_lines
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from finetune_operator.cluster import Event
from finetune_operator.draft import format_duration

LINE_SECONDS = 10.0
"""Between two plain lines while nothing but the numbers changes."""

PHASE_STAGES = {
    Phase.PENDING: Stage.PREPARE,
    Phase.PREPARING: Stage.PREPARE,
    Phase.QUEUED: Stage.TRAIN,
    Phase.TRAINING: Stage.TRAIN,
    Phase.PUBLISHING: Stage.PUBLISH,
}
BAR_WIDTH = 32
MESSAGES = 3
"""Warnings that stay in sight."""

MOST_CLASSES = 16
"""That are shown one by one."""

STOPPING = "saving what is done; once more to stop at once"


class Display(Protocol):
    """Follows a run. Use as a context manager; print nothing else meanwhile."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...

    def show(self, status: FineTuneJobStatus, progress: Progress | None) -> None:
        """Called at every turn with all that is known."""

    def event(self, event: Event) -> None:
        """Called once for each Event."""

    def stopping(self) -> None:
        """Called when the run was asked to stop; the running stage saves what it has."""


class Terminal(Console):
    """Prints text and nothing but text: what a label, a message or a path holds has no power over the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible_lines(segment.text), segment.style)


def make_display(console: Console, title: str) -> Display:
    return LiveDisplay(console, title) if console.is_terminal else PlainDisplay(console)


class PlainDisplay:
    """A line for each phase, one every ten seconds, and one for each warning."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase: Phase | None = None
        self._printed = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, status: FineTuneJobStatus, progress: Progress | None) -> None:
        now = time.monotonic()
        if status.phase is None or (status.phase is self._phase and now - self._printed < LINE_SECONDS):
            return
        self._phase, self._printed = status.phase, now
        numbers = "" if status.phase.finished else describe_numbers(progress)
        self._line(status.phase, numbers or status.message or "")

    def event(self, event: Event) -> None:
        if event.type == "Warning":
            self._line("Warning", f"{event.reason}: {event.message}")

    def stopping(self) -> None:
        self._line("Stopping", STOPPING)

    def _line(self, word: str, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')}  {word:<11} {text}", soft_wrap=True)


class LiveDisplay:
    """The three stages with their bars and numbers, drawn again several times a second."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._spinner = Spinner("dots", style="cyan")
        self._status = FineTuneJobStatus()
        self._progress: Progress | None = None
        self._warnings: list[str] = []
        self._begun: dict[Stage, float] = {}
        self._took: dict[Stage, float] = {}
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, status: FineTuneJobStatus, progress: Progress | None) -> None:
        self._status, self._progress = status, progress
        now, current = time.monotonic(), current_stage(status)
        if current is not None:
            self._begun.setdefault(current, now)
        for stage, begun in self._begun.items():
            if stage is not current:
                self._took.setdefault(stage, now - begun)

    def event(self, event: Event) -> None:
        if event.type == "Warning":
            self._warn(f"{event.reason}: {event.message}")

    def stopping(self) -> None:
        self._warn(f"Stopping: {STOPPING}")

    def _warn(self, text: str) -> None:
        self._warnings = [*self._warnings, text][-MESSAGES:]

    def _render(self) -> RenderableType:
        status = self._status
        table = Table.grid(padding=(0, 2))
        for stage in Stage:
            mark, bar, note = self._stage(stage)
            table.add_row(mark, str(stage), bar, note)
        lines: list[RenderableType] = [Text(self._title, style="bold"), table]
        numbers = describe_numbers(self._progress)
        if current_stage(status) is not None:
            lines.append(Text(f"   {numbers or status.message or ''}", style="cyan"))
        lines += [Text(f" ! {warning}", style="yellow") for warning in self._warnings]
        return Group(*lines)

    def _stage(self, stage: Stage) -> tuple[RenderableType, RenderableType, RenderableType]:
        """Mark, bar and note of one stage."""
        status, current = self._status, current_stage(self._status)
        failed = status.failure is not None and status.failure.stage is stage
        if failed:
            return Text("✗", style="red"), self._bar(0.0), Text("failed", style="red")
        if is_done(status, stage):
            took = f"{format_duration(self._took[stage])}" if stage in self._took else ""
            return (
                Text("✓", style="green"),
                self._bar(1.0),
                Text("  ".join(filter(None, (took, outcome(status, stage))))),
            )
        if stage is not current:
            return Text("·", style="dim"), self._bar(0.0), Text("")
        fraction = self._progress.fraction if self._progress and self._progress.stage is stage else 0.0
        note = f"{fraction:4.0%}  {format_duration(time.monotonic() - self._begun[stage])}"
        return self._spinner, self._bar(fraction), Text(note)

    @staticmethod
    def _bar(fraction: float) -> ProgressBar:
        return ProgressBar(total=1.0, completed=fraction, width=BAR_WIDTH)


def current_stage(status: FineTuneJobStatus) -> Stage | None:
    """The stage that the job is in, or waits for; None before the first and after the end."""
    return PHASE_STAGES.get(status.phase) if status.phase else None


def is_done(status: FineTuneJobStatus, stage: Stage) -> bool:
    """Whether the stage's outcome stands in the status."""
    result = status.result
    match stage:
        case Stage.PREPARE:
            return status.data is not None
        case Stage.TRAIN:
            return result is not None and result.scores is not None
        case Stage.PUBLISH:
            return result is not None and result.artifact is not None


def outcome(status: FineTuneJobStatus, stage: Stage) -> str:
    """What a stage that is done has brought, in a few words."""
    data, result = status.data, status.result
    match stage:
        case Stage.PREPARE if data:
            return f"{data.train_rows} rows to train on, {data.validation_rows} validation, {data.test_rows} test"
        case Stage.TRAIN if result and result.scores:
            scores = ", ".join(f"{score.metric} {score.value}" for score in result.scores)
            return "; ".join(filter(None, (scores, result.stopped_early, _describe_memory(status.memory))))
        case Stage.PUBLISH if result and result.artifact:
            return f"{result.artifact.format}, {result.artifact.size_bytes / 1e6:.1f} MB"
    return ""


def _describe_memory(memory: MemoryStatus | None) -> str:
    if memory is None or memory.peak_bytes is None:
        return ""
    return f"memory {memory.peak_bytes / 2**30:.1f} GiB ({memory.estimate_bytes / 2**30:.1f} expected)"


def describe_numbers(progress: Progress | None) -> str:
    """The running stage in one line: what it does, step, losses, speed, time left."""
    if progress is None:
        return ""
    parts = [progress.activity]
    if progress.step is not None and progress.total_steps:
        parts.append(f"step {progress.step}/{progress.total_steps}")
    else:
        parts.append(f"{progress.fraction:.0%}")
    for name, value, form in (
        ("loss", progress.training_loss, ".3f"),
        ("validation loss", progress.evaluation_loss, ".3f"),
        ("lr", progress.learning_rate, ".1e"),
    ):
        if value is not None:
            parts.append(f"{name} {value:{form}}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.estimated_remaining_seconds is not None:
        parts.append(f"ETA {format_duration(progress.estimated_remaining_seconds)}")
    return "  ".join(parts)


def print_document(console: Console, document: Mapping[str, Any]) -> None:
    """The resource as `kubectl get -o yaml` shows it."""
    text = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=10_000)
    console.print(text, soft_wrap=True)


def print_evidence(console: Console, report: EvaluationReport) -> None:
    """Tuned model against baseline on the held-out split: scores, F1 per class, confusion matrix."""
    tuned, baseline = report.tuned, report.baseline
    console.print(_score_table(f"{report.split} split, {report.rows} rows", tuned, baseline))
    if tuned.classes and len(tuned.classes) > MOST_CLASSES:
        console.print(
            f"F1 and confusion of {len(tuned.classes)} classes: see report/{EVALUATION_REPORT} in the workspace"
        )
    elif tuned.classes and tuned.confusion:
        console.print(_confusion_table([scores.label for scores in tuned.classes], tuned.confusion))


def _score_table(title: str, tuned: Evaluation, baseline: Evaluation) -> Table:
    table = Table("", tuned.name, baseline.name, "gain", title=title, title_justify="left")
    rows = [(Text(name), value, baseline.metrics.get(name)) for name, value in tuned.metrics.items()]
    if len(tuned.classes or ()) <= MOST_CLASSES:
        before = {scores.label: scores.f1 for scores in baseline.classes or ()}
        rows += [(Text(f"F1 {scores.label}"), scores.f1, before.get(scores.label)) for scores in tuned.classes or ()]
    for name, value, old in rows:
        table.add_row(name, f"{value:.3f}", *(("", "") if old is None else (f"{old:.3f}", f"{value - old:+.3f}")))
    _align(table)
    return table


def _confusion_table(labels: list[str], confusion: list[list[int]]) -> Table:
    title = "confusion: true down, predicted across"
    table = Table("", *(Column(Text(label)) for label in labels), title=title, title_justify="left")
    for label, row in zip(labels, confusion, strict=True):
        table.add_row(Text(label), *map(str, row))
    _align(table)
    return table


def _align(table: Table) -> None:
    """Numbers to the right."""
    for column in table.columns[1:]:
        column.justify = "right"
