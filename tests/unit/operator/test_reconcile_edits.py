"""What somebody else has edited, deleted or lost: the job finds back to where it was."""

import copy

import pytest
from finetune_api.constants import Phase, Stage
from finetune_operator.cluster import ForbiddenError, NameClashError
from finetune_operator.observed import Manifest

from tests.fake_cluster import SPEC, FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC))


def kinds(cluster: FakeCluster) -> list[str]:
    return [manifest["kind"] for manifest in cluster.created]


async def test_a_status_with_fields_of_the_future_forgets_nothing(cluster: FakeCluster) -> None:
    await cluster.pass_through(*Stage)
    assert cluster.body is not None
    status = cluster.body["status"]
    status["result"]["fieldOfTheFuture"] = 1
    status["conditions"][0]["reason"] = "ReasonOfTheFuture"
    del status["conditions"][1]["message"]
    status["data"]["tokens"] = "many"
    cluster.jobs.clear()
    cluster.pods.clear()
    await cluster.settle()
    assert cluster.status.phase is Phase.SUCCEEDED
    assert cluster.status.result is not None and cluster.status.result.artifact is not None
    assert not cluster.jobs


@pytest.mark.parametrize("phase", list(Phase))
async def test_a_phase_written_by_hand_misleads_nobody(cluster: FakeCluster, phase: Phase) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    before, created = cluster.status, len(cluster.created)
    cluster.edit_status(phase=phase)
    await cluster.settle()
    assert cluster.status == before
    assert len(cluster.created) == created
    assert cluster.jobs[Stage.TRAIN]["spec"]["suspend"] is False


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("end", ["success", "failure"])
async def test_nor_does_it_begin_a_finished_job_again(cluster: FakeCluster, end: str, phase: Phase) -> None:
    await finish(cluster, end)
    before, created, events = cluster.status, len(cluster.created), len(cluster.events)
    cluster.jobs.clear()
    cluster.pods.clear()
    cluster.edit_status(phase=phase, completionTime=cluster.status.completion_time)
    await cluster.settle()
    assert cluster.status == before
    assert len(cluster.created) == created
    assert len(cluster.events) == events, "nothing has happened"


@pytest.mark.parametrize("gone", ["failure", "result", "data", "conditions", "completionTime", "progress", "message"])
@pytest.mark.parametrize("end", ["success", "failure"])
async def test_what_was_taken_out_of_a_final_status_comes_back(cluster: FakeCluster, end: str, gone: str) -> None:
    await finish(cluster, end)
    before, created = cluster.status, len(cluster.created)
    cluster.edit_status(**{gone: None})
    await cluster.settle()
    after = cluster.status
    assert (after.phase, after.result, after.data) == (before.phase, before.result, before.data)
    assert (after.failure is None) == (before.failure is None)
    assert cluster.condition("Complete") == (("True", "Succeeded") if end == "success" else ("False", "StageFailed"))
    assert (cluster.condition("Failed") is None) == (end == "success")
    assert after.completion_time is not None
    for kind in ("DataReady", "GatePassed"):
        assert cluster.condition(kind) == next(
            ((c.status, c.reason) for c in before.conditions if c.type == kind), None
        )
    assert len(cluster.created) == created


async def test_an_end_that_never_was_is_taken_back(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    before = cluster.status
    failure = {"reason": "StageFailed", "message": "says somebody"}
    cluster.edit_status(failure=failure, completionTime="2026-01-01T00:00:00Z")
    await cluster.settle()
    assert cluster.status == before
    cluster.edit_status(progress={"percentage": 100, "lastUpdatedTime": "2026-01-01T00:00:00Z"})
    await cluster.settle()
    assert cluster.status.progress is not None and cluster.status.progress.percentage == 99


async def test_times_that_cannot_be_are_not_believed(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    far, none = "9999-12-31T23:59:59Z", "2026-13-99T99:99:99Z"
    for start, updated in ((far, far), (none, none)):
        cluster.edit_status(startTime=start, progress={"percentage": 40, "lastUpdatedTime": updated})
        await cluster.settle()
        assert cluster.status.start_time is not None and cluster.status.start_time < "2100"
        await cluster.turn(seconds=4000)
        assert cluster.condition("Running") == ("True", "TrainingStalled")
    cluster.finish(Stage.TRAIN)
    cluster.edit(limits={"ttlSecondsAfterFinished": 100})
    await cluster.pass_through(Stage.PUBLISH)
    cluster.edit_status(completionTime=far)
    left = await cluster.turn()
    assert left == 100


async def test_a_stage_whose_outcome_was_erased_stops_what_came_after_it(cluster: FakeCluster) -> None:
    """And whose pod is gone, or it would be read once more: two writers on a workspace are one too many."""
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    del cluster.pods[Stage.PREPARE]
    cluster.edit_status(data=None)
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.PREPARE]
    cluster.start(Stage.PREPARE)
    cluster.finish(Stage.PREPARE)
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.PREPARE, Stage.TRAIN]


@pytest.mark.parametrize("suspended_by", ["us", "somebody else"])
async def test_a_job_that_we_suspended_is_resumed_whatever_the_status_says(
    cluster: FakeCluster, suspended_by: str
) -> None:
    """The operator may have died before it could write it down."""
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    before = copy.deepcopy(cluster.body["status"])
    if suspended_by == "us":
        cluster.edit(suspend=True)
        await cluster.settle()
        cluster.edit(suspend=False)
        cluster.body["status"] = before
    else:
        cluster.jobs[Stage.TRAIN]["spec"]["suspend"] = True
    await cluster.settle()
    assert cluster.jobs[Stage.TRAIN]["spec"]["suspend"] is (suspended_by != "us")


async def test_what_was_found_out_is_kept_though_the_next_stage_cannot_be_made(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    cluster.finish(Stage.PREPARE)
    cluster.create_error = ForbiddenError("exceeded quota: gpus")
    with pytest.raises(ForbiddenError):
        await cluster.turn()
    assert cluster.status.data is not None
    assert cluster.condition("DataReady") == ("True", "Prepared")
    assert cluster.status.phase is Phase.QUEUED
    assert cluster.condition("Running") == ("False", "Forbidden")
    cluster.create_error = NameClashError("Job demo-train exists and is not this FineTuneJob's")
    await cluster.settle()
    assert cluster.status.phase is Phase.FAILED
    assert cluster.status.data is not None


async def finish(cluster: FakeCluster, end: str) -> None:
    if end == "success":
        await cluster.pass_through(*Stage)
    else:
        await cluster.settle()
        cluster.start(Stage.PREPARE)
        cluster.crash(Stage.PREPARE, 1, final=True)
        await cluster.settle()


async def test_a_deleted_child_is_made_again(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.jobs[Stage.TRAIN]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await cluster.settle()
    del cluster.jobs[Stage.TRAIN]
    await cluster.settle()
    assert Stage.TRAIN in cluster.jobs


def missing(kind: str, name: str) -> Manifest:
    """A pod that does not start, in the scheduler's words."""
    words = f'0/1 nodes are available: {kind} "{name}" not found.'
    return {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": words}]}


async def test_what_a_stage_still_needs_is_made_again(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.created.clear()
    pod = cluster.pod(Stage.PREPARE, missing("persistentvolumeclaim", "demo-workspace"))
    await cluster.turn()
    assert kinds(cluster) == ["PersistentVolumeClaim"]
    cluster.created.clear()
    pod["status"] = {"phase": "Pending"}
    words = 'MountVolume.SetUp failed for volume "plan" : configmap "demo-prepare" not found'
    cluster.pod_events = [{"reason": "FailedMount", "message": words}]
    await cluster.turn()
    assert kinds(cluster) == ["ConfigMap"]
    cluster.created.clear()
    cluster.pod_events = []
    del cluster.policies["finetune-trainers"]
    cluster.policies["finetune-transfers"] = "of an older operator"
    await cluster.turn()
    assert kinds(cluster) == ["NetworkPolicy", "NetworkPolicy"]


async def test_what_somebody_else_should_bring_is_not_made(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.created.clear()
    cluster.pod(Stage.PREPARE, missing("persistentvolumeclaim", "the-teams-data"))
    await cluster.settle()
    assert not cluster.created
    assert cluster.condition("Running") == ("False", "Unschedulable")


async def test_a_job_that_has_lost_its_workspace_begins_again(cluster: FakeCluster) -> None:
    """What prepare has left was on it: training an empty volume would fail for no fault of the user's."""
    await cluster.pass_through(Stage.PREPARE)
    cluster.pod(Stage.TRAIN, missing("persistentvolumeclaim", "demo-workspace"))
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.PREPARE]
    assert kinds(cluster)[-3:] == ["PersistentVolumeClaim", "ConfigMap", "Job"]
    assert cluster.status.data is None
    assert cluster.status.phase is Phase.PENDING
    cluster.start(Stage.PREPARE)
    cluster.finish(Stage.PREPARE)
    await cluster.pass_through(Stage.TRAIN, Stage.PUBLISH)
    assert cluster.status.phase is Phase.SUCCEEDED


async def test_a_result_that_was_lost_with_its_pod_is_made_again(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    first = cluster.jobs[Stage.PREPARE]["metadata"]["uid"]
    cluster.finish(Stage.PREPARE)
    cluster.pods.clear()
    await cluster.settle()
    assert cluster.jobs[Stage.PREPARE]["metadata"]["uid"] != first
    assert cluster.status.phase is Phase.PENDING
