"""Where a stage finds things: its workspace, its plan, the sources and targets. Pure.

`PodLayout` is that of a pod in a cluster, which `render.storage` mounts; `finetune run` has its own.
"""

import posixpath
from collections.abc import Iterator
from typing import Protocol

from finetune_api.constants import Stage
from finetune_api.dataset import DecisionFile, Source
from finetune_api.kubernetes import LocalReference
from finetune_api.plan import Location
from finetune_api.spec import AdapterSource, FineTuneJobSpec, ModelSpec, OutputSpec

from finetune_operator.observed import Resource


class Layout(Protocol):
    """Where the trainer finds things."""

    def workspace(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        """Folder of the job's own, as the trainer sees it."""

    def workspace_uri(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        """The workspace's artifacts folder, as status names it."""

    def cache(self, spec: FineTuneJobSpec) -> str:
        """Folder with prepared data, for other jobs on the same volume and for the same job again."""

    def locate(self, uri: str, secret: LocalReference | None) -> Location:
        """A source or a target, with its mount and the folder of its Secret's keys."""

    def plan_path(self, resource: Resource, stage: Stage) -> str:
        """The stage's plan.json."""


CACHE = ".prepared"


class PodLayout:
    """In a pod: `render.storage` mounts what this names."""

    WORKSPACE = "/workspace"
    PLAN = "/plan"

    def workspace(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        folder = self.workspace_folder(resource, spec)
        return f"{self.WORKSPACE}/{folder}" if folder else self.WORKSPACE

    def workspace_uri(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        folder = self.workspace_folder(resource, spec)
        return f"pvc://{self.workspace_claim(resource, spec)}/" + (f"{folder}/artifacts" if folder else "artifacts")

    def cache(self, spec: FineTuneJobSpec) -> str:
        return f"{self.WORKSPACE}/{CACHE}"

    def locate(self, uri: str, secret: LocalReference | None) -> Location:
        scheme, name, inner = split_uri(uri)
        path = None
        if scheme in ("pvc", "configmap"):
            # taken as absolute, `..` ends at the mount
            path = self.mount_path(scheme, name) + posixpath.normpath("/" + inner.lstrip("/"))
        return Location(uri=uri, path=path, secret_dir=secret and self.mount_path("secret", secret.name))

    def plan_path(self, resource: Resource, stage: Stage) -> str:
        return f"{self.PLAN}/plan.json"

    def workspace_claim(self, resource: Resource, spec: FineTuneJobSpec) -> str:
        """Name of the workspace's PersistentVolumeClaim."""
        return spec.workspace.claim_name or f"{resource.key.name}-workspace"

    def workspace_folder(self, resource: Resource, spec: FineTuneJobSpec) -> str | None:
        """The job's folder in a claim that is not its own; None: the whole volume is the job's."""
        return f"{resource.key.name}-{resource.uid[:8]}" if spec.workspace.claim_name else None

    def mount_path(self, scheme: str, name: str) -> str:
        """Where a claim (pvc), a ConfigMap (configmap) or a Secret (secret) is mounted."""
        return f"/sources/{scheme}/{name}" if scheme != "secret" else f"/secrets/{name}"


def split_uri(uri: str) -> tuple[str, str, str]:
    """Scheme, the name after it (claim, bucket, host), and the rest."""
    scheme, _, rest = uri.partition("://")
    name, _, inner = rest.partition("/")
    return scheme, name, inner


def storage_used(spec: FineTuneJobSpec, stage: Stage) -> Iterator[tuple[str, LocalReference | None]]:
    """URI and Secret of all that a stage reads or writes beside the workspace: for training that is nothing."""
    used: list[ModelSpec | AdapterSource | Source | DecisionFile | OutputSpec] = []
    if stage is Stage.PREPARE:
        splits = (spec.dataset.validation, spec.dataset.test)
        held_out = (source for split in splits if split for source in split.sources or ())
        decisions = (spec.dataset.review.decisions if spec.dataset.review else None) or ()
        used = [spec.model, *filter(None, [spec.model.adapter]), *spec.dataset.sources, *held_out, *decisions]
    elif stage is Stage.PUBLISH:
        used = [spec.output]
    for part in used:
        if part.uri is not None:
            yield part.uri, part.secret_ref
    if stage is Stage.PREPARE and spec.dataset.personal_data:
        yield "", spec.dataset.personal_data.key_secret_ref  # nothing to mount but the key
