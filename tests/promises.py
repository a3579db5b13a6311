"""What is promised of every job under any fault, checked at every change that the API server sees."""

from collections import Counter, defaultdict
from collections.abc import Collection

from finetune_api.constants import JOB_LABEL, Phase, Stage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.evidence import has_outcome, is_finished
from finetune_operator.observed import Manifest, Resource, condition_of, stage_of

from tests.played_cluster import PlayedCluster


class Referee:
    """`saw` is told of every change; what breaks a promise is written down in `broken`."""

    def __init__(self) -> None:
        self.cluster: PlayedCluster | None = None
        self.broken: list[str] = []
        self.gave_up: set[str] = set()
        """FineTuneJobs (uids) of which a Job has failed for good: these may fail."""
        self.status_writes = 0
        self._reasons_to_go_back: Counter[str] = Counter()
        """New pods, of which the first is none, edits by hand, and workspaces that were deleted."""
        self._steps_back: Counter[str] = Counter()
        self._edited: defaultdict[str, bool] = defaultdict(bool)

    def saw(self, writer: str, path: str, old: Manifest | None, new: Manifest | None) -> None:
        try:
            if "/finetunejobs/" in path and old is not None and new is not None:
                self._resource(writer.startswith("replica"), old, new)
            elif "/jobs/" in path and new is not None:
                self._job(writer, path, old, new)
            elif "/persistentvolumeclaims/" in path and new is None and old is not None:
                for owner in old["metadata"]["ownerReferences"]:
                    self._reasons_to_go_back[owner["uid"]] += 1
            elif "/pods/" in path and new is not None and stage_of(new) is Stage.TRAIN:
                self._train_pod(old, new)
        except AssertionError as error:
            self.broken.append(f"{path}, written by {writer}: {error}")

    def _resource(self, by_operator: bool, old: Manifest, new: Manifest) -> None:
        uid = new["metadata"]["uid"]
        if not by_operator:
            self._edited[uid] = True
            self._reasons_to_go_back[uid] += _step(Resource.read(old).status) != _step(Resource.read(new).status)
            return
        self.status_writes += 1
        assert old["spec"] == new["spec"], "the spec is the user's"
        assert _own(old) == _own(new), "the metadata is the user's"
        assert old.get("status") != new["status"], "a write without a change"
        before, after = Resource.read(old).status, FineTuneJobStatus.model_validate(new["status"])
        taken_away = [stage for stage in Stage if is_finished(before) and not has_outcome(before, stage)]
        check_legal(after, but=taken_away)
        if is_finished(before):
            assert after.phase is not None and after.phase.finished, f"an end was taken back: {before} -> {after}"
            if not self._edited[uid]:
                assert (after.result, after.failure) == (before.result, before.failure), "an end was changed"
        if _step(after) < _step(before):
            self._steps_back[uid] += 1
            assert self._steps_back[uid] < self._reasons_to_go_back[uid], "progress went back with no new pod"
        self._edited[uid] = False

    def _job(self, writer: str, path: str, old: Manifest | None, new: Manifest) -> None:
        assert self.cluster is not None
        owner, resource = self._owner(new)
        if condition_of(new, "Failed") and owner is not None:
            self.gave_up.add(owner)
        if old is not None or not writer.startswith("replica"):
            return
        if resource is None:  # it was deleted a moment ago: the garbage collector sees to it
            return
        stage = Stage(str(stage_of(new)))
        status = Resource.read(resource).status
        assert not is_finished(status), "a Job for a finished job"
        assert not has_outcome(status, stage), "a stage that is done runs again"
        name = resource["metadata"]["name"]
        for pod_path, pod in self.cluster.pods(stage):
            alive = pod["status"]["phase"] in ("Pending", "Running")
            same = pod["metadata"]["namespace"] == resource["metadata"]["namespace"]
            assert not (alive and same and pod["metadata"]["labels"][JOB_LABEL] == name), (
                f"a second one beside {pod_path}"
            )

    def _train_pod(self, old: Manifest | None, new: Manifest) -> None:
        assert self.cluster is not None
        jobs = [job for _, job in self.cluster._owners_of(new)]
        if not jobs:
            return
        owner, resource = self._owner(jobs[0])
        if old is None and resource is not None:
            assert not is_finished(Resource.read(resource).status), "a GPU pod for a finished job"
        if (
            old is not None
            and owner is not None
            and (old["status"]["phase"], new["status"]["phase"]) == ("Pending", "Running")
        ):
            self._reasons_to_go_back[owner] += 1

    def _owner(self, child: Manifest) -> tuple[str | None, Manifest | None]:
        assert self.cluster is not None
        owners = {each["uid"] for each in child["metadata"].get("ownerReferences") or ()}
        for path, body in self.cluster.objects.items():
            if "/finetunejobs/" in path and body["metadata"]["uid"] in owners:
                return body["metadata"]["uid"], body
        return next(iter(owners), None), None


def check_legal(status: FineTuneJobStatus, but: Collection[Stage] = ()) -> None:
    """Phase, conditions, evidence and progress say the same; `but` the evidence of these stages, which somebody has
    taken out of the status of a finished job, and which its pods may not be there any more to repeat.
    """
    conditions = {condition.type.value: condition.status for condition in status.conditions or ()}
    assert len(conditions) == len(status.conditions or ()), "a condition stands there twice"
    succeeded, failed = status.phase is Phase.SUCCEEDED, status.phase is Phase.FAILED
    assert (conditions.get("Complete") == "True") == succeeded, "Complete and the phase contradict each other"
    assert (conditions.get("Failed") == "True") == failed, "Failed and the phase contradict each other"
    assert (status.failure is not None) == failed, "failure and the phase contradict each other"
    assert (status.completion_time is not None) == (succeeded or failed), (
        "completionTime and the phase contradict each other"
    )
    assert (conditions.get("Suspended") == "True") == (status.phase is Phase.SUSPENDED), (
        "Suspended and the phase contradict"
    )
    assert not (conditions.get("Running") == "True" and (succeeded or failed)), "it has ended and runs"
    percentage = status.progress.percentage if status.progress else 0
    assert (percentage == 100) == succeeded, f"{percentage} % in phase {status.phase}"
    if succeeded:
        missing = [stage for stage in Stage if not has_outcome(status, stage) and stage not in but]
        assert not missing, f"a success with nothing to show for {missing}"


def _own(body: Manifest) -> Manifest:
    return {name: value for name, value in body["metadata"].items() if name != "resourceVersion"}


def _step(status: FineTuneJobStatus) -> int:
    return (status.progress.step if status.progress else None) or 0
