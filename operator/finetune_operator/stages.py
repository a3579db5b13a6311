"""The walk through the stages of one job: which one it is in, what that one needs, what is said of it. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune_api.constants import ConditionType, Phase, Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Progress, Result
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FailureStatus, FineTuneJobStatus, MemoryStatus, ResultStatus

from finetune_operator import kueue
from finetune_operator.cluster import Event
from finetune_operator.conditions import shorten
from finetune_operator.decision import Context, Decision
from finetune_operator.diagnose import Trouble, culprit, refusal, stage_failure, waiting_trouble
from finetune_operator.draft import STAGE_SHARE, Draft
from finetune_operator.evidence import has_outcome
from finetune_operator.interruptions import note_interruption
from finetune_operator.lost_children import is_missing, lacks_something, lost_children
from finetune_operator.observed import (
    Manifest,
    Observed,
    Resource,
    condition_of,
    container_of,
    deadline_of,
    failures_of,
    format_time,
    has_ended,
    has_failed,
    is_leaving,
    is_pending,
    is_running,
    is_suspended,
    is_suspended_by_us,
    newest_of_each_node,
    nodes_of,
    parse_time,
    result_of,
    suspension,
)
from finetune_operator.plans import build_plan, plan_memory
from finetune_operator.render import render_stage
from finetune_operator.resolved import resolved_status
from finetune_operator.sizing import advise, explain

LOOK_AGAIN_SECONDS = 5.0
"""For what no watch tells: Events about a pod that does not start."""

OVERDUE_SECONDS = 30.0
"""A pod that has not ended so long after its grace period is on a node that does not answer."""

QUEUE_SECONDS = 10.0
"""Nor does one tell of what a queue says of a Job that waits in it."""

UNKNOWN_LIMIT = {
    True: "how much a GPU has is not known: give resources.gpuMemory to have it compared",
    False: "how much there is is not known: give resources.limits.memory to have it compared",
}

WORKING = {Stage.PREPARE: Phase.PREPARING, Stage.TRAIN: Phase.TRAINING, Stage.PUBLISH: Phase.PUBLISHING}
WAITING = {Stage.PREPARE: Phase.PENDING, Stage.TRAIN: Phase.QUEUED, Stage.PUBLISH: Phase.PUBLISHING}


def _is_tried_again(job: Manifest, ended: Sequence[Manifest]) -> bool:
    """Whether the Job has noticed that its pods have ended, one of them badly, and does not give up."""
    still_active = (job.get("status") or {}).get("active")
    return any(map(has_failed, ended)) and not still_active and condition_of(job, "FailureTarget") is None


@dataclass(frozen=True)
class Walk:
    """One pass over the stages, from the first to the one that the job is in."""

    resource: Resource
    spec: FineTuneJobSpec
    observed: Observed
    now: float
    context: Context
    draft: Draft

    def go(self) -> Decision:
        if self.spec.suspend:  # what ends now was asked to by the user: no interruption
            self.draft.set(pod_name=None)
        self.draft.confirm()
        for stage in Stage:
            if has_outcome(self.draft.status(), stage):
                continue
            job = self.observed.jobs.get(stage)
            if job is None:
                return self._begin(stage)
            if "deletionTimestamp" in job["metadata"]:
                return self._let_go(stage)
            if condition_of(job, "Failed"):
                return self._fail(stage, job)
            if not condition_of(job, "Complete"):
                return self._at_work(stage, job)
            result = self.observed.result(stage)
            if result is None:
                return self._without_result(stage, job)
            self._finish(stage, result)
        self.draft.succeed(success_message(self.draft.status()))
        return self._decision()

    def _decision(
        self,
        *,
        create: Sequence[Manifest] = (),
        change: Mapping[Stage, Manifest] | None = None,
        restart: Sequence[Stage] = (),
        requeue_after: float | None = None,
    ) -> Decision:
        return Decision(
            status=self.draft.status(),
            create=create,
            change=change or {},
            restart=restart,
            events=tuple(self.draft.events),
            requeue_after=requeue_after,
        )

    def _at_work_later(self, stage: Stage) -> list[Stage]:
        """Stages after this one whose Jobs have not ended. They began when the status knew more than it does now."""
        later = list(Stage)[list(Stage).index(stage) + 1 :]
        return [each for each in later if each in self.observed.jobs and not has_ended(self.observed.jobs[each])]

    def _begin(self, stage: Stage) -> Decision:
        """Creates the stage's children; in their first moment they wait, as far as the status knows."""
        self._note_lost_job(stage)
        too_early = self._at_work_later(stage)
        if too_early:  # one writer on the workspace at a time
            self._wait(stage, Reason.POD_STARTING, f"{stage} runs again when {too_early[0]} has stopped")
            return self._decision(restart=too_early, requeue_after=LOOK_AGAIN_SECONDS)
        self.draft.set(pod_name=None)
        if self.spec.suspend and self._is_queued(stage):
            self._wait(stage, Reason.SUSPENDED_BY_USER, "")
            return self._decision()
        resource = replace(self.resource, status=self.draft.status())
        plan = build_plan(resource, self.spec, stage, self.context.layout)
        if stage is Stage.TRAIN and not self._fits(plan, resource):
            return self._decision()
        children = self._render(plan, resource)
        self.draft.set(attempt=1)
        if stage is not Stage.PUBLISH:  # training is over: what its device decided stands in the status
            self.draft.set(resolved=resolved_status(plan, None, None))
        if stage is Stage.PREPARE:
            self.draft.conditions.set(ConditionType.DATA_READY, False, Reason.PREPARING, "the data is being prepared")
        self._wait(stage, Reason.POD_STARTING, f"{stage} is starting")
        return self._decision(create=tuple(children))

    def _let_go(self, stage: Stage) -> Decision:
        """The stage's Job is being deleted, by us or by somebody else; it is made again when it is gone."""
        self._note_lost_job(stage)
        if any(map(is_running, self.observed.pods.get(stage, ()))):
            return self._decision(requeue_after=self._take_leave(stage))
        self._wait(stage, Reason.POD_STARTING, f"{stage} starts again: its Job is being deleted")
        return self._decision(requeue_after=LOOK_AGAIN_SECONDS)

    def _render(self, plan: Plan, resource: Resource) -> list[Manifest]:
        context = self.context
        return render_stage(resource, self.spec, plan, context.settings, context.layout, suspended=self.spec.suspend)

    def _lost_children(self, stage: Stage) -> tuple[Manifest, ...]:
        resource = replace(self.resource, status=self.draft.status())
        interrupted = resource.status.last_interruption != self.resource.status.last_interruption
        if not interrupted and stage not in self.observed.exposed and not lacks_something(self.observed, stage):
            return ()
        children = self._render(build_plan(resource, self.spec, stage, self.context.layout), resource)
        return lost_children(children, self.observed, stage, interrupted=interrupted)

    def _workspace_is_gone(self, stage: Stage) -> bool:
        """The job's own: one that the spec names is the user's to bring back."""
        claim = f"{self.resource.key.name}-workspace"
        is_own = self.spec.workspace.claim_name is None
        return is_own and is_missing("PersistentVolumeClaim", claim, self.observed, stage)

    def _begin_anew(self, stage: Stage) -> Decision:
        """All that the stages before have left was on the volume."""
        message = f"{stage} has lost its workspace: the claim was deleted; the job begins again"
        self.draft.events.append(Event("Warning", Reason.STAGE_FAILED.value, message, self.draft.get("start_time")))
        self.draft.forget()
        self._wait(Stage.PREPARE, Reason.POD_STARTING, message)
        return self._decision(restart=tuple(self.observed.jobs), requeue_after=LOOK_AGAIN_SECONDS)

    def _note_lost_job(self, stage: Stage) -> None:
        """The Job of a stage that was at work is gone, or goes."""
        if self.draft.get("pod_name") is not None and self.draft.interruption is None:
            self.draft.disrupt(stage, Trouble(Reason.DISRUPTED, "its Job was deleted"))

    def _fits(self, plan: Plan, resource: Resource) -> bool:
        """Reports the memory plan; a job that cannot fit fails before it asks for a GPU."""
        memory = plan_memory(plan, resource, self.spec)
        if memory is None:
            return True
        message = explain(memory)
        self.draft.set(memory=MemoryStatus(estimate_bytes=memory.memory.total, limit_bytes=memory.limit))
        if memory.limit is None:
            message = f"{message}; {UNKNOWN_LIMIT[memory.gpus > 0]}"
            self.draft.conditions.set(ConditionType.MEMORY_FITS, None, Reason.LIMIT_UNKNOWN, message)
        elif memory.fits:
            self.draft.conditions.set(ConditionType.MEMORY_FITS, True, Reason.FITS, message)
        else:
            message = f"{message}. To make it fit, {advise(memory, self.spec)}"
            self.draft.conditions.set(ConditionType.MEMORY_FITS, False, Reason.INSUFFICIENT_MEMORY, message)
            self.draft.set(resolved=resolved_status(plan, None, None))
            self.draft.fail(
                FailureStatus(stage=Stage.TRAIN, reason=Reason.INSUFFICIENT_MEMORY, message=shorten(message))
            )
        return memory.fits

    def _wait(self, stage: Stage, reason: Reason, message: str) -> None:
        if self.spec.suspend:
            reason, message = Reason.SUSPENDED_BY_USER, "no pod runs while spec.suspend is true"
        self.draft.running(False, reason, message)
        self.draft.pause()
        self._enter(WAITING[stage], message)

    def _enter(self, phase: Phase, message: str) -> None:
        if self.spec.suspend:
            phase, message = Phase.SUSPENDED, "spec.suspend is true; what is done is kept"
        self.draft.enter(phase, message)

    def _at_work(self, stage: Stage, job: Manifest) -> Decision:
        if stage is not Stage.PREPARE and self._workspace_is_gone(stage):
            return self._begin_anew(stage)
        decision = self._stay(stage, job)
        return decision if decision.restart else replace(decision, create=self._lost_children(stage))

    def _stay(self, stage: Stage, job: Manifest) -> Decision:
        """The stage's Job is at work: says how far it is, or what it waits for."""
        pods = self.observed.pods.get(stage, ())
        failures = failures_of(job, pods)
        attempt = min(failures, job["spec"].get("backoffLimitPerIndex", failures)) + 1  # after the last one is no next
        note_interruption(self.draft, stage, self.observed, attempt)
        if self.spec.suspend and self._is_queued(stage):
            self._wait(stage, Reason.SUSPENDED_BY_USER, "")
            return self._decision(restart=(stage,))
        change = self._changes(stage, job)
        newest = newest_of_each_node(pods)
        running = [pod for pod in newest if is_running(pod)]
        starting = [pod for pod in newest if is_pending(pod)]
        absent = nodes_of(job) - len(newest)
        if running and not starting and not absent:
            if self.spec.suspend or is_suspended(job) or any(map(is_leaving, newest)):
                return self._decision(change=change, requeue_after=self._take_leave(stage))
            self.draft.set(pod_name=newest[0]["metadata"]["name"])
            return self._decision(change=change, requeue_after=self._report(stage, running[0]))
        if not starting and not absent and not _is_tried_again(job, newest) and not self.spec.suspend:
            # its Job has not judged yet how the last pod has ended
            self._between(stage, f"the {stage} pod has ended")
            return self._decision(change=change)
        trouble = self._trouble(starting, absent)
        if trouble is not None and not self.spec.suspend:
            self.draft.trouble(trouble.reason, trouble.message, key=f"{stage}-{attempt}")
            self._enter(WAITING[stage], trouble.message)
        elif is_suspended(job) and not self.spec.suspend and not is_suspended_by_us(job):
            self._wait(stage, Reason.QUEUED, f"{stage} waits {self._describe_queue()}")
        else:
            again = f" again (attempt {attempt})" if attempt > 1 else " again" if self.draft.interruption else ""
            some = f": {len(running)} of {nodes_of(job)} pods run" if running else ""
            self._wait(stage, Reason.POD_STARTING, f"{stage} is starting{again}{some}")
        return self._decision(change=change, requeue_after=self._patience(job))

    def _describe_queue(self) -> str:
        """What a Job waits for that another controller has suspended."""
        queue = self._queue()
        if queue is None:
            return "for the controller that has suspended its Job"
        words = kueue.why_waiting(self.observed.workload)
        if words is None and not self.context.settings.kueue:
            words = "why is not known, for the chart's value kueue.enabled is off"
        return f"in queue {queue}: {words}" if words else f"in queue {queue}"

    def _patience(self, job: Manifest) -> float | None:
        """Seconds until it is worth to look again at a Job that does not run."""
        if is_suspended(job) and not (kueue.is_queued(job) and self.context.settings.kueue):
            return None
        return QUEUE_SECONDS if kueue.why_waiting(self.observed.workload) else LOOK_AGAIN_SECONDS

    def _take_leave(self, stage: Stage) -> float | None:
        """Its pods have been told to end, and save what they have: what they still say is heard.

        Returns the seconds after which the first of them would be overdue: no other pod is made before it has ended.
        """
        progress = self.observed.progress
        if progress is not None and progress.stage is stage and not self.draft.is_behind(stage, progress):
            self.draft.follow(stage, progress)
        last = self.draft.interruption
        what = f"{stage} saves and ends: {last.message}" if last else f"{stage} saves and ends"
        first = min(filter(is_running, self.observed.pods.get(stage, ())), key=deadline_of, default=None)
        left = deadline_of(first) + OVERDUE_SECONDS - self.now if first else math.inf
        if first is not None and left <= 0:
            name, node = first["metadata"]["name"], first["spec"].get("nodeName")
            what = f"pod {name} does not end, and no other may start: is node {node} gone for good, delete the Node"
        self.draft.running(True, last.reason if last else Reason.POD_RUNNING, what)
        self._enter(WORKING[stage], what)
        return left if 0 < left < math.inf else None

    def _between(self, stage: Stage, message: str) -> None:
        """Nothing runs, and what comes next is not known yet."""
        self.draft.running(False, Reason.BETWEEN_STAGES, message)
        self._enter(WORKING[stage], message)

    def _trouble(self, starting: Sequence[Manifest], absent: int) -> Trouble | None:
        """Why a pod does not run, or is not even there; None while it is only a matter of time."""
        troubles = (waiting_trouble(pod, self.observed.events) for pod in starting)
        return next(filter(None, troubles), refusal(self.observed.events) if absent else None)

    def _is_queued(self, stage: Stage) -> bool:
        """Kueue alone says when such a Job runs, and would take our `suspend` back: to suspend it we delete it."""
        return stage is Stage.TRAIN and self._queue() is not None

    def _queue(self) -> str | None:
        return self.spec.scheduling.queue_name if self.spec.scheduling else None

    def _changes(self, stage: Stage, job: Manifest) -> dict[Stage, Manifest]:
        """What the user may edit while the Job exists: suspend and limits.

        A Job that we did not suspend is another controller's to resume (Kueue may manage Jobs without a queue too).
        """
        limits = self.spec.limits
        wanted = {"activeDeadlineSeconds": limits.active_deadline_seconds or None}
        if "backoffLimitPerIndex" not in job["spec"]:  # which is immutable
            wanted["backoffLimit"] = limits.retries
        fields = {name: value for name, value in wanted.items() if job["spec"].get(name) != value}
        patch: Manifest = {}
        if is_suspended(job) != self.spec.suspend and (self.spec.suspend or is_suspended_by_us(job)):
            patch = suspension(self.spec.suspend)
        if fields:
            patch = {**patch, "spec": {**patch.get("spec", {}), **fields}}
        return {stage: patch} if patch else {}

    def _report(self, stage: Stage, pod: Manifest) -> float | None:
        """How far the running stage is, in the words of `pod`; the seconds after which it would count as stalled."""
        progress = self.observed.progress
        if progress is not None and progress.stage is not stage:
            progress = None
        if progress is not None and self.draft.is_behind(stage, progress):
            self._enter(WORKING[stage], self.draft.get("message") or "")
            return LOOK_AGAIN_SECONDS
        if progress is not None:
            self.draft.follow(stage, progress)
        if stage is Stage.TRAIN and progress is not None:
            resource = replace(self.resource, status=self.draft.status())
            plan = build_plan(resource, self.spec, stage, self.context.layout)
            self.draft.set(resolved=resolved_status(plan, progress, None))
        what = _describe(progress) if progress else f"{stage} runs"
        alive = self._last_sign_of_life(pod) if stage is Stage.TRAIN else self.now
        left = alive + self.spec.limits.stall_seconds - self.now
        if left > 0:
            self.draft.running(True, Reason.POD_RUNNING, f"the {stage} pod runs")
        else:
            since, name = format_time(alive), pod["metadata"]["name"]
            what = f"no sign of progress since {since} ({what}): look at the log of pod {name}"
            self.draft.stall(what, since)
        self._enter(WORKING[stage], what)
        return left if left > 0 and stage is Stage.TRAIN else None

    def _last_sign_of_life(self, pod: Manifest) -> float:
        """When training last got on: its own word, which the status keeps while the operator is away or the pod does
        not answer, or the start of its container.
        """
        progress = self.draft.get("progress")
        began = ((container_of(pod).get("state") or {}).get("running") or {}).get("startedAt")
        known = parse_time(progress.last_updated_time if progress else None), parse_time(began)
        return max(filter(None, known), default=self.now)

    def _finish(self, stage: Stage, result: Result) -> None:
        """A stage has ended well."""
        self.draft.set(pod_name=None)
        self.draft.absorb(result)
        self.draft.at(STAGE_SHARE[stage][1])
        self.draft.running(False, Reason.BETWEEN_STAGES, f"{stage} is done")
        self.draft.confirm()
        if stage is Stage.TRAIN:
            resource = replace(self.resource, status=self.draft.status())
            plan = build_plan(resource, self.spec, Stage.TRAIN, self.context.layout)
            self.draft.set(resolved=resolved_status(plan, None, result.train))

    def _fail(self, stage: Stage, job: Manifest) -> Decision:
        pods = self.observed.pods.get(stage, ())
        failure = stage_failure(job, pods, stage)
        failed = culprit(pods)
        if failure.reason is Reason.GATE_FAILED and failed is not None:  # the scores are the evidence: they stay
            result = result_of(failed)
            if result is not None:
                self.draft.absorb(result)
                self.draft.confirm()
        self.draft.fail(failure)
        return self._decision()

    def _without_result(self, stage: Stage, job: Manifest) -> Decision:
        """The Job is complete, and no pod is left to tell what it found: the stage is done again."""
        message = "its pod was deleted before its result was read"
        if self.draft.interruption is None:
            self.draft.disrupt(stage, Trouble(Reason.DISRUPTED, message))
        self._wait(stage, Reason.POD_STARTING, f"{stage} runs again: {message}")
        return self._decision(restart=(stage,), requeue_after=LOOK_AGAIN_SECONDS)


def success_message(status: FineTuneJobStatus) -> str:
    """What came of the job; of a status that was edited, as much as is left."""
    result = status.result or ResultStatus()
    words = [
        f"{score.metric} {score.value}" + (f" (baseline {score.baseline})" if score.baseline else "")
        for score in result.scores or ()
    ]
    if result.artifact is not None:
        words.append(f"the result is at {result.artifact.uri}")
    return "; ".join(words) or "the job has succeeded"


def _describe(progress: Progress) -> str:
    """What a trainer does now, in a sentence."""
    if progress.step is None or progress.total_steps is None:
        return progress.activity
    return f"{progress.activity}: step {progress.step} of {progress.total_steps}"
