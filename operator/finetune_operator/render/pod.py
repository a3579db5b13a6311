"""The pod template of a stage: one container, under the restricted Pod Security level in full.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from finetune_api.constants import (
    MASTER_ADDRESS_VARIABLE,
    MASTER_PORT,
    MASTER_PORT_VARIABLE,
    NODE_RANK_VARIABLE,
    TELEMETRY_PORT,
    Stage,
)
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.observed import INDEX_ANNOTATION, Manifest, Resource
from finetune_operator.plans import has_peers
from finetune_operator.render.metadata import render_labels
from finetune_operator.render.storage import render_storage
from finetune_operator.settings import Settings

CONTAINER = "trainer"
USER = 65532
"""User and group of the trainer image, and the group of the volumes' files."""

GRACE_SECONDS = 120
"""From SIGTERM to SIGKILL: finish the optimizer step, save a checkpoint."""

CPU_STAGE_REQUESTS = {"cpu": "500m", "memory": "1Gi"}
"""Of prepare and publish, each where the spec names no such resource. Training has none: what is asked for there
counts against a queue's quota, which may know of GPUs only."""


def render_pod(resource: Resource, spec: FineTuneJobSpec, plan: Plan, settings: Settings, plan_path: str) -> Manifest:
    """The template, with metadata and spec. The image's entry point is the trainer; the stage is its argument."""
    stage = plan.stage
    storage = render_storage(resource, spec, plan)
    container = {
        "name": CONTAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_pull_policy,
        "args": [stage.value, "--plan", plan_path],
        "ports": [{"name": "telemetry", "containerPort": TELEMETRY_PORT}],
        "resources": _resources(spec, stage, plan.device.gpus),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "terminationMessagePolicy": "File",
        "volumeMounts": list(storage.mounts.values()),
        **({"env": _meeting_point(resource, stage)} if has_peers(plan) else {}),
    }
    return {
        "metadata": {"labels": render_labels(resource, stage)},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            # an Indexed Job's pods have host names of their own: <job>-<index>.<subdomain>
            **({"subdomain": resource.child_name(stage)} if has_peers(plan) else {}),
            **_scheduling(spec),
            **_pull_secrets(settings),
            "containers": [container],
            "volumes": list(storage.volumes.values()),
        },
    }


def _meeting_point(resource: Resource, stage: Stage) -> list[Manifest]:
    """Which node a pod is, and where node 0 waits for the others: at its name in the job's own Service."""
    name = resource.child_name(stage)
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_ANNOTATION}']"}}
    return [
        {"name": NODE_RANK_VARIABLE, "valueFrom": index},
        {"name": MASTER_ADDRESS_VARIABLE, "value": f"{name}-0.{name}"},
        {"name": MASTER_PORT_VARIABLE, "value": str(MASTER_PORT)},
    ]


def _resources(spec: FineTuneJobSpec, stage: Stage, gpus: int) -> Manifest:
    """Requests and limits; GPUs are those of train's plan and nothing else, whatever the user's maps say."""
    wanted = spec.resources
    part = wanted if stage is Stage.TRAIN else wanted.prepare
    requests, limits = (
        {name: amount for name, amount in (named or {}).items() if name != wanted.gpu_resource}
        for named in ((part.requests, part.limits) if part else (None, None))
    )
    if stage is Stage.TRAIN and gpus:
        limits[wanted.gpu_resource] = str(gpus)  # the API server makes it the request too
    if stage is not Stage.TRAIN:  # a limit alone is a request as well
        requests = {name: amount for name, amount in CPU_STAGE_REQUESTS.items() if name not in limits} | requests
    return {key: named for key, named in (("requests", requests), ("limits", limits)) if named}


def _scheduling(spec: FineTuneJobSpec) -> Manifest:
    """The same for all stages, as the workspace's volume may be tied to a node or a zone."""
    if spec.scheduling is None:
        return {}
    of_the_job = ("queueName", "workloadPriorityClassName")
    return {key: value for key, value in spec.scheduling.to_dict().items() if key not in of_the_job}


def _pull_secrets(settings: Settings) -> Manifest:
    names = settings.trainer_pull_secrets
    return {"imagePullSecrets": [{"name": name} for name in names]} if names else {}
