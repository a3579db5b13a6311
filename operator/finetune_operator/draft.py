"""The status as it is being worked out: starts from the old one, ends as the new one and its Events."""

from typing import Any

from finetune_api.constants import ConditionType, Phase, Reason, Stage
from finetune_api.progress import Progress, Result, TrainResult
from finetune_api.status import (
    DataStatus,
    FailureStatus,
    FineTuneJobStatus,
    InterruptionStatus,
    MemoryStatus,
    MetricsStatus,
    ProgressStatus,
    ResultStatus,
    decimal,
)

from finetune_operator.cluster import Event
from finetune_operator.conditions import Conditions, shorten
from finetune_operator.diagnose import Trouble
from finetune_operator.observed import Resource, format_time, parse_time

STAGE_SHARE = {Stage.PREPARE: (0, 10), Stage.TRAIN: (10, 95), Stage.PUBLISH: (95, 99)}
"""Percent of the whole job that a stage stands for; 100 is reserved for success."""


OLDEST_WORD_SECONDS = 60.0
"""A trainer is asked every few seconds; what it said longer ago is not known any more."""


def _percentage(stage: Stage, progress: Progress) -> int:
    start, end = STAGE_SHARE[stage]
    return start + int((end - start) * progress.fraction)


def format_duration(seconds: float) -> str:
    """As kubectl shows an age: 45s, 4m10s, 3h12m, 2d4h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60}m"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"


class Draft:
    """Setters for the parts of a status; `status()` and `events` are the outcome."""

    def __init__(self, resource: Resource, now: float) -> None:
        self._old = resource.status
        self._now = now
        self._fields: dict[str, Any] = {
            "observed_generation": resource.generation,
            "start_time": self._old.start_time or format_time(now),
        }
        self.conditions = Conditions(self._old.conditions or (), resource.generation, now)
        self.events: list[Event] = []

    def get(self, field: str) -> Any:
        """The field as it stands now."""
        return self._fields.get(field, getattr(self._old, field))

    def set(self, **fields: Any) -> None:
        self._fields.update(fields)

    def reopen(self) -> None:
        """The job has not ended, whatever a part of the status may say."""
        self.conditions.remove(ConditionType.COMPLETE, ConditionType.FAILED)
        self.set(failure=None, completion_time=None)
        progress: ProgressStatus | None = self.get("progress")
        if progress is not None and progress.percentage == 100:
            self.set(progress=progress.model_copy(update={"percentage": 99}))

    def forget(self) -> None:
        """Nothing of what was done is left."""
        self.conditions.remove(ConditionType.DATA_READY, ConditionType.MEMORY_FITS, ConditionType.GATE_PASSED)
        done = ("data", "model", "resolved", "memory", "metric", "metrics", "progress", "result", "pod_name")
        self.set(**dict.fromkeys(done))

    def confirm(self) -> None:
        """Says of what is done that it is done, also where somebody has taken that away."""
        data: DataStatus | None = self.get("data")
        result: ResultStatus | None = self.get("result")
        if data is not None and not self.conditions.is_true(ConditionType.DATA_READY):
            message = f"{data.rows_kept} rows kept, {data.rows_rejected} rejected, {data.tokens} tokens to train on"
            self.conditions.set(ConditionType.DATA_READY, True, Reason.PREPARED, message)
        if result is None or result.scores is None:
            return
        gate = result.gate
        passed = gate is None or gate.passed
        if self.conditions.get(ConditionType.GATE_PASSED) is None or (
            self.conditions.is_true(ConditionType.GATE_PASSED) is not passed
        ):
            reason = Reason.NO_GATE if gate is None else Reason.PASSED if passed else Reason.GATE_FAILED
            message = gate.message if gate else "the spec asks for no gate"
            self.conditions.set(ConditionType.GATE_PASSED, passed, reason, message)

    def status(self) -> FineTuneJobStatus:
        conditions = self.conditions.to_list() or None
        return self._old.model_copy(update={**self._fields, "conditions": conditions})

    def enter(self, phase: Phase, message: str) -> None:
        """Sets phase and message; a new phase is an Event (a failure has its own)."""
        message = shorten(message)
        if phase is not self._old.phase and phase is not Phase.FAILED:
            self.events.append(Event("Normal", phase.value, message, self._moment(phase)))
        self.set(phase=phase, message=message)

    def _moment(self, what: str) -> str:
        """Tells an Event from an earlier one of the same kind. From what was written before, so that it is the same
        when it is worked out once more."""
        running = next((c for c in self._old.conditions or () if c.type == ConditionType.RUNNING), None)
        since = running.last_transition_time if running else None
        return f"{what}-{self._old.attempt}-{self._fields['observed_generation']}-{since}"

    def running(self, holds: bool, reason: Reason, message: str) -> None:
        self.conditions.set(ConditionType.RUNNING, holds, reason, message)

    def stall(self, message: str, since: str) -> None:
        """It runs, and has not got on `since` this time: a condition, and a Warning when it is new."""
        before = self.conditions.get(ConditionType.RUNNING)
        if before is None or before.reason is not Reason.TRAINING_STALLED:
            reason = Reason.TRAINING_STALLED.value
            self.events.append(Event("Warning", reason, shorten(message), f"{reason}-{since}"))
        self.running(True, Reason.TRAINING_STALLED, message)

    def pause(self) -> None:
        """Nothing runs: what was estimated of the future, and a speed that is not the result's, no longer hold."""
        progress: ProgressStatus | None = self.get("progress")
        metrics: MetricsStatus | None = self.get("metrics")
        if progress is not None:
            self.at(progress.percentage)
        if metrics is not None and self.get("result") is None:
            self.set(metrics=metrics.model_copy(update={"tokens_per_second": None, "samples_per_second": None}))

    def trouble(self, reason: Reason, message: str, key: str) -> None:
        """What keeps a pod from running: a condition, and a Warning when it is new."""
        before = self.conditions.get(ConditionType.RUNNING)
        if before is None or before.reason is not reason:
            self.events.append(Event("Warning", reason.value, shorten(message), key))
        self.running(False, reason, message)
        self.pause()

    @property
    def interruption(self) -> InterruptionStatus | None:
        """What has interrupted the pod that is known to work, or that was the last to; None while nothing has."""
        last: InterruptionStatus | None = self.get("last_interruption")
        worker = self.get("pod_name")
        return last if last is not None and worker is not None and last.pod_name == worker else None

    def interrupt(self, stage: Stage, trouble: Trouble) -> None:
        """The stage ended before its work was done, and is tried again."""
        message, worker = shorten(trouble.message), self.get("pod_name")
        self.set(
            last_interruption=InterruptionStatus(
                stage=stage, reason=trouble.reason, message=message, time=format_time(self._now), pod_name=worker
            )
        )

    def disrupt(self, stage: Stage, trouble: Trouble) -> None:
        """It was interrupted, and has not failed: that is counted apart, and is a Warning."""
        self.interrupt(stage, trouble)
        count = (self.get("disruptions") or 0) + 1
        self.set(disruptions=count)
        message = f"{stage} was interrupted: {trouble.message}"
        self.events.append(Event("Warning", trouble.reason.value, shorten(message), f"{stage}-disruption-{count}"))

    def _count_lost_steps(self, reached: int, progress: Progress) -> None:
        """Training goes on, with the first word of another pod than the one that was interrupted."""
        last: InterruptionStatus | None = self.get("last_interruption")
        is_new = last is not None and last.stage is Stage.TRAIN and last.lost_steps is None and not self.interruption
        if last is not None and is_new:
            begun = progress.resumed_from_step or 0
            known = {"resumed_from_step": begun, "lost_steps": max(0, reached - begun)}
            self.set(last_interruption=last.model_copy(update=known))

    def is_behind(self, stage: Stage, progress: Progress) -> bool:
        """Whether the status knows more of the same pod: it was written by another replica that has asked it later.

        What is known from a time that no word of that pod can be from was not said by it: then its word counts.
        """
        known: ProgressStatus | None = self.get("progress")
        if known is None or self.get("pod_name") not in (None, self._old.pod_name):  # None: it is told to end
            return False
        earlier = (parse_time(known.last_updated_time) or 0.0) - int(progress.updated_at)
        steps = (progress.step or 0, known.step or 0) if progress.step is not None else (0, 0)
        is_less = (_percentage(stage, progress), steps[0]) < (known.percentage, steps[1])
        return is_less and 0 <= earlier < OLDEST_WORD_SECONDS

    def follow(self, stage: Stage, progress: Progress) -> None:
        """Takes over what a running trainer says. After a crash it may be less than before: that is the truth."""
        old: ProgressStatus | None = self.get("progress")
        remaining = progress.estimated_remaining_seconds
        kept = old if old is not None and progress.step is None else None
        if stage is Stage.TRAIN and progress.step is not None:
            self._count_lost_steps((old and old.step) or 0, progress)
        self.set(
            progress=ProgressStatus(
                percentage=_percentage(stage, progress),
                step=kept.step if kept else progress.step,
                total_steps=kept.total_steps if kept else progress.total_steps,
                epoch=kept.epoch if kept else decimal(progress.epoch),
                estimated_remaining_seconds=None if remaining is None else round(remaining),
                eta=None if remaining is None else format_duration(remaining),
                last_updated_time=format_time(progress.updated_at),
            )
        )
        if stage is Stage.TRAIN and progress.training_loss is not None:
            self.set(
                metric=f"loss={decimal(progress.training_loss)}",
                metrics=MetricsStatus(
                    training_loss=decimal(progress.training_loss),
                    evaluation_loss=decimal(progress.evaluation_loss),
                    learning_rate=decimal(progress.learning_rate),
                    tokens_per_second=decimal(progress.tokens_per_second),
                    samples_per_second=decimal(progress.samples_per_second),
                    peak_memory_bytes=progress.peak_memory_bytes,
                ),
            )

    def at(self, percentage: int) -> None:
        """The point between two stages, or the end: nothing remains to be estimated."""
        old: ProgressStatus | None = self.get("progress")
        known = old.model_dump() if old else {"last_updated_time": format_time(self._now)}
        known |= {"percentage": percentage, "estimated_remaining_seconds": None, "eta": None}
        self.set(progress=ProgressStatus.model_validate(known))

    def absorb(self, result: Result) -> None:
        """Takes over what a stage that has ended found out."""
        if result.prepare is not None:
            self.set(data=result.prepare.data, model=result.prepare.model)
        if result.train is not None:
            self._absorb_training(result.train)
        if result.publish is not None:
            known: ResultStatus = self.get("result") or ResultStatus()
            self.set(result=known.model_copy(update={"artifact": result.publish.artifact}))

    def _absorb_training(self, train: TrainResult) -> None:
        old: MetricsStatus = self.get("metrics") or MetricsStatus()
        found = {
            "training_loss": decimal(train.training_loss),
            "evaluation_loss": decimal(train.evaluation_loss),
            "tokens_per_second": decimal(train.tokens_per_second),
            "samples_per_second": decimal(train.samples_per_second),
            "peak_memory_bytes": train.peak_memory_bytes,
        }
        progress: ProgressStatus | None = self.get("progress")
        if progress is not None:
            self.set(progress=progress.model_copy(update={"step": train.steps, "total_steps": train.steps}))
        memory: MemoryStatus | None = self.get("memory")
        if memory is not None:
            self.set(memory=memory.model_copy(update={"peak_bytes": train.peak_memory_bytes}))
        first = train.scores[0] if train.scores else None
        known: ResultStatus | None = self.get("result")
        self.set(
            metrics=old.model_copy(update={name: value for name, value in found.items() if value is not None}),
            metric=f"{first.metric}={first.value}" if first else self.get("metric"),
            result=ResultStatus(
                split=train.split,
                baseline=train.baseline,
                scores=train.scores,
                stopped_early=train.stopped_early,
                gate=train.gate,
                artifact=known.artifact if known else None,
            ),
        )

    def _end(self) -> None:
        """A job that has ended is not suspended, whatever its spec says."""
        if self.conditions.is_true(ConditionType.SUSPENDED):
            self.conditions.set(ConditionType.SUSPENDED, False, Reason.RESUMED, "the job has ended")
        self.set(completion_time=self.get("completion_time") or format_time(self._now))

    def fail(self, failure: FailureStatus) -> None:
        """Ends the job: it stays failed whatever happens to its children."""
        self._end()
        message = f"{failure.stage}: {failure.message}" if failure.stage else failure.message
        if failure.stage is Stage.PREPARE:
            self.conditions.set(ConditionType.DATA_READY, False, failure.reason, failure.message)
        self.conditions.set(ConditionType.FAILED, True, failure.reason, message)
        self.conditions.set(ConditionType.COMPLETE, False, failure.reason, message)
        self.running(False, failure.reason, message)
        if self._old.phase is not Phase.FAILED:
            self.events.append(Event("Warning", failure.reason.value, shorten(message), key="Failed"))
        progress: ProgressStatus | None = self.get("progress")
        if progress is not None:
            self.at(min(progress.percentage, 99))
        self.set(failure=failure)
        self.enter(Phase.FAILED, message)

    def succeed(self, message: str) -> None:
        self._end()
        self.conditions.set(ConditionType.COMPLETE, True, Reason.SUCCEEDED, message)
        self.running(False, Reason.SUCCEEDED, message)
        self.at(100)
        self.enter(Phase.SUCCEEDED, message)
