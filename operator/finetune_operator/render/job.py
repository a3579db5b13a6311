"""The batch/v1 Job of a stage: how often it is tried, what ends it, which queue it waits in."""

from finetune_api.constants import ExitCode, Stage
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.observed import Manifest, Resource
from finetune_operator.render.metadata import render_metadata
from finetune_operator.render.pod import CONTAINER, render_pod
from finetune_operator.settings import Settings

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

FAILURE_RULES = [
    {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [int(ExitCode.USER_ERROR)]},
    },
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]
"""A user's error is final, a disruption costs no retry; all else counts against backoffLimit."""


def render_job(resource: Resource, spec: FineTuneJobSpec, plan: Plan, settings: Settings, plan_path: str) -> Manifest:
    """The Job without `suspend`. It has no time to live of its own: it goes with its owner.

    Of a queued Job Kueue's webhook sets `suspend` at creation, and Kueue alone takes it back.
    """
    stage = plan.stage
    metadata = render_metadata(resource, resource.child_name(stage), stage)
    queue = spec.scheduling.queue_name if spec.scheduling else None
    if stage is Stage.TRAIN and queue is not None:
        metadata["labels"][QUEUE_LABEL] = queue
    nodes = spec.resources.nodes if stage is Stage.TRAIN else 1
    deadline = spec.limits.active_deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": spec.limits.retries,
            "podFailurePolicy": {"rules": FAILURE_RULES},
            "podReplacementPolicy": "Failed",  # two writers on one workspace would be one too many
            **({"activeDeadlineSeconds": deadline} if deadline is not None else {}),
            "template": render_pod(resource, spec, plan, settings, plan_path),
        },
    }
