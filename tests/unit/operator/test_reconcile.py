"""One job's life, as its status tells it: every phase, every end, through the port."""

import copy
import re

import pytest
from finetune_api.constants import Phase, Reason, Stage
from finetune_api.progress import Outcome, Result
from finetune_api.status import GateResult
from finetune_operator.cluster import ForbiddenError, NameClashError, RejectedError, UnavailableError
from finetune_operator.display import outcome
from finetune_operator.observed import Manifest, index_of, nodes_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (3, None)


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


async def test_a_hand_written_end_stops_what_runs(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    assert cluster.body is not None
    cluster.body["status"]["phase"] = "Failed"
    await cluster.settle()
    assert cluster.jobs[Stage.PREPARE]["spec"]["suspend"] is True


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


@pytest.mark.parametrize("end", ["success", "failure"])
async def test_a_finished_job_stays_finished(cluster: FakeCluster, end: str) -> None:
    if end == "success":
        await cluster.pass_through(*Stage)
    else:
        await cluster.settle()
        cluster.start(Stage.PREPARE)
        cluster.crash(Stage.PREPARE, 1, final=True)
        await cluster.settle()
    phase, created = cluster.status.phase, len(cluster.created)
    cluster.jobs.clear()
    cluster.pods.clear()
    await cluster.settle()
    cluster.edit(suspend=True)
    await cluster.settle()
    assert cluster.status.phase is phase
    assert len(cluster.created) == created
    assert cluster.condition("Suspended") is None


async def test_a_stage_that_is_done_never_runs_again(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    del cluster.jobs[Stage.PREPARE]
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.TRAIN]


async def test_a_deleted_child_is_made_again(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.jobs[Stage.TRAIN]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await cluster.settle()
    del cluster.jobs[Stage.TRAIN]
    await cluster.settle()
    assert Stage.TRAIN in cluster.jobs


async def test_a_result_that_was_lost_with_its_pod_is_made_again(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    cluster.finish(Stage.PREPARE)
    cluster.pods.clear()
    await cluster.turn()
    first = cluster.jobs[Stage.PREPARE]["metadata"]["uid"]
    await cluster.turn(seconds=60)
    await cluster.settle()
    assert cluster.jobs[Stage.PREPARE]["metadata"]["uid"] != first
    assert cluster.status.phase is Phase.PENDING


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


# several nodes

TRAIN = Stage.TRAIN
VICTIM = Result(stage=TRAIN, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message="a peer was lost", step=40)
LATER_NODE = Result(stage=TRAIN, outcome=Outcome.SUCCEEDED)


async def two_nodes_train(cluster: FakeCluster) -> None:
    cluster.edit(resources={"gpus": 4, "nodes": 2}, workspace={"claimName": "team"}, limits={"retries": 1})
    await cluster.pass_through(Stage.PREPARE)
    for node in (0, 1):
        cluster.start(TRAIN, node)
    cluster.say(TRAIN, fraction=0.5, step=40, total_steps=80, device="NVIDIA H100")
    await cluster.settle()


async def test_several_nodes_train_and_the_first_one_tells_the_result(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    assert kinds(cluster)[-4:] == ["NetworkPolicy", "ConfigMap", "Service", "Job"]
    assert cluster.condition("Running") == ("True", "PodRunning")
    assert cluster.status.message == "Training: step 40 of 80"
    assert cluster.status.resolved is not None and cluster.status.resolved.device == "2 nodes x 4 x NVIDIA H100"
    cluster.finish_pod(TRAIN, LATER_NODE, node=1)
    await cluster.settle()
    assert cluster.status.phase is Phase.TRAINING, "the first node has not ended"
    cluster.finish_pod(TRAIN)
    await cluster.settle()
    assert cluster.status.phase is Phase.TRAINING, "the Job is not complete"
    assert Stage.PUBLISH not in cluster.jobs
    cluster.jobs[TRAIN]["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
    await cluster.settle()
    assert cluster.status.result is not None and cluster.status.result.scores == TRAINED.scores
    assert Stage.PUBLISH in cluster.jobs
    await cluster.pass_through(Stage.PUBLISH)
    assert cluster.status.phase is Phase.SUCCEEDED


async def test_a_node_that_has_no_room_is_told_though_the_other_one_runs(cluster: FakeCluster) -> None:
    cluster.edit(resources={"gpus": 4, "nodes": 2}, workspace={"claimName": "team"})
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(TRAIN)
    assert await cluster.turn() is not None
    assert cluster.status.phase is Phase.QUEUED
    assert cluster.status.message == "train is starting: 1 of 2 pods run"
    words = "exceeded quota: team, requested: nvidia.com/gpu=4"
    cluster.pod_events = [{"reason": "FailedCreate", "message": words}]
    await cluster.settle()
    assert cluster.condition("Running") == ("False", "PodRefused")
    cluster.pod_events = []
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    pod = cluster.pod(TRAIN, {"phase": "Pending", "conditions": [condition]}, node=1)
    await cluster.settle()
    assert cluster.condition("Running") == ("False", "Unschedulable")
    cluster.pods[TRAIN].remove(pod)
    cluster.start(TRAIN, node=1)
    await cluster.settle()
    assert cluster.condition("Running") == ("True", "PodRunning")


async def test_a_users_error_on_one_node_is_told_and_not_the_end_of_its_peers(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    cluster.crash(TRAIN, 75, said=VICTIM, final=False)
    await cluster.settle()
    said = failure(TRAIN, Reason.NON_FINITE_LOSS, "the loss of step 41 is nan")
    cluster.crash(TRAIN, 64, said=said, final=True, node=1)
    await cluster.settle()
    failed = cluster.status.failure
    assert failed is not None
    assert (failed.reason, failed.message, failed.exit_code) == (Reason.NON_FINITE_LOSS, said.message, 64)


async def test_a_gate_that_was_not_passed_keeps_the_first_nodes_scores(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    gate = GateResult(passed=False, message="macroF1 0.91 is below the minimum 0.95")
    train = TRAINED.model_copy(update={"gate": gate})
    cluster.finish_pod(TRAIN, LATER_NODE, node=1)
    cluster.crash(TRAIN, 64, said=failure(TRAIN, Reason.GATE_FAILED, gate.message, train=train), final=True)
    await cluster.settle()
    assert cluster.condition("GatePassed") == ("False", "GateFailed")
    assert cluster.status.result is not None and cluster.status.result.scores == TRAINED.scores


async def test_a_node_that_is_lost_comes_back_and_only_its_own_failure_counts(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    cluster.crash(TRAIN, 137, final=False, node=1)
    await cluster.settle()
    assert cluster.status.attempt == 2
    cluster.crash(TRAIN, 75, said=VICTIM, final=False)
    await cluster.settle()
    assert cluster.status.phase is Phase.QUEUED
    assert cluster.status.message == "train is starting again (attempt 2)"
    cluster.start(TRAIN, node=1)
    cluster.start(TRAIN)
    cluster.say(TRAIN, fraction=0.5, step=40, total_steps=80)
    await cluster.settle()
    assert (cluster.status.phase, cluster.status.attempt) == (Phase.TRAINING, 2)
    (warning,) = [event for event in cluster.events.values() if event.type == "Warning"]
    assert "attempt 1 of train failed" in warning.message and "SIGKILL" in warning.message


async def test_nodes_that_crash_together_are_one_failed_attempt(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    for node in (0, 1):
        cluster.crash(TRAIN, 1, final=False, node=node)
    await cluster.settle()
    assert cluster.status.attempt == 2
    assert len([event for event in cluster.events.values() if event.type == "Warning"]) == 1


async def test_the_last_attempt_is_the_last_one_also_before_the_job_says_so(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    for final in (False, True):
        for node in (0, 1):
            cluster.crash(TRAIN, 1, final=False, node=node)
        await cluster.settle()
        assert cluster.status.attempt == 2
        if not final:
            cluster.start(TRAIN)
            cluster.start(TRAIN, node=1)
            await cluster.settle()
    cluster.jobs[TRAIN]["status"]["conditions"] = [{"type": "Failed", "status": "True"}]
    await cluster.settle()
    assert cluster.status.failure is not None and cluster.status.failure.message.endswith("(after 2 attempts)")
    assert len([event for event in cluster.events.values() if "of train failed" in event.message]) == 1


async def test_a_preempted_node_and_its_victims_cost_nothing(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    cluster.crash(TRAIN, 143, final=False, node=1)
    cluster.pods[TRAIN][1]["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    cluster.crash(TRAIN, 75, said=VICTIM, final=False)
    await cluster.settle()
    assert cluster.status.attempt == 1
    assert (cluster.status.phase, cluster.status.message) == (Phase.QUEUED, "train is starting")
    assert not [event for event in cluster.events.values() if event.type == "Warning"]


async def test_the_limits_of_several_nodes_change_as_far_as_the_api_server_lets_them(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    cluster.jobs[TRAIN]["spec"]["backoffLimit"] = 2**31 - 1  # the API server's default beside a limit per index
    cluster.edit(limits={"retries": 9, "activeDeadlineSeconds": 60})
    await cluster.settle()
    spec = cluster.jobs[TRAIN]["spec"]
    assert (spec["backoffLimitPerIndex"], spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (1, 2**31 - 1, 60)


async def test_several_nodes_are_suspended_and_go_on(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    cluster.edit(suspend=True)
    await cluster.settle()
    assert (cluster.status.phase, cluster.pods[TRAIN]) == (Phase.SUSPENDED, [])
    cluster.edit(suspend=False)
    await cluster.settle()
    assert cluster.status.message == "train is starting"
    for node in (1, 0):
        cluster.start(TRAIN, node)
    await cluster.settle()
    assert cluster.status.phase is Phase.TRAINING


# stalls


def stalls(cluster: FakeCluster) -> list[str]:
    return [event.message for event in cluster.events.values() if event.reason == "TrainingStalled"]


async def test_training_that_does_not_get_on_is_told_once_and_takes_it_back_by_itself(cluster: FakeCluster) -> None:
    cluster.edit(limits={"stallSeconds": 120})
    await cluster.pass_through(Stage.PREPARE)
    pod = cluster.start(TRAIN)
    cluster.say(TRAIN, fraction=0.5, step=40, total_steps=80)
    await cluster.settle()
    left = await cluster.turn()
    assert left is not None and 60 < left < 120, "looks again when it would be a stall"
    await cluster.turn(left)
    assert cluster.condition("Running") == ("True", "TrainingStalled")
    assert cluster.status.phase is Phase.TRAINING
    (message,) = stalls(cluster)
    assert message == cluster.status.message
    assert re.search(r"^no sign of progress since 20\S+Z \(Training: step 40 of 80\): look at the log of pod", message)
    assert message.endswith(pod["metadata"]["name"])
    writes = cluster.status_writes
    for _ in range(3):
        await cluster.turn(600)
    assert cluster.status_writes == writes, "nothing new, nothing written"
    cluster.say(TRAIN, fraction=0.5, step=41, total_steps=80)
    await cluster.settle()
    assert cluster.condition("Running") == ("True", "PodRunning")
    assert cluster.status.message == "Training: step 41 of 80"
    await cluster.turn(121)
    assert len(stalls(cluster)) == 2, "another one"


async def test_an_evaluation_that_goes_on_is_no_stall(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(TRAIN)
    for _ in range(5):
        cluster.say(TRAIN, fraction=0.5, step=40, total_steps=80)
        await cluster.turn(1000)
    assert cluster.condition("Running") == ("True", "PodRunning")
    await cluster.turn(1000)
    assert cluster.condition("Running") == ("True", "TrainingStalled")


async def test_a_stall_is_known_after_a_restart_of_the_operator_though_the_pod_does_not_answer(
    cluster: FakeCluster,
) -> None:
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(TRAIN)
    cluster.say(TRAIN, fraction=0.5, step=40, total_steps=80)
    await cluster.settle()
    cluster.progress = None  # what the operator had heard is gone with it
    await cluster.turn(900)
    assert cluster.condition("Running") == ("True", "PodRunning")
    await cluster.turn(900)
    assert cluster.condition("Running") == ("True", "TrainingStalled")


async def test_a_pod_that_has_only_begun_is_not_stalled_and_one_that_never_speaks_is(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await cluster.turn(100_000)  # it has waited in a queue
    cluster.start(TRAIN)
    await cluster.turn()
    assert cluster.condition("Running") == ("True", "PodRunning")
    await cluster.turn(1800)
    assert cluster.condition("Running") == ("True", "TrainingStalled")


async def test_only_training_stalls(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    cluster.say(Stage.PREPARE, fraction=0.5)
    await cluster.settle()
    assert await cluster.turn(100_000) is None
    assert cluster.condition("Running") == ("True", "PodRunning")


class Life(RuleBasedStateMachine):
    """Any order of the world's moves, with or without a reconcile in between: the promises hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster(copy.deepcopy(SPEC))
        self.highest: tuple[str, int | None, int] = ("", None, 0)
        self.final: str | None = None

    def _current(self) -> Stage | None:
        active = [stage for stage, job in self.cluster.jobs.items() if not job["status"].get("conditions")]
        return active[0] if active else None

    def _running(self) -> list[int]:
        """The nodes of the current stage that have a running pod."""
        pods = self.cluster.pods.get(self._current(), [])
        return [index_of(pod) for pod in pods if pod["status"]["phase"] == "Running"]

    def _nodes(self) -> int:
        stage = self._current()
        return nodes_of(self.cluster.jobs[stage]) if stage else 0

    @initialize(nodes=st.sampled_from([1, 2, 3]))
    def user_submits(self, nodes: int) -> None:
        self.cluster.edit(resources={"gpus": 1, "nodes": nodes}, workspace={"claimName": "team"})

    @rule(seconds=st.sampled_from([1, 3000]))
    def reconcile(self, seconds: float) -> None:
        present = {index_of(pod) for pod in self.cluster.pods.get(self._current(), [])}
        is_whole = self._running() and len(present) == self._nodes()
        _run(self.cluster.turn(seconds))
        if self._current() and (self.cluster.condition("Running") or ("False", ""))[0] == "True":
            assert is_whole, "no node is missing"

    @rule()
    @precondition(lambda self: len(self._running()) < self._nodes())
    def pod_starts(self) -> None:
        stage = self._current()
        assert stage is not None
        if not self.cluster.jobs[stage]["spec"].get("suspend"):
            self.cluster.start(stage, min(set(range(self._nodes())) - set(self._running())))

    @rule(fraction=st.floats(0, 1))
    @precondition(lambda self: self._running())
    def pod_speaks(self, fraction: float) -> None:
        stage = self._current()
        assert stage is not None
        self.cluster.say(stage, fraction=fraction, step=int(fraction * 66), total_steps=66)

    @rule()
    @precondition(lambda self: self._running() and len(self._running()) == self._nodes())
    def pods_succeed(self) -> None:
        stage = self._current()
        assert stage is not None
        for node in range(1, self._nodes()):
            self.cluster.finish_pod(stage, Result(stage=stage, outcome=Outcome.SUCCEEDED), node)
        self.cluster.finish(stage, success(stage))

    @rule(code=st.sampled_from([1, 64, 75, 137]), final=st.booleans())
    @precondition(lambda self: self._running())
    def pod_fails(self, code: int, final: bool) -> None:
        stage = self._current()
        assert stage is not None
        said = Result(stage=stage, outcome=Outcome.FAILED, reason=Reason.STAGE_FAILED, message="broken")
        self.cluster.crash(stage, code, said=said, final=final, node=self._running()[-1])

    @rule(suspend=st.booleans())
    def user_suspends(self, suspend: bool) -> None:
        self.cluster.edit(suspend=suspend)

    @rule(stage=st.sampled_from(list(Stage)))
    def somebody_deletes_a_job(self, stage: Stage) -> None:
        self.cluster.jobs.pop(stage, None)
        self.cluster.pods.pop(stage, None)

    @rule(stage=st.sampled_from(list(Stage)))
    def pods_are_cleaned_up(self, stage: Stage) -> None:
        self.cluster.pods[stage] = [p for p in self.cluster.pods.get(stage, []) if p["status"]["phase"] == "Running"]

    @invariant()
    def one_stage_at_a_time(self) -> None:
        active = [stage for stage, job in self.cluster.jobs.items() if not job["status"].get("conditions")]
        assert len(active) <= 1

    @invariant()
    def a_terminal_phase_is_final(self) -> None:
        phase = self.cluster.status.phase
        if self.final is not None:
            assert phase == self.final
        elif phase is not None and phase.finished:
            self.final = phase

    @invariant()
    def the_phase_fits_the_conditions(self) -> None:
        phase = self.cluster.status.phase
        if phase is Phase.SUCCEEDED:
            assert self.cluster.condition("Complete") == ("True", "Succeeded")
            assert self.cluster.status.progress is not None and self.cluster.status.progress.percentage == 100
        elif phase is Phase.FAILED:
            failed = self.cluster.condition("Failed")
            assert failed is not None and failed[0] == "True" and self.cluster.status.failure is not None
        elif self.cluster.status.progress is not None:
            assert self.cluster.status.progress.percentage < 100


def _run(coroutine: object) -> None:
    """The fake never waits, so its coroutines end at the first step."""
    with pytest.raises(StopIteration):
        coroutine.send(None)  # type: ignore[attr-defined]


def live(lives: int, moves: int) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=lives, stateful_step_count=moves, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_promises_hold_in_any_order_of_events() -> None:
    live(60, 40)


@pytest.mark.long
def test_promises_hold_in_very_many_lives() -> None:
    live(2000, 60)


def test_the_key_reads_like_kubectl() -> None:
    assert str(KEY) == "team-a/demo"
