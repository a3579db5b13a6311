"""Training on several nodes, and training that stalls, as the status tells it."""

import copy
import re

import pytest
from finetune_api.constants import Phase, Reason, Stage
from finetune_api.progress import Outcome, Result
from finetune_api.status import GateResult

from tests.fake_cluster import SPEC, TRAINED, FakeCluster, failure


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC))


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
    assert [manifest["kind"] for manifest in cluster.created][-4:] == ["NetworkPolicy", "ConfigMap", "Service", "Job"]
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


async def test_the_name_by_which_nodes_meet_is_made_again_when_one_of_them_is(cluster: FakeCluster) -> None:
    """Nobody would tell that it is gone: the nodes would lose each other again and again."""
    await two_nodes_train(cluster)
    cluster.created.clear()
    cluster.crash(TRAIN, 1, final=False)
    await cluster.turn()
    assert [child["kind"] for child in cluster.created] == ["Service"]


async def test_a_preempted_node_and_its_victims_cost_nothing(cluster: FakeCluster) -> None:
    await two_nodes_train(cluster)
    cluster.crash(TRAIN, 143, final=False, node=1)
    cluster.pods[TRAIN][1]["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    cluster.crash(TRAIN, 75, said=VICTIM, final=False)
    await cluster.settle()
    assert cluster.status.attempt == 1
    assert (cluster.status.phase, cluster.status.message) == (Phase.QUEUED, "train is starting again")
    assert cluster.status.disruptions == 1
    assert len([event for event in cluster.events.values() if event.type == "Warning"]) == 1


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
