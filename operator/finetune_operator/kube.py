"""The port `Cluster` on a Kubernetes API server. Reads come from the store, writes go to the server and into the store.

Every write names the uid or the resourceVersion of the object that it is meant for: an object of the same name that
was made since is never touched.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from finetune_api.constants import API_VERSION, FIELD_MANAGER, KIND, PLURAL, Stage
from finetune_api.progress import Progress
from finetune_api.status import FineTuneJobStatus

from finetune_operator.api import MERGE_PATCH, ApiError, ApiServer, api_path
from finetune_operator.cluster import (
    ClusterError,
    Event,
    ForbiddenError,
    NameClashError,
    RejectedError,
    UnavailableError,
)
from finetune_operator.diagnose import waiting_trouble
from finetune_operator.inquiries import Inquiries
from finetune_operator.kueue import is_queued
from finetune_operator.observed import (
    MANAGED_BY_LABEL,
    Key,
    Manifest,
    Observed,
    Resource,
    has_ended,
    index_of,
    is_owned_by,
    is_running,
    is_suspended,
    job_name_of,
    manifest_hash_of,
    newest_of_each_node,
    nodes_of,
    parse_time,
    stage_of,
    terminated,
)
from finetune_operator.render.metadata import JOB_UID_ANNOTATION
from finetune_operator.store import FINE_TUNE_JOBS, JOBS, PODS, POLICIES, Kind, Store, all_jobs_of

logger = logging.getLogger(__name__)

PLURALS = {
    "ConfigMap": "configmaps",
    "Job": "jobs",
    "NetworkPolicy": "networkpolicies",
    "PersistentVolumeClaim": "persistentvolumeclaims",
    "Service": "services",
}
REPLACEABLE = ("ConfigMap", "NetworkPolicy", "Service")
"""What is brought up to date when it is created once more and would be another one today; the rest is immutable."""

QUIET_START_SECONDS = 5.0
"""What has waited for longer is asked for its events."""


class KubeCluster:
    """`seconds_to_write` is asked before each write: how long it may take; it raises if there may be none.
    `progress_of` gives the newest word of the pod with that uid; `record` has an Event written.
    `reads_workloads`: whether Kueue's may be read."""

    def __init__(
        self,
        api: ApiServer,
        store: Store,
        seconds_to_write: Callable[[], float],
        progress_of: Callable[[str], Progress | None],
        record: Callable[[Resource, Event], None],
        *,
        reads_workloads: bool = False,
    ) -> None:
        self._api = api
        self._store = store
        self._seconds_to_write = seconds_to_write
        self._progress_of = progress_of
        self._record = record
        self._reads_workloads = reads_workloads
        self._inquiries = Inquiries(api)

    # --- reading

    async def observe(self, key: Key) -> tuple[Resource, Observed] | None:
        bodies = self._store.get(FINE_TUNE_JOBS, key)
        if not bodies:
            return None
        # of a resource that was deleted and made anew, both may be here for a moment
        resource = Resource.read(max(bodies, key=lambda body: body["metadata"].get("creationTimestamp", "")))
        jobs: dict[Stage, Manifest] = {}
        for job in self._store.get(JOBS, key):
            stage = stage_of(job)
            if stage is not None and is_owned_by(job, resource.uid):
                jobs[stage] = job
        pods: dict[Stage, list[Manifest]] = {}
        for stage, job in jobs.items():
            mine = [pod for pod in self._store.get(PODS, key) if is_owned_by(pod, job["metadata"]["uid"])]
            if mine:
                pods[stage] = sorted(mine, key=_age_order)
        own_policies = [policy for policy in self._store.get(POLICIES, key) if is_owned_by(policy, resource.uid)]
        policies = [*self._store.get(POLICIES, all_jobs_of(key.namespace)), *own_policies]
        current = next((stage for stage in reversed(Stage) if stage in jobs), None)
        newest = pods.get(current, []) if current else []
        return resource, Observed(
            jobs=jobs,
            pods=pods,
            progress=self._progress(current, newest) if current else None,
            workload=await self._workload_of(jobs.get(Stage.TRAIN)),
            events=await self._events_of(_waiting(jobs[current], newest)) if current else (),
            policies={policy["metadata"]["name"]: manifest_hash_of(policy) for policy in policies},
        )

    def _progress(self, stage: Stage, pods: Sequence[Manifest]) -> Progress | None:
        """The word of the first node's newest running pod; a word about another stage is none."""
        for pod in reversed(pods):
            if index_of(pod) == 0 and is_running(pod):
                progress = self._progress_of(pod["metadata"]["uid"])
                if progress is not None and progress.stage == stage:
                    return progress
        return None

    async def _events_of(self, waiting: Manifest | None) -> Sequence[Manifest]:
        """Why a pod does not start or is not made, in the words of those who should do it."""
        if waiting is None:
            return ()
        created = parse_time(waiting["metadata"].get("creationTimestamp"))
        if created is None or 0 <= time.time() - created < QUIET_START_SECONDS:
            return ()
        return await self._inquiries.events_about(waiting)

    async def _workload_of(self, job: Manifest | None) -> Manifest | None:
        """What Kueue says of a Job that it does not let run."""
        if job is None or not self._reads_workloads or not is_queued(job) or not is_suspended(job) or has_ended(job):
            return None
        return await self._inquiries.workload_of(job)

    async def refresh(self, key: Key) -> None:
        for kind in (FINE_TUNE_JOBS, JOBS, PODS):
            listed, version = await self._list(kind, key, kind.query_for(key))
            self._store.replace(kind, listed, version, key=key)
        listed, version = await self._list(POLICIES, key, POLICIES.query)  # most are shared by the namespace
        self._store.replace(POLICIES, listed, version, namespace=key.namespace)

    async def _list(self, kind: Kind, key: Key, query: Mapping[str, str]) -> tuple[list[Manifest], str]:
        try:
            return await self._api.list_all(kind.path(key.namespace), query)
        except ApiError as error:
            raise UnavailableError(f"cannot list {kind.plural} of {key}: {error}") from error

    # --- writing

    async def create(self, resource: Resource, manifest: Manifest) -> None:
        """POST, and not server-side apply: that would merge into an object of this name which is not ours."""
        metadata = manifest["metadata"]
        if manifest["kind"] == "Job":
            self._wait_for_pods_of_an_earlier_job(resource, manifest)
        collection = api_path(manifest["apiVersion"], PLURALS[manifest["kind"]], metadata["namespace"])
        try:
            answer = await self._write("POST", collection, manifest, query={"fieldManager": FIELD_MANAGER})
        except ApiError as error:
            if error.reason == "AlreadyExists":
                await self._adopt(resource, manifest)
            elif "NamespaceTerminating" in error.causes:
                logger.debug("%s: the namespace is being deleted", _name(manifest))
            else:
                raise _as_cluster_error(f"cannot create {_name(manifest)}", error) from error
        else:
            self._know(answer)

    def _know(self, child: Manifest) -> None:
        kind = {"Job": JOBS, "NetworkPolicy": POLICIES}.get(child["kind"])
        if kind is not None:
            self._store.put(kind, child)

    def _wait_for_pods_of_an_earlier_job(self, resource: Resource, manifest: Manifest) -> None:
        """A pod outlives its deleted Job while it saves: two writers on one workspace would be one too many.

        Its end changes the store, and so brings the job back here at once.
        """
        jobs = {job["metadata"]["uid"] for job in self._store.get(JOBS, resource.key)}
        for pod in self._store.get(PODS, resource.key):
            is_alive = (pod.get("status") or {}).get("phase") in ("Pending", "Running")
            is_orphan = not any(is_owned_by(pod, uid) for uid in jobs)
            if is_alive and is_orphan and stage_of(pod) == stage_of(manifest):
                raise UnavailableError(f"pod {pod['metadata']['name']} of an earlier Job is still ending")

    async def _adopt(self, resource: Resource, manifest: Manifest) -> None:
        """Finds out whose the object of that name is, and renews ours where it may be renewed."""
        metadata, name = manifest["metadata"], _name(manifest)
        path = api_path(manifest["apiVersion"], PLURALS[manifest["kind"]], metadata["namespace"], metadata["name"])
        try:
            existing = await self._api.request("GET", path)
        except ApiError as error:
            raise UnavailableError(f"{name} exists but cannot be read: {error}") from error
        found = existing["metadata"]
        if "deletionTimestamp" in found or _is_of_predecessor(existing, resource):
            raise UnavailableError(f"{name} of an earlier try is still being deleted")
        _claim(existing, manifest, resource)
        self._know(existing)
        if manifest["kind"] in REPLACEABLE and manifest_hash_of(existing) != manifest_hash_of(manifest):
            # PUT, and not server-side apply: that would leave fields that a former version of us has written
            current = {"uid": found["uid"], "resourceVersion": found["resourceVersion"]}
            try:
                self._know(await self._write("PUT", path, {**manifest, "metadata": {**metadata, **current}}))
            except ApiError as error:
                raise _as_cluster_error(f"cannot update {name}", error) from error
            logger.info("%s is brought up to date", name)

    async def change_job(self, resource: Resource, stage: Stage, patch: Manifest) -> None:
        """Only the very state that was seen is changed: another replica may have stopped the Job meanwhile."""
        job = self._child(resource, stage)
        if job is None:
            return
        seen = {field: job["metadata"][field] for field in ("uid", "resourceVersion")}
        patch = {**patch, "metadata": {**patch.get("metadata", {}), **seen}}
        try:
            answer = await self._write("PATCH", _path_of(JOBS.api_version, "jobs", job), patch, MERGE_PATCH)
        except ApiError as error:
            if error.status == 404 or "metadata.uid" in str(error):  # gone, or gone and made anew
                return
            if error.status == 409:
                await self.refresh(resource.key)
            raise _as_cluster_error(f"cannot change Job {job['metadata']['name']}", error) from error
        else:
            self._store.update(JOBS, answer)

    async def delete_child(self, resource: Resource, stage: Stage) -> None:
        job = self._child(resource, stage)
        if job is not None:
            path = _path_of(JOBS.api_version, "jobs", job)
            answer = await self._delete(path, job["metadata"]["uid"], "Foreground")
            if answer is not None and answer.get("kind") == "Job":
                self._store.update(JOBS, answer)

    async def delete(self, resource: Resource) -> None:
        path = api_path(API_VERSION, PLURAL, resource.key.namespace, resource.key.name)
        await self._delete(path, resource.uid, "Background")

    async def write_status(self, resource: Resource, status: FineTuneJobStatus) -> None:
        """PUT, and not server-side apply: that would leave what others have written into the status.

        It names the resourceVersion from which the status was worked out. If the resource has changed since, nothing is
        written, and its new state brings the job back here.
        """
        metadata = {
            "name": resource.key.name,
            "namespace": resource.key.namespace,
            "uid": resource.uid,
            "resourceVersion": resource.version,
        }
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status.to_dict()}
        path = api_path(API_VERSION, PLURAL, resource.key.namespace, resource.key.name, "status")
        try:
            answer = await self._write("PUT", path, body, query={"fieldManager": FIELD_MANAGER})
        except ApiError as error:
            if error.status not in (404, 409):
                raise _as_cluster_error("cannot write the status", error) from error
            logger.debug("The status was not written: %s", error)
            await self.refresh(resource.key)  # the watch may be broken
        else:
            self._store.update(FINE_TUNE_JOBS, answer)

    def emit(self, resource: Resource, event: Event) -> None:
        self._record(resource, event)

    def _child(self, resource: Resource, stage: Stage) -> Manifest | None:
        jobs = self._store.get(JOBS, resource.key)
        return next((job for job in jobs if stage_of(job) == stage and is_owned_by(job, resource.uid)), None)

    async def _delete(self, path: str, uid: str, propagation: str) -> Manifest | None:
        options = {"propagationPolicy": propagation, "preconditions": {"uid": uid}}
        try:
            return await self._write("DELETE", path, options)
        except ApiError as error:
            if error.status in (404, 409):  # gone, or gone and made anew
                return None
            raise _as_cluster_error(f"cannot delete {path}", error) from error

    async def _write(
        self,
        method: str,
        path: str,
        body: Manifest,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Raises ApiError, or UnavailableError if this replica may not write."""
        timeout = self._seconds_to_write()
        return await self._api.request(method, path, body, query=query, content_type=content_type, timeout=timeout)


def _path_of(api_version: str, plural: str, body: Manifest) -> str:
    return api_path(api_version, plural, body["metadata"]["namespace"], body["metadata"]["name"])


def _name(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def _waiting(job: Manifest, pods: Sequence[Manifest]) -> Manifest | None:
    """What only Events can explain: a pod that is pending and does not say why itself, or a Job that has not even a pod
    for every node."""
    newest = newest_of_each_node(pods)
    pending = [pod for pod in newest if (pod.get("status") or {}).get("phase") == "Pending"]
    if pending:
        return next((pod for pod in pending if waiting_trouble(pod) is None), None)
    return None if has_ended(job) or is_suspended(job) or len(newest) == nodes_of(job) else job


def _age_order(pod: Manifest) -> tuple[str, str]:
    """Of pods made in the same second the one that has ended is the older: its successor comes after its end."""
    is_over = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    end = (terminated(pod) or {}).get("finishedAt") or ""
    return pod["metadata"].get("creationTimestamp", ""), end if is_over else "alive"


def _claim(existing: Manifest, manifest: Manifest, resource: Resource) -> None:
    """Raises NameClashError if what has the manifest's name is not this resource's own, and ForbiddenError if it is in
    the way of all jobs of the namespace.
    """
    metadata, name = existing["metadata"], _name(manifest)
    if job_name_of(manifest) is None:
        if (metadata.get("labels") or {}).get(MANAGED_BY_LABEL) != FIELD_MANAGER:
            raise ForbiddenError(f"{name} exists and is not ours, and no pod may start without ours: rename it")
        return
    retained_for = (metadata.get("annotations") or {}).get(JOB_UID_ANNOTATION)
    if retained_for is not None and retained_for != resource.uid:
        raise NameClashError(
            f"{name} was retained from an earlier FineTuneJob: delete it, or rename this FineTuneJob and name the "
            "claim in spec.workspace.claimName"
        )
    if retained_for is None and not is_owned_by(existing, resource.uid):
        raise NameClashError(f"{name} exists and belongs to somebody else: rename the FineTuneJob or delete it")


def _is_of_predecessor(existing: Manifest, resource: Resource) -> bool:
    """Whether its owner was an earlier FineTuneJob of the same name: garbage collection has not come by yet."""
    return any(
        owner.get("kind") == KIND and owner.get("name") == resource.key.name and owner.get("uid") != resource.uid
        for owner in existing["metadata"].get("ownerReferences") or ()
    )


def _as_cluster_error(what: str, error: ApiError) -> ClusterError:
    kinds = {400: RejectedError, 413: RejectedError, 422: RejectedError, 403: ForbiddenError}
    return kinds.get(error.status or 0, UnavailableError)(f"{what}: {error}")
