"""`decide`: what to do for one FineTuneJob, given all that is known about it. Pure: no I/O, no clock, no memory.

The stages run one after the other, each as a child Job that is created when the one before it has ended well.
The status is the only record of what was done: a stage whose outcome stands there never runs again, whatever
happens to its Job.
"""

from dataclasses import replace
from typing import Any

from finetune_api.constants import CONTROLLER, ConditionType, Phase, Reason, Stage
from finetune_api.rules import InvalidManifestError, parse_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FailureStatus

from finetune_operator.conditions import shorten
from finetune_operator.decision import Context, Decision
from finetune_operator.draft import Draft
from finetune_operator.evidence import final_failure, has_outcome, is_finished, without_the_future
from finetune_operator.kueue import is_queued
from finetune_operator.observed import (
    Observed,
    Resource,
    has_ended,
    is_suspended,
    parse_time,
    suspension,
)
from finetune_operator.stages import Walk, success_message


def decide(resource: Resource, observed: Observed, now: float, context: Context) -> Decision:
    """The next step for this resource."""
    if resource.deleting or resource.spec.get("managedBy") not in (None, CONTROLLER):
        return Decision(resource.status)
    resource = replace(resource, status=without_the_future(resource.status, now))
    try:
        spec = parse_spec(resource.spec)
    except InvalidManifestError as error:
        if is_finished(resource.status):
            return Decision(Draft(resource, now).status(), **_stop_all(observed))
        if resource.status.start_time is not None:
            return _leave_alone(resource, now, str(error))
        return give_up(resource, observed, now, Reason.INVALID_SPEC, str(error))
    draft = Draft(resource, now)
    if is_finished(resource.status):
        return _after_the_end(resource, spec, observed, now, draft)
    draft.reopen()
    draft.conditions.set(ConditionType.ACCEPTED, True, Reason.VALID, "the spec is valid")
    _note_suspension(draft, spec)
    return Walk(resource, spec, observed, now, context, draft).go()


def give_up(resource: Resource, observed: Observed, now: float, reason: Reason, message: str) -> Decision:
    """Fails the job for a cause outside its pods; what still runs is stopped."""
    draft = Draft(resource, now)
    draft.reopen()
    if reason is Reason.INVALID_SPEC:
        draft.conditions.set(ConditionType.ACCEPTED, False, reason, message)
    draft.fail(FailureStatus(stage=None, reason=reason, message=shorten(message)))
    return Decision(draft.status(), events=draft.events, **_stop_all(observed))


def _stop_all(observed: Observed) -> dict[str, Any]:
    """As parts of a Decision. Kueue would let a Job that it has admitted run again: such a one is deleted."""
    active = {
        stage: job
        for stage, job in observed.jobs.items()
        if not has_ended(job) and "deletionTimestamp" not in job["metadata"]
    }
    queued = [stage for stage, job in active.items() if is_queued(job)]
    running = [stage for stage, job in active.items() if not is_queued(job) and not is_suspended(job)]
    return {"change": {stage: suspension(True) for stage in running}, "restart": queued}


def _leave_alone(resource: Resource, now: float, message: str) -> Decision:
    """A spec that was understood before has fields of a newer version: its CRD is ahead of this operator."""
    draft = Draft(resource, now)
    message = f"{message}; the job goes on, but this operator is older than the resource: upgrade it"
    draft.conditions.set(ConditionType.ACCEPTED, False, Reason.INVALID_SPEC, message)
    return Decision(draft.status())


def hold_back(resource: Resource, decision: Decision, now: float, message: str) -> Decision:
    """The cluster does not let us act: says so, and where the job stands otherwise."""
    draft = Draft(replace(resource, status=decision.status), now)
    draft.trouble(Reason.FORBIDDEN, message, key="Forbidden")
    draft.enter(decision.status.phase or Phase.PENDING, message)
    return Decision(draft.status(), events=(*decision.events, *draft.events))


def _after_the_end(resource: Resource, spec: FineTuneJobSpec, observed: Observed, now: float, draft: Draft) -> Decision:
    """Nothing but the time to live is left: what was reported stays, what is missing of it comes back, nothing runs."""
    failure = final_failure(resource.status)
    if failure is not None:
        draft.fail(failure)
    else:
        for stage in Stage:
            result = None if has_outcome(draft.status(), stage) else observed.result(stage)
            if result is not None:
                draft.absorb(result)
        draft.succeed(success_message(draft.status()))
    draft.confirm()
    status = draft.status()
    stop = _stop_all(observed)
    lifetime, ended = spec.limits.ttl_seconds_after_finished, parse_time(status.completion_time)
    if lifetime is None or ended is None:
        return Decision(status, **stop)
    left = ended + lifetime - now
    return Decision(status, delete=True) if left <= 0 else Decision(status, requeue_after=left, **stop)


def _note_suspension(draft: Draft, spec: FineTuneJobSpec) -> None:
    if spec.suspend:
        message = "spec.suspend is true; set it to false to go on"
        draft.conditions.set(ConditionType.SUSPENDED, True, Reason.SUSPENDED_BY_USER, message)
    elif draft.conditions.is_true(ConditionType.SUSPENDED):
        draft.conditions.set(ConditionType.SUSPENDED, False, Reason.RESUMED, "spec.suspend is false again")
