"""Why a pod does not run, and why a stage failed: the cluster's and the trainer's words -> a reason and a remedy."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.constants import ExitCode, Reason, Stage
from finetune_api.progress import Outcome
from finetune_api.status import FailureStatus

from finetune_operator.conditions import shorten
from finetune_operator.observed import (
    condition_of,
    container_of,
    failures_of,
    has_failed,
    newest_of_each_node,
    result_of,
    terminated,
)

IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
MOUNT_REASONS = {"FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"}
"""Reasons of Events: such a pod says nothing but ContainerCreating."""

DISRUPTIONS = {
    "PreemptionByScheduler": (Reason.PREEMPTED, "the pod gave way to one of higher priority"),
    "EvictionByEvictionAPI": (Reason.EVICTED, "the pod was evicted, as when its node is drained"),
    "TerminationByKubelet": (Reason.EVICTED, "the pod's node shuts down, or is short of something"),
    "DeletionByTaintManager": (Reason.DISRUPTED, "the pod had to leave its node, which is lost or tainted"),
    "DeletionByPodGC": (Reason.DISRUPTED, "the pod's node is gone"),
}
"""Reasons of the pod condition DisruptionTarget, in words:
https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions"""

MEMORY_FIELD = {
    Stage.PREPARE: "resources.prepare.limits.memory",
    Stage.TRAIN: "resources.limits.memory",
    Stage.PUBLISH: "resources.prepare.limits.memory",
}


@dataclass(frozen=True)
class Trouble:
    reason: Reason
    message: str
    exit_code: int | None = None


def waiting_trouble(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]] = ()) -> Trouble | None:
    """What keeps a pod from running; None while it is only starting."""
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            if condition.get("reason") == "SchedulingGated":
                return Trouble(Reason.QUEUED, "the pod waits for a scheduling gate to be lifted")
            return Trouble(Reason.UNSCHEDULABLE, f"no node takes the pod: {condition.get('message', '')}")
    waiting = (container_of(pod).get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason"), waiting.get("message", "")
    if reason in IMAGE_REASONS:
        image = container_of(pod).get("image") or "the trainer image"
        return Trouble(Reason.IMAGE_NOT_PULLED, f"{image} cannot be pulled ({reason}): {message}")
    if reason in CONFIG_REASONS:
        return Trouble(Reason.CONTAINER_CONFIG, f"{reason}: {message}")
    for event in reversed(events):
        if event.get("reason") in MOUNT_REASONS:
            return Trouble(Reason.CONTAINER_CONFIG, f"{event['reason']}: {event.get('message', '')}")
    return None


def refusal(events: Sequence[Mapping[str, Any]]) -> Trouble | None:
    """Why a Job gets no pod: the Job controller's last word about it."""
    for event in reversed(events):
        if event.get("reason") == "FailedCreate":
            return Trouble(Reason.POD_REFUSED, f"the cluster refuses the pod: {event.get('message', '')}")
    return None


def pod_failure(pod: Mapping[str, Any], stage: Stage) -> Trouble:
    """Why a pod ended badly. The kernel's word goes before the trainer's, and the trainer's before the exit code."""
    end = terminated(pod) or {}
    code = end.get("exitCode")
    if end.get("reason") == "OOMKilled":
        return Trouble(Reason.OOM_KILLED, _out_of_memory(pod, stage), code)
    result = result_of(pod)
    if result is not None and result.outcome is Outcome.FAILED:
        return Trouble(result.reason or Reason.STAGE_FAILED, result.message, code)
    disruption = pod_disruption(pod)
    if disruption is not None:  # which is why a trainer says that it was interrupted
        return disruption
    if result is not None and result.outcome is Outcome.INTERRUPTED:
        return Trouble(Reason.INTERRUPTED, result.message, code)
    return Trouble(Reason.STAGE_FAILED, _exit(code, pod.get("status") or {}, stage), code)


def pod_disruption(pod: Mapping[str, Any]) -> Trouble | None:
    """Why the cluster takes a pod away that has done nothing wrong; None if it does not."""
    code = (terminated(pod) or {}).get("exitCode")
    status = pod.get("status") or {}
    if status.get("reason") == "Evicted":
        return Trouble(Reason.EVICTED, f"the node evicted the pod: {status.get('message', '')}", code)
    condition = condition_of(pod, "DisruptionTarget")
    if condition is None:
        return None
    reason, what = DISRUPTIONS.get(condition.get("reason", ""), (Reason.DISRUPTED, "the pod was taken away"))
    words = condition.get("message") or condition.get("reason")
    return Trouble(reason, f"{what}: {words}" if words else what, code)


def culprit(pods: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The pod that failed by itself, of the newest pods of all nodes: when one is lost, the others cannot go on and
    end too. If none of the newest has failed, it is of those that failed before. `pods` are the oldest first.
    """
    failed = [pod for pod in newest_of_each_node(pods) if has_failed(pod)]
    return min(failed or newest_of_each_node(filter(has_failed, pods)), key=_innocence, default=None)


def _innocence(pod: Mapping[str, Any]) -> int:
    """The less, the more likely it is that the others failed because of this pod."""
    end = terminated(pod) or {}
    if end.get("exitCode") == ExitCode.USER_ERROR:
        return 0
    if end.get("reason") == "OOMKilled":
        return 1
    if end.get("exitCode") == ExitCode.TRY_AGAIN:
        return 4
    return 3 if condition_of(pod, "DisruptionTarget") else 2


def stage_failure(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], stage: Stage) -> FailureStatus:
    """Why a child Job failed for good."""
    condition = condition_of(job, "Failed") or {}
    pod = culprit(pods)
    if condition.get("reason") == "DeadlineExceeded":
        seconds = job["spec"].get("activeDeadlineSeconds")
        trouble = Trouble(
            Reason.DEADLINE_EXCEEDED,
            f"{stage} did not end within {seconds} s: raise limits.activeDeadlineSeconds or make the job smaller",
        )
    elif pod is not None:
        trouble = pod_failure(pod, stage)
    else:
        trouble = Trouble(Reason.STAGE_FAILED, condition.get("message") or "the Job failed and left no pod behind")
    failed = failures_of(job, pods)
    tries = f" (after {failed} attempts)" if failed > 1 else ""
    message = shorten(trouble.message + tries)
    return FailureStatus(stage=stage, reason=trouble.reason, message=message, exit_code=trouble.exit_code)


def _out_of_memory(pod: Mapping[str, Any], stage: Stage) -> str:
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    memory = limits.get("memory")
    field = MEMORY_FIELD[stage]
    at = f"its memory limit of {memory}" if memory else "the node's memory"
    or_less = ", or lower training.microBatchTokens or training.maxLength" if stage is Stage.TRAIN else ""
    return f"the kernel killed {stage} at {at}: raise {field}{or_less}"


def _exit(code: int | None, status: Mapping[str, Any], stage: Stage) -> str:
    if code is None:
        return f"the {stage} pod failed: {status.get('message') or status.get('reason') or 'no cause is known'}"
    name = ""
    if code > 128:
        try:
            name = f" ({signal.Signals(code - 128).name})"
        except ValueError:
            name = ""
    return f"{stage} ended with exit code {code}{name} and said nothing; its log may tell more"
