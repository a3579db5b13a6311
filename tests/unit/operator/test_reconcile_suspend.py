"""Suspended, resumed, queued, edited: what the user and other controllers may do to a job on its way."""

import copy

import pytest
from finetune_api.constants import Phase, Stage

from tests.fake_cluster import SPEC, FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC))


async def test_suspended_at_creation_children_exist_and_wait(cluster: FakeCluster) -> None:
    cluster.edit(suspend=True)
    await cluster.settle()
    assert cluster.status.phase is Phase.SUSPENDED
    assert cluster.condition("Suspended") == ("True", "SuspendedByUser")
    assert cluster.jobs[Stage.PREPARE]["spec"]["suspend"] is True
    cluster.edit(suspend=False)
    await cluster.settle()
    assert cluster.jobs[Stage.PREPARE]["spec"]["suspend"] is False
    assert cluster.condition("Suspended") == ("False", "Resumed")
    assert cluster.status.phase is Phase.PENDING
    assert "uspend" not in (cluster.status.message or "")


async def test_suspending_a_training_stops_it_and_resuming_goes_on(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    cluster.edit(suspend=True)
    await cluster.settle()
    assert cluster.jobs[Stage.TRAIN]["spec"]["suspend"] is True
    assert cluster.status.phase is Phase.SUSPENDED
    cluster.edit(suspend=False)
    await cluster.settle()
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    assert cluster.status.phase is Phase.TRAINING


async def test_edited_limits_reach_the_running_job(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    cluster.edit(limits={"retries": 0, "activeDeadlineSeconds": 60})
    await cluster.settle()
    spec = cluster.jobs[Stage.PREPARE]["spec"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (0, 60)
    cluster.edit(limits={})
    await cluster.settle()
    spec = cluster.jobs[Stage.PREPARE]["spec"]
    assert spec["backoffLimit"] == 3
    assert "activeDeadlineSeconds" not in spec


async def test_a_queued_training_is_suspended_by_deleting_its_job(cluster: FakeCluster) -> None:
    cluster.edit(scheduling={"queueName": "team-queue"})
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    cluster.edit(suspend=True)
    await cluster.settle()
    assert Stage.TRAIN not in cluster.jobs, "Kueue would take a suspend back"
    assert cluster.status.phase is Phase.SUSPENDED
    cluster.edit(suspend=False)
    await cluster.settle()
    assert Stage.TRAIN in cluster.jobs
    assert cluster.status.phase is Phase.QUEUED


async def test_a_job_that_another_controller_has_suspended_is_left_to_it(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.jobs[Stage.PREPARE]["spec"]["suspend"] = True
    await cluster.settle()
    assert cluster.jobs[Stage.PREPARE]["spec"]["suspend"] is True
    assert cluster.condition("Running") == ("False", "Queued")


async def test_a_resource_newer_than_this_operator_does_not_end_its_jobs(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    cluster.edit(fieldOfTheFuture=True)
    await cluster.settle()
    assert cluster.status.phase is Phase.TRAINING
    assert cluster.condition("Accepted") == ("False", "InvalidSpec")
    assert cluster.jobs[Stage.TRAIN]["spec"]["suspend"] is False


async def test_a_job_that_ends_while_it_is_being_suspended_is_not_suspended(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE, Stage.TRAIN)
    cluster.start(Stage.PUBLISH)
    await cluster.settle()
    cluster.edit(suspend=True)
    cluster.finish(Stage.PUBLISH)
    await cluster.settle()
    assert cluster.status.phase is Phase.SUCCEEDED
    assert (cluster.condition("Suspended") or ("False", ""))[0] == "False"


async def test_the_suspend_of_a_queued_job_is_kueues(cluster: FakeCluster) -> None:
    cluster.edit(scheduling={"queueName": "team-queue"})
    await cluster.pass_through(Stage.PREPARE)
    cluster.jobs[Stage.TRAIN]["spec"]["suspend"] = True  # Kueue's webhook
    await cluster.settle()
    assert cluster.jobs[Stage.TRAIN]["spec"]["suspend"] is True
    assert cluster.status.phase is Phase.QUEUED
    assert cluster.condition("Running") == ("False", "Queued")
    assert "team-queue" in (cluster.status.message or "")
