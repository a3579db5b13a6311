"""The batch/v1 Job of a stage: how often it is tried, what ends it, which queue it waits in."""

from typing import Any

from finetune_api.constants import ExitCode, Stage
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.kueue import PRIORITY_LABEL, QUEUE_LABEL
from finetune_operator.observed import Manifest, Resource
from finetune_operator.plans import has_peers
from finetune_operator.render.metadata import render_metadata
from finetune_operator.render.pod import CONTAINER, render_pod
from finetune_operator.settings import Settings


def _on_exit_code(action: str, code: ExitCode) -> Manifest:
    return {
        "action": action,
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [int(code)]},
    }


FAILURE_RULES = [
    _on_exit_code("FailJob", ExitCode.USER_ERROR),
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]
"""A user's error is final, a disruption costs no retry; all else counts against the limit of retries."""

VICTIM_RULE = _on_exit_code("Ignore", ExitCode.TRY_AGAIN)
"""Of several nodes: when one is lost, the others end with this code, and it is the lost one alone that counts.

That is no endless loop, for each round needs a pod that was lost: one that failed counts, and one that was disrupted
is the cluster's doing. Where none was (a network that keeps cutting pods off), the Job controller waits longer before
each further round (10 s, 20 s, 40 s, up to minutes), and limits.activeDeadlineSeconds ends it.
"""


def render_job(resource: Resource, spec: FineTuneJobSpec, plan: Plan, settings: Settings, plan_path: str) -> Manifest:
    """The Job without `suspend`. It has no time to live of its own: it goes with its owner.

    Of a queued Job Kueue's webhook sets `suspend` at creation, and Kueue alone takes it back.
    """
    stage = plan.stage
    metadata = render_metadata(resource, resource.child_name(stage), stage)
    if stage is Stage.TRAIN and spec.scheduling is not None:
        kueue = {QUEUE_LABEL: spec.scheduling.queue_name, PRIORITY_LABEL: spec.scheduling.workload_priority_class_name}
        metadata["labels"] |= {label: value for label, value in kueue.items() if value is not None}
    nodes = plan.device.nodes if stage is Stage.TRAIN else 1
    deadline = spec.limits.active_deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            **_failure_policy(spec, plan),
            "podReplacementPolicy": "Failed",  # two writers on one workspace would be one too many
            **({"activeDeadlineSeconds": deadline} if deadline is not None else {}),
            "template": render_pod(resource, spec, plan, settings, plan_path),
        },
    }


def _failure_policy(spec: FineTuneJobSpec, plan: Plan) -> dict[str, Any]:
    """`limits.retries` in the Job's terms. Several nodes run the same program and often fail together, which is one
    failure and not as many as there are nodes: so each has its own count, and the first to exceed it ends the Job.
    """
    retries = spec.limits.retries
    if not has_peers(plan):
        return {"backoffLimit": retries, "podFailurePolicy": {"rules": FAILURE_RULES}}
    return {
        "backoffLimitPerIndex": retries,
        "maxFailedIndexes": 0,
        "podFailurePolicy": {"rules": [*FAILURE_RULES, VICTIM_RULE]},
    }
