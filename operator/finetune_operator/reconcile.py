"""`decide`: what to do for one FineTuneJob, given all that is known about it. Pure: no I/O, no clock, no memory.

The stages run one after the other, each as a child Job that is created when the one before it has ended well.
The status is the only record of what was done: a stage whose outcome stands there never runs again, whatever
happens to its Job.
"""

from finetune_api.constants import ConditionType, Phase, Reason, Stage
from finetune_api.rules import InvalidManifestError, parse_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FailureStatus, FineTuneJobStatus

from finetune_operator.conditions import shorten
from finetune_operator.decision import Context, Decision
from finetune_operator.draft import Draft
from finetune_operator.observed import (
    Manifest,
    Observed,
    Resource,
    has_ended,
    is_suspended,
    parse_time,
)
from finetune_operator.stages import Walk


def decide(resource: Resource, observed: Observed, now: float, context: Context) -> Decision:
    """The next step for this resource."""
    if resource.deleting:
        return Decision(resource.status)
    try:
        spec = parse_spec(resource.spec)
    except InvalidManifestError as error:
        if _is_finished(resource.status):
            return Decision(resource.status)
        if resource.status.start_time is not None:
            return _leave_alone(resource, now, str(error))
        return give_up(resource, observed, now, Reason.INVALID_SPEC, str(error))
    if _is_finished(resource.status):
        return _after_the_end(resource, spec, observed, now)
    draft = Draft(resource, now)
    draft.conditions.set(ConditionType.ACCEPTED, True, Reason.VALID, "the spec is valid")
    _note_suspension(draft, spec)
    return Walk(resource, spec, observed, now, context, draft).go()


def give_up(resource: Resource, observed: Observed, now: float, reason: Reason, message: str) -> Decision:
    """Fails the job for a cause outside its pods; what still runs is stopped."""
    draft = Draft(resource, now)
    if reason is Reason.INVALID_SPEC:
        draft.conditions.set(ConditionType.ACCEPTED, False, reason, message)
    draft.fail(FailureStatus(stage=None, reason=reason, message=shorten(message)))
    return Decision(draft.status(), change=_stop_all(observed), events=draft.events)


def _stop_all(observed: Observed) -> dict[Stage, Manifest]:
    running = [stage for stage, job in observed.jobs.items() if not has_ended(job) and not is_suspended(job)]
    return {stage: {"suspend": True} for stage in running}


def _leave_alone(resource: Resource, now: float, message: str) -> Decision:
    """A spec that was understood before has fields of a newer version: its CRD is ahead of this operator."""
    draft = Draft(resource, now)
    message = f"{message}; the job goes on, but this operator is older than the resource: upgrade it"
    draft.conditions.set(ConditionType.ACCEPTED, False, Reason.INVALID_SPEC, message)
    return Decision(draft.status())


def hold_back(resource: Resource, now: float, message: str) -> Decision:
    """The cluster does not let us act: says so, and leaves the job where it is."""
    draft = Draft(resource, now)
    draft.trouble(Reason.FORBIDDEN, message, key="Forbidden")
    draft.enter(resource.status.phase or Phase.PENDING, message)
    return Decision(draft.status(), events=draft.events)


def _is_finished(status: FineTuneJobStatus) -> bool:
    return status.phase is not None and status.phase.finished


def _after_the_end(resource: Resource, spec: FineTuneJobSpec, observed: Observed, now: float) -> Decision:
    """Nothing but the time to live is left; what was reported stays, and nothing runs."""
    status = resource.status.model_copy(update={"observed_generation": resource.generation})
    stop = _stop_all(observed)
    lifetime, ended = spec.limits.ttl_seconds_after_finished, parse_time(status.completion_time)
    if lifetime is None or ended is None:
        return Decision(status, change=stop)
    left = ended + lifetime - now
    return Decision(status, delete=True) if left <= 0 else Decision(status, change=stop, requeue_after=left)


def _note_suspension(draft: Draft, spec: FineTuneJobSpec) -> None:
    if spec.suspend:
        message = "spec.suspend is true; set it to false to go on"
        draft.conditions.set(ConditionType.SUSPENDED, True, Reason.SUSPENDED_BY_USER, message)
    elif draft.conditions.is_true(ConditionType.SUSPENDED):
        draft.conditions.set(ConditionType.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false again")
