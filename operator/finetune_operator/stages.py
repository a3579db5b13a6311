"""The walk through the stages of one job: which one it is in, where it begins and how it ends. Pure."""

from dataclasses import replace

from finetune_api.constants import ConditionType, Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Result
from finetune_api.status import FailureStatus, FineTuneJobStatus, MemoryStatus, ResultStatus

from finetune_operator.at_work import AtWork
from finetune_operator.conditions import shorten
from finetune_operator.decision import Decision
from finetune_operator.diagnose import Trouble, culprit, stage_failure
from finetune_operator.draft import STAGE_SHARE
from finetune_operator.evidence import has_outcome
from finetune_operator.interruptions import note_lost_job
from finetune_operator.lost_children import is_in_place
from finetune_operator.observed import Manifest, Resource, condition_of, has_ended, result_of
from finetune_operator.plans import build_plan, plan_memory
from finetune_operator.resolved import resolved_status
from finetune_operator.sizing import advise, explain
from finetune_operator.step import LOOK_AGAIN_SECONDS

UNKNOWN_LIMIT = {
    True: "how much a GPU has is not known: give resources.gpuMemory to have it compared",
    False: "how much there is is not known: give resources.limits.memory to have it compared",
}


class Walk(AtWork):
    """One pass over the stages, from the first to the one that the job is in."""

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
                return self.let_go(stage)
            if condition_of(job, "Failed"):
                return self._fail(stage, job)
            if not condition_of(job, "Complete"):
                return self.at_work(stage, job)
            result = self.observed.result(stage)
            if result is None:
                return self._without_result(stage, job)
            self._finish(stage, result)
        self.draft.succeed(success_message(self.draft.status()))
        return self.decision()

    def _begin(self, stage: Stage) -> Decision:
        """Creates the stage's children; in their first moment they wait, as far as the status knows."""
        note_lost_job(self.draft, stage)
        too_early = self._at_work_later(stage)
        if too_early:  # one writer on the workspace at a time
            self.wait(stage, Reason.POD_STARTING, f"{stage} runs again when {too_early[0]} has stopped")
            return self.decision(restart=too_early, requeue_after=LOOK_AGAIN_SECONDS)
        self.draft.set(pod_name=None)
        if self.spec.suspend and self.is_queued(stage):
            self.wait(stage, Reason.SUSPENDED_BY_USER, "")
            return self.decision()
        resource = replace(self.resource, status=self.draft.status())
        plan = build_plan(resource, self.spec, stage, self.context.layout)
        if stage is Stage.TRAIN and not self._fits(plan, resource):
            return self.decision()
        children = self.render(plan, resource)
        self.draft.set(attempt=1)
        if stage is not Stage.PUBLISH:  # training is over: what its device decided stands in the status
            self.draft.set(resolved=resolved_status(plan, None, None))
        if stage is Stage.PREPARE:
            self.draft.conditions.set(ConditionType.DATA_READY, False, Reason.PREPARING, "the data is being prepared")
        self.wait(stage, Reason.POD_STARTING, f"{stage} is starting")
        return self.decision(create=tuple(child for child in children if not is_in_place(child, self.observed)))

    def _at_work_later(self, stage: Stage) -> list[Stage]:
        """Stages after this one whose Jobs have not ended. They began when the status knew more than it does now."""
        later = list(Stage)[list(Stage).index(stage) + 1 :]
        return [each for each in later if each in self.observed.jobs and not has_ended(self.observed.jobs[each])]

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
        return self.decision()

    def _without_result(self, stage: Stage, job: Manifest) -> Decision:
        """The Job is complete, and no pod is left to tell what it found: the stage is done again."""
        message = "its pod was deleted before its result was read"
        if self.draft.interruption is None:
            self.draft.disrupt(stage, Trouble(Reason.DISRUPTED, message))
        self.wait(stage, Reason.POD_STARTING, f"{stage} runs again: {message}")
        return self.decision(restart=(stage,), requeue_after=LOOK_AGAIN_SECONDS)


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
