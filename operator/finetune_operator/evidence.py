"""What a status proves. It is the only record of what was done, and anybody with the right to may have edited it.

So no single field is believed: an end is one if two of its three witnesses say so (its evidence, the phase, the
condition). One that is forged ends no job, and one that is lost runs none again.
"""

from finetune_api.constants import ConditionType, Phase, Stage
from finetune_api.status import Condition, FailureStatus, FineTuneJobStatus

from finetune_operator.observed import MAX_SKEW_SECONDS, format_time, parse_time


def has_outcome(status: FineTuneJobStatus, stage: Stage) -> bool:
    """Whether the stage has ended well and is never to run again."""
    match stage:
        case Stage.PREPARE:
            return status.data is not None
        case Stage.TRAIN:
            return status.result is not None and status.result.scores is not None
        case Stage.PUBLISH:
            return status.result is not None and status.result.artifact is not None


def has_succeeded(status: FineTuneJobStatus) -> bool:
    complete = _holds(status, ConditionType.COMPLETE) is not None
    return has_outcome(status, Stage.PUBLISH) + (status.phase is Phase.SUCCEEDED) + complete >= 2


def final_failure(status: FineTuneJobStatus) -> FailureStatus | None:
    """Why the job has failed for good, if it has."""
    failed = _holds(status, ConditionType.FAILED)
    if (status.failure is not None) + (status.phase is Phase.FAILED) + (failed is not None) < 2:
        return None
    if status.failure is None and failed is not None:
        return FailureStatus(stage=None, reason=failed.reason, message=failed.message)
    return status.failure


def is_finished(status: FineTuneJobStatus) -> bool:
    return has_succeeded(status) or final_failure(status) is not None


def without_the_future(status: FineTuneJobStatus, now: float) -> FineTuneJobStatus:
    """No time in it is later than clocks may differ by: a stall would never be noticed, no time to live be over."""

    def past(text: str | None) -> str | None:
        moment = parse_time(text)
        return format_time(now) if moment is not None and moment > now + MAX_SKEW_SECONDS else text

    progress, conditions = status.progress, status.conditions
    return status.model_copy(
        update={
            "start_time": past(status.start_time),
            "completion_time": past(status.completion_time),
            "progress": progress
            and progress.model_copy(update={"last_updated_time": past(progress.last_updated_time)}),
            "conditions": conditions
            and [c.model_copy(update={"last_transition_time": past(c.last_transition_time)}) for c in conditions],
        }
    )


def _holds(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    return next((c for c in status.conditions or () if c.type is kind and c.status == "True"), None)
