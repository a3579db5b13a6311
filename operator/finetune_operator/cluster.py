"""The port: all that the core needs from a cluster. `kube` is the real one, `local` this machine."""

from dataclasses import dataclass
from typing import Literal, Protocol

from finetune_api.constants import Stage
from finetune_api.status import FineTuneJobStatus

from finetune_operator.observed import Key, Manifest, Observed, Resource


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event about the FineTuneJob. `key` tells two events of one reason apart."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    key: str = ""


class ClusterError(Exception):
    """The cluster did not do what it was asked; the message says why, for people."""


class NameClashError(ClusterError):
    """An object of that name exists and is not this resource's own."""


class RejectedError(ClusterError):
    """The API server finds the object invalid (400, 422): asking again cannot help."""


class UnavailableError(ClusterError):
    """Forbidden, over quota, too many requests, not reachable: worth another try later."""


class ForbiddenError(UnavailableError):
    """Quota, an admission policy or missing rights are against it: the user wants to know, and it is tried again."""


class Cluster(Protocol):
    async def observe(self, key: Key) -> tuple[Resource, Observed] | None:
        """The resource and its children as they are known now; None if it does not exist."""

    async def refresh(self, key: Key) -> None:
        """Asks the cluster for all that is known of this job, which may be behind. Raises UnavailableError."""

    async def create(self, resource: Resource, manifest: Manifest) -> None:
        """Creates a child; one that is there already and is this resource's own is left as it is.

        Raises NameClashError, RejectedError or UnavailableError.
        """

    async def change_job(self, resource: Resource, stage: Stage, patch: Manifest) -> None:
        """Applies a merge patch to a child Job: annotations, and of its spec suspend, backoffLimit and
        activeDeadlineSeconds, which may change. A Job that does not exist any more needs no change.
        """

    async def delete_child(self, resource: Resource, stage: Stage) -> None:
        """Deletes a child Job and its pods, so that the stage can run again."""

    async def delete(self, resource: Resource) -> None:
        """Deletes the resource itself, and with it all it owns."""

    async def write_status(self, resource: Resource, status: FineTuneJobStatus) -> None:
        """Replaces the status of exactly this resource (by uid), if it still is as it was read; else nothing is
        written, and the job comes up again."""

    def emit(self, resource: Resource, event: Event) -> None:
        """Records an Event once, however often it is asked to. Never raises: events are a courtesy."""
