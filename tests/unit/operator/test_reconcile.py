"""One job's life, as its status tells it: every phase, every end, through the port."""

import copy

import pytest
from finetune_api.constants import Phase, Reason, Stage
from finetune_api.status import GateResult
from finetune_operator.cluster import ForbiddenError, NameClashError, RejectedError, UnavailableError
from finetune_operator.display import outcome
from finetune_operator.observed import Manifest

from tests.fake_cluster import KEY, SPEC, TRAINED, FakeCluster, failure, success


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC))


def kinds(cluster: FakeCluster) -> list[str]:
    return [manifest["kind"] for manifest in cluster.created]


async def test_a_job_goes_through_its_phases_to_the_end(cluster: FakeCluster) -> None:
    phases = []
    for stage in Stage:
        await cluster.settle()
        phases.append(cluster.status.phase)
        cluster.start(stage)
        await cluster.settle()
        phases.append(cluster.status.phase)
        cluster.finish(stage)
    await cluster.settle()
    assert phases == [
        Phase.PENDING, Phase.PREPARING, Phase.QUEUED, Phase.TRAINING, Phase.PUBLISHING, Phase.PUBLISHING,
    ]  # fmt: skip
    status = cluster.status
    assert status.phase is Phase.SUCCEEDED
    assert status.progress is not None and status.progress.percentage == 100 and status.progress.eta is None
    assert status.result is not None and status.result.artifact is not None
    assert status.metric == "macroF1=0.91"
    assert status.data is not None and status.data.train_rows == 700
    assert status.completion_time is not None
    assert cluster.condition("Complete") == ("True", "Succeeded")
    assert cluster.condition("Running") == ("False", "Succeeded")
    assert cluster.condition("DataReady") == ("True", "Prepared")
    assert cluster.condition("GatePassed") == ("True", "NoGate")
    assert cluster.condition("Failed") is None
    assert list(cluster.jobs) == list(Stage)


async def test_each_stage_begins_only_after_the_one_before(cluster: FakeCluster) -> None:
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.PREPARE]
    assert kinds(cluster)[-1] == "Job", "the Job comes last: it needs the others"
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.PREPARE]


async def test_the_phase_does_not_go_back_while_a_job_has_not_noticed_its_pods_end(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    cluster.finish_pod(Stage.PREPARE)
    pod = cluster.pods[Stage.PREPARE][-1]
    for seen in ("Running", "Succeeded"):  # the kubelet tells of the container first, and then of the pod
        pod["status"]["phase"] = seen
        await cluster.settle()
        assert cluster.status.phase is Phase.PREPARING
        assert cluster.condition("Running") == ("False", "BetweenStages")


@pytest.mark.parametrize(
    "not_yet",
    [{"active": 1}, {"conditions": [{"type": "FailureTarget", "status": "True"}]}],
    ids=["unseen", "given up"],
)
async def test_nor_while_the_job_may_still_give_up(cluster: FakeCluster, not_yet: Manifest) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    cluster.crash(Stage.PREPARE, 1, final=False)
    noticed = cluster.jobs[Stage.PREPARE]["status"]
    cluster.jobs[Stage.PREPARE]["status"] = not_yet
    await cluster.settle()
    assert cluster.status.phase is Phase.PREPARING
    assert cluster.condition("Running") == ("False", "BetweenStages")
    cluster.jobs[Stage.PREPARE]["status"] = noticed
    await cluster.settle()
    assert cluster.status.phase is Phase.PENDING
    assert cluster.status.message == "prepare is starting again (attempt 2)"


async def test_every_phase_is_an_event_once(cluster: FakeCluster) -> None:
    await cluster.pass_through(*Stage)
    reasons = [event.reason for event in cluster.events.values() if event.type == "Normal"]
    assert reasons == ["Pending", "Preparing", "Queued", "Training", "Publishing", "Succeeded"]


async def test_progress_of_a_training_is_shown(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    cluster.say(
        Stage.TRAIN, fraction=0.5, step=33, total_steps=66, epoch=1.5, estimated_remaining_seconds=250.0,
        training_loss=0.43219, learning_rate=1e-3, tokens_per_second=1234.5, device="NVIDIA H100", precision="bf16",
    )  # fmt: skip
    await cluster.settle()
    progress = cluster.status.progress
    assert progress is not None
    assert (progress.percentage, progress.step, progress.total_steps, progress.eta) == (52, 33, 66, "4m10s")
    assert cluster.status.metric == "loss=0.4322"
    assert cluster.status.metrics is not None and cluster.status.metrics.learning_rate == "0.001"
    assert cluster.status.resolved is not None and cluster.status.resolved.device == "NVIDIA H100"
    assert cluster.status.message == "Training: step 33 of 66"


async def test_what_the_device_decided_is_still_told_at_the_end(cluster: FakeCluster) -> None:
    await cluster.pass_through(*Stage)
    resolved = cluster.status.resolved
    assert resolved is not None and (resolved.device, resolved.precision) == (TRAINED.device, TRAINED.precision)


async def test_after_a_crash_the_progress_tells_the_truth(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    cluster.say(Stage.TRAIN, fraction=0.8, step=52, total_steps=66, estimated_remaining_seconds=60.0)
    await cluster.settle()
    assert cluster.status.progress is not None and cluster.status.progress.percentage == 78
    cluster.crash(Stage.TRAIN, 137, final=False)
    await cluster.settle()
    assert cluster.status.phase is Phase.QUEUED
    assert cluster.status.progress.eta is None, "nothing runs: nothing is estimated"
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    cluster.say(Stage.TRAIN, fraction=0.6, step=40, total_steps=66)
    await cluster.settle()
    assert cluster.status.attempt == 2
    assert (cluster.status.progress.step, cluster.status.progress.percentage) == (40, 61)
    warning = [event for event in cluster.events.values() if event.type == "Warning"]
    assert len(warning) == 1 and "attempt 1 of train failed" in warning[0].message and "SIGKILL" in warning[0].message


async def test_of_two_replicas_the_one_that_heard_less_takes_nothing_back(cluster: FakeCluster) -> None:
    """For a moment, when the Lease was moved, both may write."""
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    cluster.say(Stage.TRAIN, fraction=0.5, step=33, total_steps=66)
    earlier = cluster.progress
    await cluster.settle()
    cluster.now += 5
    cluster.say(Stage.TRAIN, fraction=0.6, step=40, total_steps=66)
    await cluster.settle()
    before = cluster.status
    cluster.progress = earlier
    await cluster.settle()
    assert cluster.status == before
    cluster.now += 5
    cluster.say(Stage.TRAIN, fraction=0.1, step=10, total_steps=66)  # of a new attempt
    await cluster.settle()
    assert cluster.status.progress is not None and cluster.status.progress.step == 10


async def test_a_phase_that_comes_again_is_an_event_again(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    cluster.pods[Stage.TRAIN].clear()  # a disruption: the Job makes a new pod, and counts no failure
    cluster.now += 60
    await cluster.settle()
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    assert [event.reason for event in cluster.events.values()].count("Training") == 2


async def test_a_user_error_fails_the_job_with_its_own_words(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    words = "dataset.sources[0]: train.jsonl line 7: label is missing"
    cluster.crash(Stage.PREPARE, 64, said=failure(Stage.PREPARE, Reason.DATA_INVALID, words), final=True)
    await cluster.settle()
    status = cluster.status
    assert status.phase is Phase.FAILED
    assert status.failure is not None
    assert (status.failure.reason, status.failure.message, status.failure.exit_code) == (Reason.DATA_INVALID, words, 64)
    assert cluster.condition("DataReady") == ("False", "DataInvalid")
    assert cluster.condition("Failed") == ("True", "DataInvalid")
    assert list(cluster.jobs) == [Stage.PREPARE], "no GPU was asked for"
    assert ("DataInvalid", "Failed") in cluster.events


async def test_a_failed_gate_keeps_the_scores_and_publishes_nothing(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    gate = GateResult(passed=False, message="macroF1 0.91 is below the minimum 0.95")
    train = TRAINED.model_copy(update={"gate": gate})
    cluster.crash(Stage.TRAIN, 64, said=failure(Stage.TRAIN, Reason.GATE_FAILED, gate.message, train=train), final=True)
    await cluster.settle()
    assert cluster.status.phase is Phase.FAILED
    assert cluster.condition("GatePassed") == ("False", "GateFailed")
    assert cluster.status.result is not None and cluster.status.result.scores is not None
    assert Stage.PUBLISH not in cluster.jobs


async def test_a_training_that_ended_early_says_at_which_step_and_why(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    cluster.say(Stage.TRAIN, fraction=0.5, step=30, total_steps=66)
    await cluster.settle()
    why = "stopped early after step 30 of 66: in 2 evaluations macroF1 was not better than the 0.91 of step 10"
    train = TRAINED.model_copy(update={"steps": 30, "stopped_early": why})
    cluster.finish(Stage.TRAIN, success(Stage.TRAIN).model_copy(update={"train": train}))
    await cluster.settle()
    assert (cluster.status.progress.step, cluster.status.progress.total_steps) == (30, 30)
    assert cluster.status.result.stopped_early == why
    assert outcome(cluster.status, Stage.TRAIN).startswith(f"macroF1 0.91; {why}; memory")


async def test_out_of_memory_names_the_limit_and_the_field(cluster: FakeCluster) -> None:
    cluster.edit(resources={"gpus": 1, "limits": {"memory": "2Gi"}})
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(Stage.TRAIN)
    await cluster.settle()
    cluster.crash(Stage.TRAIN, 137, reason="OOMKilled", final=True)
    await cluster.settle()
    failed = cluster.status.failure
    assert failed is not None and failed.reason is Reason.OOM_KILLED
    assert "2Gi" in failed.message and "resources.limits.memory" in failed.message


async def test_a_pod_that_cannot_start_says_why_and_the_job_waits(cluster: FakeCluster) -> None:
    await cluster.settle()
    words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    pod = cluster.pod(Stage.PREPARE, {"phase": "Pending", "conditions": [unschedulable]})
    await cluster.settle()
    assert cluster.status.phase is Phase.PENDING
    assert cluster.condition("Running") == ("False", "Unschedulable")
    assert words in (cluster.status.message or "")
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"image": "x:1", "state": {"waiting": waiting}}]}
    await cluster.settle()
    assert cluster.condition("Running") == ("False", "ImageNotPulled")
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}
    cluster.pod_events.append({"reason": "FailedMount", "message": 'configmap "news" not found'})
    assert await cluster.turn() is not None, "looks again: no watch tells of pod events"
    assert cluster.condition("Running") == ("False", "ContainerConfigError")
    assert 'configmap "news" not found' in (cluster.status.message or "")
    assert {reason for reason, _ in cluster.events} >= {"Unschedulable", "ImageNotPulled", "ContainerConfigError"}


async def test_a_pod_that_the_cluster_refuses_is_told_and_the_job_waits(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.pod_events.append({"reason": "FailedCreate", "message": "exceeded quota: team, requested: pods=1"})
    assert await cluster.turn() is not None
    assert cluster.condition("Running") == ("False", "PodRefused")
    assert "exceeded quota" in (cluster.status.message or "")
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    assert cluster.status.phase is Phase.PREPARING


async def test_a_child_that_may_not_be_made_yet_is_told_and_tried_again(cluster: FakeCluster) -> None:
    cluster.create_error = ForbiddenError("cannot create Job demo-prepare: exceeded quota")
    for _ in range(2):
        with pytest.raises(ForbiddenError):
            await cluster.turn()
    assert cluster.status.phase is Phase.PENDING
    assert cluster.condition("Running") == ("False", "Forbidden")
    assert cluster.status_writes == 1
    cluster.create_error = None
    await cluster.settle()
    assert cluster.condition("Running") == ("False", "PodStarting")


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


def test_the_key_reads_like_kubectl() -> None:
    assert str(KEY) == "team-a/demo"
