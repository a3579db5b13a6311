"""What ends a job, and that it stays ended."""

import copy

import pytest
from finetune_api.constants import Phase, Stage
from finetune_operator.cluster import NameClashError, RejectedError, UnavailableError

from tests.fake_cluster import SPEC, FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC))


async def finish(cluster: FakeCluster, end: str) -> None:
    if end == "success":
        await cluster.pass_through(*Stage)
    else:
        await cluster.settle()
        cluster.start(Stage.PREPARE)
        cluster.crash(Stage.PREPARE, 1, final=True)
        await cluster.settle()


@pytest.mark.parametrize("end", ["success", "failure"])
async def test_a_finished_job_stays_finished(cluster: FakeCluster, end: str) -> None:
    await finish(cluster, end)
    phase, created = cluster.status.phase, len(cluster.created)
    cluster.jobs.clear()
    cluster.pods.clear()
    await cluster.settle()
    for changes in ({"suspend": True}, {"fieldOfTheFuture": True}):
        cluster.edit(**changes)
        await cluster.settle()
        assert cluster.body is not None
        assert cluster.status.observed_generation == cluster.body["metadata"]["generation"], "tools wait for that"
    assert cluster.status.phase is phase
    assert len(cluster.created) == created
    assert cluster.condition("Suspended") is None


async def test_a_stage_that_is_done_never_runs_again(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    del cluster.jobs[Stage.PREPARE]
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.TRAIN]


async def test_a_name_clash_and_a_rejected_child_fail_this_job_only_and_for_good(cluster: FakeCluster) -> None:
    cluster.create_error = NameClashError("Job demo-prepare exists and is not this FineTuneJob's")
    await cluster.settle()
    assert cluster.status.phase is Phase.FAILED
    assert cluster.condition("Failed") == ("True", "NameClash")
    other = FakeCluster(copy.deepcopy(SPEC))
    other.create_error = RejectedError("resources.limits: must be larger than requests")
    await other.settle()
    assert other.condition("Accepted") == ("False", "InvalidSpec")


async def test_an_unavailable_cluster_is_the_callers_to_retry(cluster: FakeCluster) -> None:
    cluster.create_error = UnavailableError("exceeded quota")
    with pytest.raises(UnavailableError):
        await cluster.turn()
    cluster.create_error = None
    await cluster.settle()
    assert cluster.status.phase is Phase.PENDING


async def test_a_spec_that_is_not_ours_is_refused_with_the_field(cluster: FakeCluster) -> None:
    cluster.edit(model={"uri": 7})
    await cluster.settle()
    assert cluster.condition("Accepted") == ("False", "InvalidSpec")
    assert "spec.model.uri" in (cluster.status.message or "")


async def test_a_deleted_resource_is_left_alone(cluster: FakeCluster) -> None:
    assert cluster.body is not None
    cluster.body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await cluster.settle()
    assert not cluster.created and not cluster.status_writes
    cluster.body = None
    assert await cluster.turn() is None


async def test_the_resource_goes_when_its_time_to_live_is_over(cluster: FakeCluster) -> None:
    cluster.edit(limits={"ttlSecondsAfterFinished": 100})
    await cluster.pass_through(*Stage)
    left = await cluster.turn()
    assert left is not None and 0 < left <= 100
    await cluster.turn(seconds=left)
    assert cluster.body is None


async def test_a_deadline_is_named(cluster: FakeCluster) -> None:
    cluster.edit(limits={"activeDeadlineSeconds": 30})
    await cluster.settle()
    late = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}
    cluster.jobs[Stage.PREPARE]["status"] = {"conditions": [late]}
    await cluster.settle()
    assert cluster.condition("Failed") == ("True", "DeadlineExceeded")
    assert "30 s" in (cluster.status.message or "")
