"""What all children have in common: name, labels, owner, hash."""

import hashlib
import json
from typing import Any

from finetune_api.constants import (
    API_VERSION,
    FIELD_MANAGER,
    GROUP,
    HASH_ANNOTATION,
    JOB_LABEL,
    KIND,
    STAGE_LABEL,
    Stage,
)

from finetune_operator.observed import MANAGED_BY_LABEL, Manifest, Resource

JOB_UID_ANNOTATION = f"{GROUP}/job-uid"
"""On a child that has no owner, because it outlives the job: whose it was."""

COMMON_LABELS = {"app.kubernetes.io/name": "finetune-trainer", MANAGED_BY_LABEL: FIELD_MANAGER}


def identity_labels(resource: Resource, stage: Stage) -> dict[str, str]:
    """What selects the pods of one stage of one job."""
    return {JOB_LABEL: resource.key.name, STAGE_LABEL: stage.value}


def render_labels(resource: Resource, stage: Stage | None) -> dict[str, str]:
    """Labels of a child; the workspace is of no single stage."""
    return COMMON_LABELS | (identity_labels(resource, stage) if stage else {JOB_LABEL: resource.key.name})


def render_metadata(resource: Resource, name: str, stage: Stage | None, owned: bool = True) -> Manifest:
    """Metadata of a child. One that is not owned stays when the resource goes."""
    metadata: Manifest = {
        "name": name,
        "namespace": resource.key.namespace,
        "labels": render_labels(resource, stage),
        "annotations": {},
    }
    if not owned:
        return metadata | {"annotations": {JOB_UID_ANNOTATION: resource.uid}}
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": resource.key.name,
        "uid": resource.uid,
        "controller": True,
        # true would need the right to update the resource's finalizers, and only holds up foreground deletion
        "blockOwnerDeletion": False,
    }
    return metadata | {"ownerReferences": [owner]}


def render_shared_metadata(namespace: str, name: str) -> Manifest:
    """Metadata of what all jobs of a namespace share: it has no owner, and stays when they go."""
    return {"name": name, "namespace": namespace, "labels": COMMON_LABELS, "annotations": {}}


def seal(manifest: Manifest) -> Manifest:
    """The manifest with the SHA-256 of its JSON form as an annotation."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    metadata: dict[str, Any] = manifest["metadata"]
    annotations = metadata["annotations"] | {HASH_ANNOTATION: digest}
    return manifest | {"metadata": metadata | {"annotations": annotations}}
