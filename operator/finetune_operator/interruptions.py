"""What interrupts a stage that is then tried again: a failure, which is a retry, or a disruption, which is none. Pure.

The status names the pod that works, and each such pod is interrupted once: so an interruption is neither missed nor
counted twice, whatever the operator sees of it, and whenever.
"""

from collections.abc import Sequence

from finetune_api.constants import Reason, Stage

from finetune_operator import kueue
from finetune_operator.cluster import Event
from finetune_operator.conditions import shorten
from finetune_operator.diagnose import Trouble, culprit, pod_disruption, pod_failure
from finetune_operator.draft import Draft
from finetune_operator.observed import (
    Manifest,
    Observed,
    index_of,
    is_suspended,
    is_suspended_by_us,
    newest_of_each_node,
)


def note_interruption(draft: Draft, stage: Stage, observed: Observed, attempt: int) -> None:
    """Takes over what has interrupted the stage since the last look. `attempt` follows from the Job's failures."""
    before, worker, pods = draft.get("attempt"), draft.get("pod_name"), observed.pods.get(stage, ())
    if before is not None and attempt > before:
        failed = culprit(pods)
        trouble = pod_failure(failed, stage) if failed else Trouble(Reason.STAGE_FAILED, "its pod is gone")
        draft.interrupt(stage, trouble)
        message = f"attempt {attempt - 1} of {stage} failed: {trouble.message}"
        draft.events.append(Event("Warning", trouble.reason.value, shorten(message), f"{stage}-{attempt}"))
    elif worker is not None and draft.interruption is None:
        disruption = _disruption(observed.jobs[stage], pods, worker, observed.workload)
        if disruption is not None:
            draft.disrupt(stage, disruption)
    draft.set(attempt=attempt)


def note_lost_job(draft: Draft, stage: Stage) -> None:
    """The Job of a stage that was at work is gone, or goes."""
    if draft.get("pod_name") is not None and draft.interruption is None:
        draft.disrupt(stage, Trouble(Reason.DISRUPTED, "its Job was deleted"))


def _disruption(job: Manifest, pods: Sequence[Manifest], worker: str, workload: Manifest | None) -> Trouble | None:
    """Why the pod that works, or one of its peers, has to end."""
    if is_suspended(job) and not is_suspended_by_us(job):
        return kueue.eviction(workload) or Trouble(Reason.DISRUPTED, "another controller has suspended its Job")
    newest = newest_of_each_node(pods)
    known = [pod for pod in pods if pod["metadata"]["name"] == worker]
    for pod in (*newest, *known):
        disruption = pod_disruption(pod)
        if disruption is not None:
            return disruption
    if any(index_of(pod) == 0 and pod["metadata"]["name"] != worker for pod in newest):
        return Trouble(Reason.DISRUPTED, f"pod {worker} was deleted, or lost its peers")
    return None
