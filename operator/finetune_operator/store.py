"""What the watches have told about FineTuneJobs, their Jobs and their pods: in memory, found by the FineTuneJob's key.

Our own writes go in too, as the API server answered them, so that a reconcile never acts on what it has itself
changed since. Of two states of an object the newer wins: resourceVersions of one object compare as integers.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from finetune_api.constants import API_VERSION, FIELD_MANAGER, JOB_LABEL, PLURAL

from finetune_operator.api import api_path
from finetune_operator.observed import MANAGED_BY_LABEL, Key, Manifest, job_name_of


@dataclass(frozen=True)
class Kind:
    """A kind of object that is watched."""

    api_version: str
    plural: str
    selector: str = ""
    """Only objects whose labels are so."""
    names_only: bool = False
    """Its name and hash say all about it, and only its end is news."""

    def path(self, namespace: str | None) -> str:
        return api_path(self.api_version, self.plural, namespace)

    @property
    def query(self) -> dict[str, str]:
        return {"labelSelector": self.selector} if self.selector else {}

    def query_for(self, key: Key) -> dict[str, str]:
        """For what belongs to one FineTuneJob, in its namespace."""
        return (
            {"labelSelector": f"{JOB_LABEL}={key.name}"}
            if self.selector
            else {"fieldSelector": f"metadata.name={key.name}"}
        )


FINE_TUNE_JOBS = Kind(API_VERSION, PLURAL)
JOBS = Kind("batch/v1", "jobs", JOB_LABEL)
PODS = Kind("v1", "pods", JOB_LABEL)
POLICIES = Kind("networking.k8s.io/v1", "networkpolicies", f"{MANAGED_BY_LABEL}={FIELD_MANAGER}", names_only=True)
KINDS = (FINE_TUNE_JOBS, JOBS, PODS, POLICIES)


REMEMBERED = 10_000
"""Deletions that are kept in mind."""


def all_jobs_of(namespace: str) -> Key:
    """Where the store keeps what is shared by all jobs of a namespace."""
    return Key(namespace, "")


def key_of(kind: Kind, body: Manifest) -> Key | None:
    """The FineTuneJob that the object is, or is labelled with; `all_jobs_of` for a policy that has no such label."""
    metadata = body["metadata"]
    namespace = metadata.get("namespace", "default")
    name = metadata["name"] if kind is FINE_TUNE_JOBS else job_name_of(body)
    if name is None:
        return all_jobs_of(namespace) if kind is POLICIES else None
    return Key(namespace, name)


class Store:
    """`changed` is called with the key of every FineTuneJob about which something new was put in."""

    def __init__(self) -> None:
        self.changed: Callable[[Key], None] = lambda _: None
        self._objects: dict[Kind, dict[Key, dict[str, Manifest]]] = {kind: {} for kind in KINDS}  # by uid
        self._keys: dict[str, tuple[Kind, Key]] = {}  # by uid
        self._gone: dict[str, int] = {}  # uid -> resourceVersion of the deletion; the newest REMEMBERED

    def known(self) -> Collection[Key]:
        """All FineTuneJobs."""
        return tuple(self._objects[FINE_TUNE_JOBS])

    def get(self, kind: Kind, key: Key) -> list[Manifest]:
        """Objects of that kind which are, or are labelled with, this FineTuneJob."""
        return list(self._objects[kind].get(key, {}).values())

    def all(self, kind: Kind) -> Iterator[tuple[Key, Manifest]]:
        for key, objects in self._objects[kind].items():
            for body in objects.values():
                yield key, body

    def put(self, kind: Kind, body: Manifest) -> bool:
        """Takes the object's state unless a newer one is known; says whether it did."""
        uid = body["metadata"]["uid"]
        if version_of(body) <= self._gone.get(uid, -1):  # an older list, or the answer to a write, comes late
            return False
        old = self.find(uid)
        if old is not None and not _is_newer(body, old):
            return False
        key = key_of(kind, body)
        if old is not None and self._keys[uid] != (kind, key):  # its label was changed
            self._remove(uid)
        if key is None:
            return False
        self._objects[kind].setdefault(key, {})[uid] = _what_matters(kind, body)
        self._keys[uid] = kind, key
        if not kind.names_only:
            self.changed(key)
        return True

    def update(self, kind: Kind, body: Manifest) -> None:
        """As `put`, for an object that was there before: one that has been deleted since does not come back."""
        if body["metadata"]["uid"] in self._keys:
            self.put(kind, body)

    def remove(self, uid: str, version: int) -> None:
        """Forgets an object that was deleted at this resourceVersion: no older state of it comes back."""
        self._gone[uid] = version
        if len(self._gone) > REMEMBERED:
            del self._gone[next(iter(self._gone))]
        if uid in self._keys:
            key = self._remove(uid)
            is_shared = key == all_jobs_of(key.namespace)
            for each in [job for job in self.known() if job.namespace == key.namespace] if is_shared else [key]:
                self.changed(each)

    def replace(
        self,
        kind: Kind,
        listed: Collection[Manifest],
        version: str,
        *,
        namespace: str | None = None,
        key: Key | None = None,
    ) -> int:
        """Makes the store as a list that is true at resourceVersion `version`; returns how many objects differed.

        The list is of one namespace or of all, or of what belongs to one FineTuneJob.
        """
        differences = sum(self.put(kind, body) for body in listed)
        present = {body["metadata"]["uid"] for body in listed}
        for owner, body in list(self.all(kind)) if key is None else [(key, body) for body in self.get(kind, key)]:
            uid = body["metadata"]["uid"]
            gone = uid not in present and namespace in (None, owner.namespace)
            if gone and version_of(body) <= int(version or 0):  # else it is younger than the list
                self.remove(uid, int(version or 0))
                differences += 1
        return differences

    def find(self, uid: str) -> Manifest | None:
        """The object with that uid, of whatever kind."""
        if uid not in self._keys:
            return None
        kind, key = self._keys[uid]
        return self._objects[kind][key][uid]

    def _remove(self, uid: str) -> Key:
        kind, key = self._keys.pop(uid)
        objects = self._objects[kind][key]
        del objects[uid]
        if not objects:
            del self._objects[kind][key]
        return key


def _what_matters(kind: Kind, body: Manifest) -> Manifest:
    """What somebody reads: managedFields and pod templates are three quarters of a Job, and each job has three Jobs."""
    metadata = {k: v for k, v in body["metadata"].items() if k != "managedFields"}
    if kind.names_only:
        return {"metadata": metadata}
    spec = body.get("spec") or {}
    if kind is JOBS:
        spec = {k: v for k, v in spec.items() if k != "template"}
    elif kind is PODS:
        containers = [{"resources": container.get("resources") or {}} for container in spec.get("containers") or ()]
        spec = {"nodeName": spec.get("nodeName"), "containers": containers}
    return {**body, "metadata": metadata, "spec": spec}


def version_of(body: Manifest) -> int:
    """resourceVersion as the integer that it is (KEP-5504), 0 for one that is none: then the last word counts."""
    text = str(body["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0


def _is_newer(new: Manifest, old: Manifest) -> bool:
    versions = version_of(new), version_of(old)
    return 0 in versions or versions[0] > versions[1]
