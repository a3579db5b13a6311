"""What interrupts a job from outside: drains, preemption, queues, lost pods, the user's suspend. What its status tells of it."""

import copy

import pytest
from finetune_api.constants import CONTROLLER, Phase, Reason, Stage
from finetune_api.progress import Outcome, Result
from finetune_operator.cluster import ForbiddenError
from finetune_operator.decision import Context
from finetune_operator.layout import PodLayout
from finetune_operator.observed import Manifest
from finetune_operator.settings import Settings

from tests.fake_cluster import CONTEXT, SPEC, FakeCluster

TRAIN = Stage.TRAIN
SAVED = Result(stage=TRAIN, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message="saved", step=52)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC))


async def train_to(cluster: FakeCluster, step: int, **fields: int) -> None:
    """A train pod starts and gets to that step."""
    cluster.start(TRAIN)
    await cluster.settle()
    cluster.say(TRAIN, fraction=step / 100, step=step, total_steps=100, **fields)
    await cluster.settle()


def warnings(cluster: FakeCluster) -> list[tuple[str, str]]:
    return [(event.reason, event.message) for event in cluster.events.values() if event.type == "Warning"]


async def test_a_drained_pod_saves_and_its_training_goes_on(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    cluster.disrupt(TRAIN, "EvictionByEvictionAPI", "Eviction API: evicting")
    cluster.say(TRAIN, fraction=0.52, step=52, total_steps=100)
    await cluster.settle()
    status = cluster.status
    assert status.phase is Phase.TRAINING, "it still runs"
    assert (
        status.message
        == "train saves and ends: the pod was evicted, as when its node is drained: Eviction API: evicting"
    )
    assert status.progress.step == 52, "what it says until its end is heard"
    cluster.pods[TRAIN].clear()
    cluster.progress = None
    await cluster.settle()
    assert (cluster.status.phase, cluster.status.message) == (Phase.QUEUED, "train is starting again")
    await train_to(cluster, 41, resumed_from_step=40)
    status = cluster.status
    assert (status.phase, status.attempt, status.disruptions) == (Phase.TRAINING, 1, 1)
    last = status.last_interruption
    assert (last.stage, last.reason) == (TRAIN, Reason.EVICTED)
    assert (last.resumed_from_step, last.lost_steps) == (40, 12)
    (warning,) = warnings(cluster)
    assert warning[0] == "Evicted" and warning[1].startswith("train was interrupted: the pod was evicted")


async def test_a_pod_that_does_not_end_names_its_node(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    pod = cluster.disrupt(TRAIN, "DeletionByTaintManager", "deleting due to NoExecute taint")
    pod["spec"] = {**pod["spec"], "nodeName": "spot-7"}
    left = await cluster.turn()
    assert left is not None and left > 120, "after its grace period"
    await cluster.turn(left)
    assert cluster.condition("Running") == ("True", "Disrupted")
    assert "is node spot-7 gone for good" in cluster.status.message


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("PreemptionByScheduler", Reason.PREEMPTED),
        ("TerminationByKubelet", Reason.EVICTED),
        ("DeletionByTaintManager", Reason.DISRUPTED),
        ("DeletionByPodGC", Reason.DISRUPTED),
        ("ReasonOfTheFuture", Reason.DISRUPTED),
    ],
)
async def test_every_disruption_has_its_cause(cluster: FakeCluster, reason: str, told: Reason) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    cluster.disrupt(TRAIN, reason, "words of the cluster")
    cluster.crash(TRAIN, 75, said=SAVED, final=False)
    await cluster.settle()
    last = cluster.status.last_interruption
    assert last.reason is told and last.message.endswith(": words of the cluster")


async def test_a_crash_is_an_attempt_with_its_cause_and_no_disruption(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    cluster.crash(TRAIN, 137, reason="OOMKilled", final=False)
    await cluster.settle()
    await train_to(cluster, 1)
    status = cluster.status
    assert (status.attempt, status.disruptions) == (2, None)
    last = status.last_interruption
    assert (last.reason, last.resumed_from_step, last.lost_steps) == (Reason.OOM_KILLED, 0, 50)


async def test_a_pod_that_was_replaced_while_the_operator_was_away_is_counted_once(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    lost = cluster.status.pod_name
    cluster.pods[TRAIN].clear()
    await train_to(cluster, 40, resumed_from_step=30)
    status = cluster.status
    assert (status.attempt, status.disruptions, status.last_interruption.lost_steps) == (1, 1, 20)
    assert (status.last_interruption.pod_name, status.pod_name) == (lost, cluster.pods[TRAIN][0]["metadata"]["name"])


async def test_only_work_can_be_interrupted(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    for _ in range(2):  # pods that are taken away before they have worked
        cluster.pod(TRAIN, {"phase": "Pending"})
        cluster.disrupt(TRAIN, "PreemptionByScheduler")
        await cluster.settle()
        cluster.pods[TRAIN].clear()
    assert cluster.status.disruptions is None
    for times in (1, 2):
        await train_to(cluster, 50)
        cluster.disrupt(TRAIN, "PreemptionByScheduler")
        await cluster.settle()
        cluster.pods[TRAIN].clear()
        cluster.pod(TRAIN, {"phase": "Pending"})
        cluster.disrupt(TRAIN, "PreemptionByScheduler")
        await cluster.settle()
        assert cluster.status.disruptions == times
        cluster.pods[TRAIN].clear()


async def test_prepare_that_is_interrupted_has_no_steps_to_lose(cluster: FakeCluster) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    cluster.disrupt(Stage.PREPARE, "DeletionByPodGC")
    await cluster.settle()
    await cluster.pass_through(*Stage)
    status = cluster.status
    assert (status.phase, status.disruptions, status.last_interruption.stage) == (Phase.SUCCEEDED, 1, Stage.PREPARE)
    assert status.last_interruption.lost_steps is None


async def test_a_job_that_somebody_deletes_while_it_works_is_a_disruption(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    cluster.jobs[TRAIN]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await cluster.settle()
    assert cluster.status.message == "train saves and ends: its Job was deleted"
    cluster.pods[TRAIN].clear()
    await cluster.settle()
    assert cluster.status.phase is Phase.QUEUED
    del cluster.jobs[TRAIN]
    await cluster.settle()
    await train_to(cluster, 51, resumed_from_step=50)
    status = cluster.status
    assert (status.attempt, status.disruptions, status.last_interruption.lost_steps) == (1, 1, 0)


async def test_a_node_that_is_drained_ends_its_peers_and_is_one_disruption(cluster: FakeCluster) -> None:
    cluster.edit(resources={"gpus": 4, "nodes": 2}, workspace={"claimName": "team"})
    await cluster.pass_through(Stage.PREPARE)
    cluster.start(TRAIN, 1)
    await train_to(cluster, 50)
    leaving = cluster.disrupt(TRAIN, "EvictionByEvictionAPI", node=1)
    await cluster.settle()
    cluster.crash(TRAIN, 75, said=SAVED, final=False)
    await cluster.settle()
    cluster.start(TRAIN, 0)  # the peer is back before the drained one has saved
    await cluster.settle()
    assert cluster.status.phase is not Phase.SUSPENDED
    cluster.pods[TRAIN].remove(leaving)
    await cluster.settle()
    cluster.start(TRAIN, 1)
    cluster.say(TRAIN, fraction=0.5, step=51, total_steps=100, resumed_from_step=50)
    await cluster.settle()
    assert (cluster.status.phase, cluster.status.attempt, cluster.status.disruptions) == (Phase.TRAINING, 1, 1)
    assert cluster.status.last_interruption.reason is Reason.EVICTED
    assert len(warnings(cluster)) == 1


# suspended by the user


def says_suspended(cluster: FakeCluster) -> list[str]:
    """The places of the status that still say so."""
    status = cluster.status.to_dict()
    places = [f"{field}: {status[field]}" for field in ("phase", "message") if "uspend" in status[field]]
    for condition in status["conditions"]:
        if condition["type"] == "Suspended":
            places += ["Suspended"] if condition["status"] != "False" else []
        elif "uspend" in condition["message"] + condition["reason"]:
            places.append(condition["type"])
    return places


async def test_a_suspend_is_no_interruption(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    cluster.edit(suspend=True)
    await cluster.settle()
    cluster.edit(suspend=False)
    await cluster.settle()
    await train_to(cluster, 51, resumed_from_step=50)
    assert not says_suspended(cluster)
    assert (cluster.status.disruptions, cluster.status.last_interruption, warnings(cluster)) == (None, None, [])


async def test_a_pod_that_saves_is_running_though_the_job_is_suspended(cluster: FakeCluster) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    pod = copy.deepcopy(cluster.pods[TRAIN][0])
    cluster.edit(suspend=True)
    await cluster.turn()
    cluster.pods[TRAIN] = [pod]
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await cluster.settle()
    assert cluster.status.phase is Phase.SUSPENDED
    assert cluster.condition("Running") == ("True", "PodRunning")
    cluster.pods[TRAIN].clear()
    await cluster.settle()
    assert cluster.condition("Running") == ("False", "SuspendedByUser")


async def test_what_a_pod_said_before_it_was_suspended_is_not_taken_for_its_newest_word(cluster: FakeCluster) -> None:
    """Another replica, which led for a moment, had asked it later."""
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    older = cluster.progress
    cluster.say(TRAIN, fraction=0.52, step=52, total_steps=100)
    await cluster.settle()
    cluster.progress = older
    pod = copy.deepcopy(cluster.pods[TRAIN][0])
    cluster.edit(suspend=True)
    for _ in range(3):
        await cluster.turn()
        cluster.pods[TRAIN] = [pod]
        assert (cluster.status.phase, cluster.status.progress.step) == (Phase.SUSPENDED, 52)


@pytest.mark.parametrize("moment", ["running", "saving", "ended", "result awaited", "deleted", "refused"])
async def test_after_a_resume_nothing_says_suspended(cluster: FakeCluster, moment: str) -> None:
    await cluster.pass_through(Stage.PREPARE)
    await train_to(cluster, 50)
    pod = copy.deepcopy(cluster.pods[TRAIN][0])
    cluster.edit(suspend=True)
    await cluster.settle()
    if moment in ("saving", "ended", "result awaited"):
        cluster.pods[TRAIN] = [pod]
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    if moment == "ended":
        cluster.finish_pod(TRAIN)
    if moment == "result awaited":
        cluster.finish(TRAIN)
        cluster.pods[TRAIN].clear()
    if moment == "deleted":
        cluster.jobs[TRAIN]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    if moment == "refused":
        del cluster.jobs[TRAIN]
        cluster.create_error = ForbiddenError("cannot create Job demo-train: exceeded quota")
    cluster.edit(suspend=False)
    if moment == "refused":
        with pytest.raises(ForbiddenError):
            await cluster.turn()
    else:
        await cluster.turn()
    assert not says_suspended(cluster)


async def test_a_suspended_job_goes_on_though_its_status_was_lost(cluster: FakeCluster) -> None:
    cluster.edit(suspend=True)
    await cluster.settle()
    assert cluster.body is not None
    cluster.body["status"] = {}
    cluster.edit(suspend=False)
    await cluster.settle()
    assert cluster.jobs[Stage.PREPARE]["spec"]["suspend"] is False


# queued by Kueue

PENDING = "couldn't assign flavors to pod set main: insufficient unused quota for nvidia.com/gpu in flavor a100, 1 more needed"
PREEMPTING = "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the ClusterQueue"


def workload(**messages: str) -> Manifest:
    """A Workload with these conditions; False for what is missing, True for the rest."""
    missing = ("QuotaReserved", "Admitted")
    conditions = [
        {"type": kind, "status": "False" if kind in missing else "True", "reason": "Any", "message": message}
        for kind, message in messages.items()
    ]
    return {"metadata": {"name": "job-demo-train-1"}, "spec": {"active": True}, "status": {"conditions": conditions}}


@pytest.fixture
async def queued(cluster: FakeCluster) -> FakeCluster:
    """Training waits in its queue, and the operator may read why."""
    cluster.context = Context(Settings(kueue=True), PodLayout())
    cluster.edit(scheduling={"queueName": "team-queue", "workloadPriorityClassName": "low"})
    await cluster.pass_through(Stage.PREPARE)
    cluster.jobs[TRAIN]["spec"]["suspend"] = True  # Kueue's webhook
    await cluster.settle()
    return cluster


async def test_a_queued_training_says_why_it_waits(queued: FakeCluster) -> None:
    assert queued.status.message == "train waits in queue team-queue"
    queued.workload = workload(QuotaReserved=PENDING, Admitted="The workload has no reservation")
    await queued.settle()
    assert queued.status.phase is Phase.QUEUED
    assert queued.condition("Running") == ("False", "Queued")
    assert queued.status.message == f"train waits in queue team-queue: {PENDING}"
    writes = queued.status_writes
    await queued.turn(600)
    assert queued.status_writes == writes


async def test_where_the_operator_may_not_read_why_it_says_what_would_let_it(queued: FakeCluster) -> None:
    queued.context = CONTEXT
    assert await queued.turn() is None, "there is nothing to look for"
    assert "kueue.enabled" in queued.status.message


async def test_what_kueue_checks_and_what_it_has_given_up_is_told(queued: FakeCluster) -> None:
    queued.workload = workload()
    queued.workload["status"]["admissionChecks"] = [
        {"name": "nodes", "state": "Pending", "message": "no node yet"},
        {"name": "budget", "state": "Ready", "message": ""},
    ]
    await queued.settle()
    assert queued.status.message == "train waits in queue team-queue: admission check nodes: no node yet"
    queued.workload = workload(Evicted="exceeded the maximum number of re-queuing retries", QuotaReserved="evicted")
    queued.workload["spec"]["active"] = False
    await queued.settle()
    assert "it was deactivated: exceeded the maximum number" in queued.status.message


async def test_a_preempted_training_saves_waits_and_goes_on(queued: FakeCluster) -> None:
    job = queued.jobs[TRAIN]
    job["spec"]["suspend"] = False
    await train_to(queued, 50)
    job["spec"]["suspend"] = True
    queued.workload = workload(Evicted=PREEMPTING, Preempted=PREEMPTING, QuotaReserved=PREEMPTING)
    await queued.settle()
    assert (queued.status.phase, queued.condition("Running")) == (Phase.TRAINING, ("True", "Preempted"))
    queued.pods[TRAIN].clear()
    queued.workload = workload(Evicted=PREEMPTING, Preempted=PREEMPTING, QuotaReserved=PENDING)
    await queued.settle()
    assert (queued.status.phase, queued.condition("Running")) == (Phase.QUEUED, ("False", "Queued"))
    assert queued.status.message == f"train waits in queue team-queue: {PENDING}"
    assert job["spec"]["suspend"] is True, "Kueue's to take back"
    job["spec"]["suspend"] = False
    queued.workload = None
    await train_to(queued, 51, resumed_from_step=50)
    status = queued.status
    assert (status.attempt, status.disruptions, status.last_interruption.lost_steps) == (1, 1, 0)
    assert status.last_interruption.reason is Reason.PREEMPTED
    assert "prioritization in the ClusterQueue" in status.last_interruption.message


async def test_a_queue_that_stops_a_job_without_preemption_says_why(queued: FakeCluster) -> None:
    job = queued.jobs[TRAIN]
    job["spec"]["suspend"] = False
    await train_to(queued, 50)
    job["spec"]["suspend"] = True
    queued.workload = workload(Evicted="The ClusterQueue is stopped", QuotaReserved="The ClusterQueue is stopped")
    await queued.settle()
    last = queued.status.last_interruption
    assert (last.reason, last.message) == (Reason.DISRUPTED, "its queue has stopped it: The ClusterQueue is stopped")


async def test_a_queued_job_that_has_ended_is_deleted_for_kueue_would_take_a_suspend_back(queued: FakeCluster) -> None:
    queued.jobs[TRAIN]["spec"]["suspend"] = False
    await train_to(queued, 50)
    assert queued.body is not None
    queued.body["status"] |= {"phase": "Failed", "failure": {"reason": "StageFailed", "message": "by hand"}}
    await queued.settle()
    assert TRAIN not in queued.jobs


# another controller's


@pytest.mark.parametrize("spec", [{}, {"task": "Unheard"}], ids=["valid", "of another version"])
async def test_a_job_of_another_controller_is_left_alone(cluster: FakeCluster, spec: Manifest) -> None:
    cluster.edit(managedBy="example.com/fleet", **spec)
    assert await cluster.turn() is None
    assert not cluster.created and not cluster.status_writes and not cluster.events


async def test_a_job_that_names_this_controller_is_carried_out(cluster: FakeCluster) -> None:
    cluster.edit(managedBy=CONTROLLER)
    await cluster.settle()
    assert Stage.PREPARE in cluster.jobs
