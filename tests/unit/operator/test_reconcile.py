"""One job's life, as its status tells it, through the port: its phases, its failures, what it waits for."""

import copy

import pytest
from finetune_api.constants import Phase, Reason, Stage
from finetune_api.status import GateResult
from finetune_operator.cluster import ForbiddenError
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


def test_the_key_reads_like_kubectl() -> None:
    assert str(KEY) == "team-a/demo"
