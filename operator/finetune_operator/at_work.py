"""A stage whose Job is there and has not ended: how far it is, what it waits for, what it lacks. Pure."""

import math
from collections.abc import Sequence
from dataclasses import replace

from finetune_api.constants import Reason, Stage
from finetune_api.progress import Progress

from finetune_operator import kueue
from finetune_operator.cluster import Event
from finetune_operator.decision import Decision
from finetune_operator.diagnose import Trouble, refusal, waiting_trouble
from finetune_operator.interruptions import note_interruption, note_lost_job
from finetune_operator.lost_children import is_in_place, is_missing, lacks_something, lost_children
from finetune_operator.observed import (
    Manifest,
    condition_of,
    container_of,
    deadline_of,
    failures_of,
    format_time,
    has_failed,
    is_leaving,
    is_pending,
    is_running,
    is_suspended,
    is_suspended_by_us,
    newest_of_each_node,
    nodes_of,
    parse_time,
    suspension,
)
from finetune_operator.plans import build_plan
from finetune_operator.render.network import render_policies
from finetune_operator.resolved import resolved_status
from finetune_operator.step import LOOK_AGAIN_SECONDS, WAITING, WORKING, Step

OVERDUE_SECONDS = 30.0
"""A pod that has not ended so long after its grace period is on a node that does not answer."""

QUEUE_SECONDS = 10.0
"""No watch tells of what a queue says of a Job that waits in it."""


class AtWork(Step):
    """The part of a pass that is about a stage at work."""

    def at_work(self, stage: Stage, job: Manifest) -> Decision:
        """The stage's Job is there, and neither has ended nor is being deleted."""
        if stage is not Stage.PREPARE and self._workspace_is_gone(stage):
            return self._begin_anew(stage)
        decision = self._stay(stage, job)
        return decision if decision.restart else replace(decision, create=self._lost_children(stage, job))

    def let_go(self, stage: Stage) -> Decision:
        """The stage's Job is being deleted, by us or by somebody else; it is made again when it is gone."""
        note_lost_job(self.draft, stage)
        if any(map(is_running, self.observed.pods.get(stage, ()))):
            return self.decision(requeue_after=self._take_leave(stage))
        self.wait(stage, Reason.POD_STARTING, f"{stage} starts again: its Job is being deleted")
        return self.decision(requeue_after=LOOK_AGAIN_SECONDS)

    def _stay(self, stage: Stage, job: Manifest) -> Decision:
        """The stage's Job is at work: says how far it is, or what it waits for."""
        pods = self.observed.pods.get(stage, ())
        failures = failures_of(job, pods)
        attempt = min(failures, job["spec"].get("backoffLimitPerIndex", failures)) + 1  # after the last one is no next
        note_interruption(self.draft, stage, self.observed, attempt)
        if self.spec.suspend and self.is_queued(stage):
            self.wait(stage, Reason.SUSPENDED_BY_USER, "")
            return self.decision(restart=(stage,))
        change = self._changes(stage, job)
        newest = newest_of_each_node(pods)
        running = [pod for pod in newest if is_running(pod)]
        starting = [pod for pod in newest if is_pending(pod)]
        absent = nodes_of(job) - len(newest)
        if running and not starting and not absent:
            if self.spec.suspend or is_suspended(job) or any(map(is_leaving, newest)):
                return self.decision(change=change, requeue_after=self._take_leave(stage))
            self.draft.set(pod_name=newest[0]["metadata"]["name"])
            return self.decision(change=change, requeue_after=self._report(stage, running[0]))
        if not starting and not absent and not _is_tried_again(job, newest) and not self.spec.suspend:
            # its Job has not judged yet how the last pod has ended
            self._between(stage, f"the {stage} pod has ended")
            return self.decision(change=change)
        trouble = self._trouble(starting, absent)
        if trouble is not None and not self.spec.suspend:
            self.draft.trouble(trouble.reason, trouble.message, key=f"{stage}-{attempt}")
            self.enter(WAITING[stage], trouble.message)
        elif is_suspended(job) and not self.spec.suspend and not is_suspended_by_us(job):
            self.wait(stage, Reason.QUEUED, f"{stage} waits {self._describe_queue()}")
        else:
            again = f" again (attempt {attempt})" if attempt > 1 else " again" if self.draft.interruption else ""
            some = f": {len(running)} of {nodes_of(job)} pods run" if running else ""
            self.wait(stage, Reason.POD_STARTING, f"{stage} is starting{again}{some}")
        return self.decision(change=change, requeue_after=self._patience(job))

    def _describe_queue(self) -> str:
        """What a Job waits for that another controller has suspended."""
        queue = self.queue()
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
        self.enter(WORKING[stage], what)
        return left if 0 < left < math.inf else None

    def _between(self, stage: Stage, message: str) -> None:
        """Nothing runs, and what comes next is not known yet."""
        self.draft.running(False, Reason.BETWEEN_STAGES, message)
        self.enter(WORKING[stage], message)

    def _trouble(self, starting: Sequence[Manifest], absent: int) -> Trouble | None:
        """Why a pod does not run, or is not even there; None while it is only a matter of time."""
        troubles = (waiting_trouble(pod, self.observed.events) for pod in starting)
        return next(filter(None, troubles), refusal(self.observed.events) if absent else None)

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
            self.enter(WORKING[stage], self.draft.get("message") or "")
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
        self.enter(WORKING[stage], what)
        return left if left > 0 and stage is Stage.TRAIN else None

    def _last_sign_of_life(self, pod: Manifest) -> float:
        """When training last got on: its own word, which the status keeps while the operator is away or the pod does
        not answer, or the start of its container.
        """
        progress = self.draft.get("progress")
        began = ((container_of(pod).get("state") or {}).get("running") or {}).get("startedAt")
        known = parse_time(progress.last_updated_time if progress else None), parse_time(began)
        return max(filter(None, known), default=self.now)

    def _lost_children(self, stage: Stage, job: Manifest) -> tuple[Manifest, ...]:
        resource = replace(self.resource, status=self.draft.status())
        interrupted = resource.status.last_interruption != self.resource.status.last_interruption
        if not interrupted and not lacks_something(self.observed, stage) and not self._is_exposed(stage, job):
            return ()
        children = self.render(build_plan(resource, self.spec, stage, self.context.layout), resource)
        return lost_children(children, self.observed, stage, interrupted=interrupted)

    def _is_exposed(self, stage: Stage, job: Manifest) -> bool:
        policies = render_policies(self.resource, stage, self.context.settings, peers=nodes_of(job) > 1)
        return not all(is_in_place(policy, self.observed) for policy in policies)

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
        self.wait(Stage.PREPARE, Reason.POD_STARTING, message)
        return self.decision(restart=tuple(self.observed.jobs), requeue_after=LOOK_AGAIN_SECONDS)


def _is_tried_again(job: Manifest, ended: Sequence[Manifest]) -> bool:
    """Whether the Job has noticed that its pods have ended, one of them badly, and does not give up."""
    still_active = (job.get("status") or {}).get("active")
    return any(map(has_failed, ended)) and not still_active and condition_of(job, "FailureTarget") is None


def _describe(progress: Progress) -> str:
    """What a trainer does now, in a sentence."""
    if progress.step is None or progress.total_steps is None:
        return progress.activity
    return f"{progress.activity}: step {progress.step} of {progress.total_steps}"
