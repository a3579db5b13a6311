"""Kueue's part in a job: labels that put the train Job into a queue, and the words of the Workload that Kueue makes of
it (https://kueue.sigs.k8s.io/docs/concepts/workload/). Pure.

A queued Job's `suspend`, node selectors and tolerations are Kueue's: they are never compared and never taken back.
"""

from collections.abc import Mapping
from typing import Any

from finetune_api.constants import Reason

from finetune_operator.diagnose import Trouble

GROUP = "kueue.x-k8s.io"
API_VERSIONS = (f"{GROUP}/v1beta2", f"{GROUP}/v1beta1")
"""The newest first; what is read here is the same in both."""

QUEUE_LABEL = f"{GROUP}/queue-name"
PRIORITY_LABEL = f"{GROUP}/priority-class"
JOB_UID_LABEL = f"{GROUP}/job-uid"
"""On a Workload: the uid of the Job that it stands for."""


def is_queued(job: Mapping[str, Any]) -> bool:
    """Whether Kueue says when this Job runs."""
    return QUEUE_LABEL in (job["metadata"].get("labels") or {})


def why_waiting(workload: Mapping[str, Any] | None) -> str | None:
    """Why it is not admitted, in Kueue's words; None if it has said nothing."""
    if workload is None:
        return None
    if not (workload.get("spec") or {}).get("active", True):
        return f"it was deactivated: {_message(workload, 'Evicted') or 'its Workload has spec.active: false'}"
    checks = (workload.get("status") or {}).get("admissionChecks") or ()
    waits = [f"admission check {c['name']}: {c.get('message') or c['state']}" for c in checks if c["state"] != "Ready"]
    return (
        _message(workload, "QuotaReserved", "False")
        or "; ".join(waits)
        or _message(workload, "Admitted", "False")
        or None
    )


def eviction(workload: Mapping[str, Any] | None) -> Trouble | None:
    """Why Kueue has stopped a Job that ran."""
    words = _message(workload or {}, "Evicted")
    if not words:
        return None
    preempted = _message(workload or {}, "Preempted")
    if preempted:
        return Trouble(Reason.PREEMPTED, f"its queue gave its quota to another job: {preempted}")
    return Trouble(Reason.DISRUPTED, f"its queue has stopped it: {words}")


def _message(workload: Mapping[str, Any], kind: str, status: str = "True") -> str:
    """The message of a condition that has this status."""
    for condition in (workload.get("status") or {}).get("conditions") or ():
        if condition["type"] == kind and condition["status"] == status:
            return str(condition.get("message") or condition.get("reason") or kind)
    return ""
