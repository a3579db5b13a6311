"""What every part of a pass over one job knows, and says in the same way. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_api.constants import Phase, Reason, Stage
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.decision import Context, Decision
from finetune_operator.draft import Draft
from finetune_operator.observed import Manifest, Observed, Resource
from finetune_operator.render import render_stage

LOOK_AGAIN_SECONDS = 5.0
"""For what no watch tells: Events about a pod that does not start."""

WORKING = {Stage.PREPARE: Phase.PREPARING, Stage.TRAIN: Phase.TRAINING, Stage.PUBLISH: Phase.PUBLISHING}

WAITING = {Stage.PREPARE: Phase.PENDING, Stage.TRAIN: Phase.QUEUED, Stage.PUBLISH: Phase.PUBLISHING}


@dataclass(frozen=True)
class Step:
    """One pass: the job, all that is known about it, and the status as it is being worked out."""

    resource: Resource
    spec: FineTuneJobSpec
    observed: Observed
    now: float
    context: Context
    draft: Draft

    def decision(
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

    def wait(self, stage: Stage, reason: Reason, message: str) -> None:
        if self.spec.suspend:
            reason, message = Reason.SUSPENDED_BY_USER, "no pod runs while spec.suspend is true"
        self.draft.running(False, reason, message)
        self.draft.pause()
        self.enter(WAITING[stage], message)

    def enter(self, phase: Phase, message: str) -> None:
        if self.spec.suspend:
            phase, message = Phase.SUSPENDED, "spec.suspend is true; what is done is kept"
        self.draft.enter(phase, message)

    def is_queued(self, stage: Stage) -> bool:
        """Kueue alone says when such a Job runs, and would take our `suspend` back: to suspend it we delete it."""
        return stage is Stage.TRAIN and self.queue() is not None

    def queue(self) -> str | None:
        return self.spec.scheduling.queue_name if self.spec.scheduling else None

    def render(self, plan: Plan, resource: Resource) -> list[Manifest]:
        context = self.context
        return render_stage(resource, self.spec, plan, context.settings, context.layout, suspended=self.spec.suspend)
