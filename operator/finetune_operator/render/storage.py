"""The workspace's volume, and what the pods of a stage mount: only what the stage needs."""

import hashlib
from dataclasses import dataclass, field

from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.layout import PodLayout, split_uri, storage_used
from finetune_operator.observed import Manifest, Resource
from finetune_operator.render.metadata import render_metadata

WORKSPACE_SIZE = "20Gi"
WORKSPACE_ACCESS = "ReadWriteOnce"

SCRATCH_SIZE = "10Gi"
"""Of /tmp, on the node's disk; a pod that fills it is evicted before its neighbours suffer."""

SHARED_MEMORY_GIB = 1
"""Of /dev/shm, for each GPU: there NCCL and worker processes meet. Containers get 64 MiB; NCCL's guide asks for 1 GiB
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html#shared-memory). It is a bound and takes
nothing away: only what is used counts, as the pod's memory."""

SECRET_MODE = 0o440
"""For the pod's fsGroup, which owns the files."""

LAYOUT = PodLayout()


@dataclass
class Storage:
    """Volumes and mounts of one container. A volume that is asked for twice is mounted from one."""

    volumes: dict[str, Manifest] = field(default_factory=dict)
    mounts: dict[str, Manifest] = field(default_factory=dict)
    """By their path."""

    def add(self, name: str, source: Manifest, path: str, read_only: bool = False, sub_path: str | None = None) -> None:
        """A volume of this name (a DNS label) and source, at this path."""
        self.volumes.setdefault(name, {"name": name, **source})
        mount: Manifest = {"name": name, "mountPath": path}
        if read_only:
            mount["readOnly"] = True
        if sub_path is not None:
            mount["subPath"] = sub_path
        self.mounts[path] = mount


def render_workspace(resource: Resource, spec: FineTuneJobSpec) -> Manifest:
    """The job's own PersistentVolumeClaim. With `retain` nobody owns it, so it stays when the resource goes."""
    wanted = spec.workspace
    storage_class = {"storageClassName": wanted.storage_class_name} if wanted.storage_class_name else {}
    name = LAYOUT.workspace_claim(resource, spec)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": render_metadata(resource, name, stage=None, owned=not wanted.retain),
        "spec": {
            "accessModes": [wanted.access_mode or WORKSPACE_ACCESS],
            "resources": {"requests": {"storage": wanted.size or WORKSPACE_SIZE}},
            **storage_class,
        },
    }


def render_storage(resource: Resource, spec: FineTuneJobSpec, plan: Plan) -> Storage:
    """All volumes of a stage's pod: plan, workspace, scratch space, and what `storage_used` names."""
    stage = plan.stage
    storage = Storage()
    storage.add("plan", {"configMap": {"name": resource.child_name(stage)}}, LAYOUT.PLAN, read_only=True)
    storage.add("tmp", {"emptyDir": {"sizeLimit": SCRATCH_SIZE}}, "/tmp")
    if stage is Stage.TRAIN:
        size = f"{SHARED_MEMORY_GIB * max(1, plan.device.gpus)}Gi"
        storage.add("shm", {"emptyDir": {"medium": "Memory", "sizeLimit": size}}, "/dev/shm")
    _add_workspace(storage, resource, spec, stage)
    workspace_claim = LAYOUT.workspace_claim(resource, spec)
    for uri, secret in storage_used(spec, stage):
        scheme, name, inner = split_uri(uri)
        if scheme == "pvc":
            _add_claim(storage, name, read_only=stage is Stage.PREPARE, is_workspace=name == workspace_claim)
        elif scheme == "configmap":
            _add_config_map_key(storage, name, key=inner)
        if secret is not None:
            source = {"secret": {"secretName": secret.name, "defaultMode": SECRET_MODE}}
            storage.add(_volume_name("secret", secret.name), source, LAYOUT.mount_path("secret", secret.name), True)
    return storage


def _add_workspace(storage: Storage, resource: Resource, spec: FineTuneJobSpec, stage: Stage) -> None:
    """Of a shared claim prepare sees all, for it makes the job's folder as its own user; the others see the folder."""
    claim = {"persistentVolumeClaim": {"claimName": LAYOUT.workspace_claim(resource, spec)}}
    folder = LAYOUT.workspace_folder(resource, spec)
    if folder is None or stage is Stage.PREPARE:
        storage.add("workspace", claim, LAYOUT.WORKSPACE)
    else:
        storage.add("workspace", claim, LAYOUT.workspace(resource, spec), sub_path=folder)


def _add_claim(storage: Storage, claim: str, read_only: bool, is_workspace: bool) -> None:
    source = {"persistentVolumeClaim": {"claimName": claim} | ({"readOnly": True} if read_only else {})}
    name = "workspace" if is_workspace else _volume_name("pvc", claim)
    storage.add(name, source, LAYOUT.mount_path("pvc", claim), read_only)


def _add_config_map_key(storage: Storage, config_map: str, key: str) -> None:
    """Only the keys that are named appear as files."""
    name = _volume_name("configmap", config_map)
    storage.add(
        name, {"configMap": {"name": config_map, "items": []}}, LAYOUT.mount_path("configmap", config_map), True
    )
    items = storage.volumes[name]["configMap"]["items"]
    if {"key": key, "path": key} not in items:
        items.append({"key": key, "path": key})


def _volume_name(kind: str, name: str) -> str:
    """A DNS label for an object whose name may have dots and 253 characters."""
    return f"{kind}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
