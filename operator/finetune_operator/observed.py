"""What the operator knows about one job at one moment: the resource, its child Jobs, their pods and their words.

Objects of Kubernetes stay dicts in their JSON form, as the API server sent them; nothing here asks for more.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from finetune_api.constants import (
    GROUP,
    HASH_ANNOTATION,
    JOB_LABEL,
    STAGE_LABEL,
    ExitCode,
    Reason,
    Stage,
)
from finetune_api.progress import Outcome, Progress, Result
from finetune_api.status import FineTuneJobStatus
from pydantic import ValidationError

Manifest = dict[str, Any]
Pod = TypeVar("Pod", bound=Mapping[str, Any])

MAX_SKEW_SECONDS = 86400.0
"""Clocks are not thought to differ by more."""

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
INDEX_FAILURES_ANNOTATION = "batch.kubernetes.io/job-index-failure-count"
"""On the pods of an Indexed Job with backoffLimitPerIndex: how many of the index's pods have failed before."""

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"

SUSPENDED_ANNOTATION = f"{GROUP}/suspended"
"""On a Job that we have suspended: one that somebody else has suspended is theirs to resume."""


@dataclass(frozen=True, order=True)
class Key:
    """Names a FineTuneJob in the work queue."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Resource:
    """A FineTuneJob as it was read. `spec` is not parsed yet: a CRD that is not ours may have let anything in."""

    key: Key
    uid: str
    generation: int
    deleting: bool
    spec: Manifest
    status: FineTuneJobStatus
    version: str = ""
    """resourceVersion of what was read."""

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> "Resource":
        """From the JSON form. Of a status that somebody else has written, what cannot be read is left out."""
        metadata = body["metadata"]
        return cls(
            key=Key(metadata.get("namespace", "default"), metadata["name"]),
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            deleting="deletionTimestamp" in metadata,
            spec=body.get("spec") or {},
            status=_read_status(body.get("status") or {}),
            version=metadata.get("resourceVersion", ""),
        )

    def child_name(self, stage: Stage) -> str:
        return f"{self.key.name}-{stage}"


def _read_status(document: Manifest) -> FineTuneJobStatus:
    """As much of the status as can be read: what was done must not be forgotten for a field that is not known."""
    text = json.dumps(document)
    while True:
        try:
            return FineTuneJobStatus.model_validate_json(text)
        except ValidationError as error:
            document = json.loads(text)
            wrong = error.errors(include_url=False)[0]
            path = wrong["loc"][:-1] if wrong["type"] == "missing" else wrong["loc"]
            if not path:
                return FineTuneJobStatus()
            _mend(document, path)
            text = json.dumps(document)


def _mend(document: Manifest, path: Sequence[int | str]) -> None:
    """Takes away what stands there. A failure for a reason of the future stays a failure."""
    place: Any = document
    try:
        for part in path[:-1]:
            place = place[part]
        if tuple(path) == ("failure", "reason") and place["reason"] != Reason.STAGE_FAILED:
            place["reason"] = Reason.STAGE_FAILED.value
        else:
            del place[path[-1]]
    except (KeyError, IndexError, TypeError):  # the path names a step of the validation: the whole field goes
        del document[str(path[0])]


@dataclass(frozen=True)
class Observed:
    """The children of one job. All mappings lack what does not exist."""

    jobs: Mapping[Stage, Manifest] = field(default_factory=dict)
    """The child Jobs that this resource owns (by uid)."""
    pods: Mapping[Stage, Sequence[Manifest]] = field(default_factory=dict)
    """Pods of each stage, oldest first."""
    progress: Progress | None = None
    """The newest word of the running pod; of several nodes, of the first one's."""
    workload: Manifest | None = None
    """What Kueue keeps about the train Job while it is suspended."""
    events: Sequence[Manifest] = ()
    """Events (core/v1) about a pod that does not start, or about a Job that gets no pod; oldest first."""
    policies: Mapping[str, str | None] = field(default_factory=dict)
    """NetworkPolicies for its pods, those of the whole namespace and its own: name -> hash."""

    def result(self, stage: Stage) -> Result | None:
        """What the stage's pod said when it succeeded; of several nodes, the first one speaks."""
        for pod in self.pods.get(stage, ()):
            result = result_of(pod) if index_of(pod) == 0 else None
            if result and result.outcome is Outcome.SUCCEEDED and getattr(result, stage.value) is not None:
                return result
        return None


def is_owned_by(child: Mapping[str, Any], uid: str) -> bool:
    """Whether the object is the resource's own child, and not one that happens to have its name."""
    return any(owner.get("uid") == uid for owner in child["metadata"].get("ownerReferences") or ())


def stage_of(child: Mapping[str, Any]) -> Stage | None:
    """The stage that a Job or pod is labelled with."""
    value = (child["metadata"].get("labels") or {}).get(STAGE_LABEL)
    return Stage(value) if value in set(Stage) else None


def job_name_of(child: Mapping[str, Any]) -> str | None:
    """Name of the FineTuneJob that a Job or pod is labelled with."""
    return (child["metadata"].get("labels") or {}).get(JOB_LABEL)


def manifest_hash_of(child: Mapping[str, Any]) -> str | None:
    return (child["metadata"].get("annotations") or {}).get(HASH_ANNOTATION)


def parse_time(text: str | None) -> float | None:
    """Unix time of a Kubernetes timestamp; None for one that is none."""
    try:
        return None if text is None else datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None


def format_time(moment: float) -> str:
    """A Kubernetes timestamp, in whole seconds."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition_of(child: Mapping[str, Any], kind: str) -> Manifest | None:
    """The condition of that type, if its status is True."""
    for condition in (child.get("status") or {}).get("conditions") or ():
        if condition["type"] == kind and condition["status"] == "True":
            return dict(condition)
    return None


def container_of(pod: Mapping[str, Any]) -> Manifest:
    """Status of the pod's only container; empty before the kubelet has said anything."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or [{}]
    return dict(statuses[0])


def terminated(pod: Mapping[str, Any]) -> Manifest | None:
    """The container's end: exitCode, reason, message; None while there is none."""
    state = container_of(pod).get("state") or {}
    return state.get("terminated")


def is_suspended(job: Mapping[str, Any]) -> bool:
    """Whether a Job has been told to run no pods."""
    return bool(job["spec"].get("suspend"))


def is_suspended_by_us(job: Mapping[str, Any]) -> bool:
    return SUSPENDED_ANNOTATION in (job["metadata"].get("annotations") or {})


def suspension(suspend: bool) -> Manifest:
    """The merge patch that suspends or resumes a Job."""
    return {
        "metadata": {"annotations": {SUSPENDED_ANNOTATION: "true" if suspend else None}},
        "spec": {"suspend": suspend},
    }


def merge_patch(document: Manifest, patch: Mapping[str, Any]) -> Manifest:
    """The document after a JSON merge patch (RFC 7396): null takes a field away."""
    merged = dict(document)
    for name, value in patch.items():
        if isinstance(value, dict):
            old = merged.get(name)
            merged[name] = merge_patch(old if isinstance(old, dict) else {}, value)
        elif value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged


def has_ended(job: Mapping[str, Any]) -> bool:
    """Whether a Job is complete or has failed for good."""
    return condition_of(job, "Complete") is not None or condition_of(job, "Failed") is not None


def is_running(pod: Mapping[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") == "Running" and terminated(pod) is None


def is_leaving(pod: Mapping[str, Any]) -> bool:
    """Whether a pod has been told to end, or is about to be: it was deleted, or is the target of a disruption."""
    return "deletionTimestamp" in pod["metadata"] or condition_of(pod, "DisruptionTarget") is not None


def deadline_of(pod: Mapping[str, Any]) -> float:
    """Unix time at which a pod that is to end is killed; infinity for one that is not."""
    deadline = parse_time(pod["metadata"].get("deletionTimestamp"))
    return math.inf if deadline is None else deadline


def is_pending(pod: Mapping[str, Any]) -> bool:
    return bool((pod.get("status") or {}).get("phase", "Pending") == "Pending")


def has_failed(pod: Mapping[str, Any]) -> bool:
    """Whether it ended badly: its container by itself, or the pod as a whole (evicted before it could run)."""
    end = terminated(pod)
    return bool(end and end.get("exitCode")) or (pod.get("status") or {}).get("phase") == "Failed"


def index_of(pod: Mapping[str, Any]) -> int:
    """Number of the pod's node in its Indexed Job, from 0; the first one speaks for all."""
    return _number(pod, INDEX_ANNOTATION)


def newest_of_each_node(pods: Iterable[Pod]) -> list[Pod]:
    """The newest pod of every index that has one, by index; `pods` are the oldest first."""
    newest = {index_of(pod): pod for pod in pods}
    return [newest[index] for index in sorted(newest)]


def nodes_of(job: Mapping[str, Any]) -> int:
    """How many pods of the Job run at a time."""
    return int(job["spec"].get("parallelism") or 1)


def failures_of(job: Mapping[str, Any], pods: Iterable[Mapping[str, Any]]) -> int:
    """How often the Job's work has failed, without what its podFailurePolicy ignores.

    Several nodes often fail together, and that is one failure: the most that any one of them has had.
    """
    if nodes_of(job) == 1:
        return int((job.get("status") or {}).get("failed") or 0)
    each = (_number(pod, INDEX_FAILURES_ANNOTATION) + _counts(pod) for pod in newest_of_each_node(pods))
    return max(each, default=0)


def _counts(pod: Mapping[str, Any]) -> bool:
    """Whether it failed by itself: not as the victim of a peer that was lost, and not of a disruption."""
    code = (terminated(pod) or {}).get("exitCode")
    return has_failed(pod) and code != ExitCode.TRY_AGAIN and condition_of(pod, "DisruptionTarget") is None


def _number(pod: Mapping[str, Any], annotation: str) -> int:
    text = (pod["metadata"].get("annotations") or {}).get(annotation, "0")
    return int(text) if text.isdecimal() else 0


def result_of(pod: Mapping[str, Any]) -> Result | None:
    """What the trainer said at its end; None if it could not say anything, or something that is not ours."""
    end = terminated(pod)
    try:
        result = Result.model_validate_json(end["message"]) if end and end.get("message") else None
    except ValidationError:
        return None
    return result if result is None or _is_storable(result.to_dict()) else None


def _is_storable(value: Any) -> bool:
    """Whether no number is larger than the API server's integers."""
    if isinstance(value, dict | list):
        return all(map(_is_storable, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or abs(value) < 2**63
