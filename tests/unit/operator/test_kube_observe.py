"""The adapter against a fake API server: what it knows of a job, and what it asks for."""

import time

import pytest
from finetune_api.constants import JOB_LABEL, STAGE_LABEL, Stage
from finetune_api.progress import Progress
from finetune_operator.cluster import UnavailableError
from finetune_operator.kube import KubeCluster
from finetune_operator.observed import Key, format_time
from finetune_operator.store import JOBS

from tests.kube_world import GUARD, JOB, KEY, NAMESPACE, RESOURCE, kube_world


@pytest.fixture
async def world():
    async with kube_world() as world:
        yield world


# --- refresh


async def test_what_the_watches_have_not_told_is_asked_for(world):
    job = world.job()
    world.pod(job, "gone")
    path = f"/api/v1{NAMESPACE}/pods/ended"
    del world.fake.objects[f"/api/v1{NAMESPACE}/pods/gone"]
    labels = {JOB_LABEL: "demo", STAGE_LABEL: "train"}
    owners = [{"kind": "Job", "uid": job["metadata"]["uid"]}]
    world.fake.put(path, {"metadata": {"labels": labels, "ownerReferences": owners}, "status": {"phase": "Failed"}})
    world.fake.put(path.replace("ended", "others"), {"metadata": {"labels": {**labels, JOB_LABEL: "other"}}})
    await world.cluster.refresh(KEY)
    assert [pod["metadata"]["name"] for pod in (await world.observed()).pods[Stage.TRAIN]] == ["ended"]
    del world.fake.objects[RESOURCE]
    await world.cluster.refresh(KEY)
    assert await world.cluster.observe(KEY) is None
    world.fake.refuse_reads, world.fake.refusals = True, [500]
    with pytest.raises(UnavailableError, match="cannot list finetunejobs of team/demo"):
        await world.cluster.refresh(KEY)


async def test_a_policy_that_is_gone_is_noticed_before_a_stage_begins(world):
    """Though no watch has told: a pod must not start without it."""
    await world.cluster.create(await world.resource(), world.guard())
    del world.fake.objects[GUARD]
    assert (await world.observed()).policies == {"guard": "1"}
    await world.cluster.refresh(KEY)
    assert not (await world.observed()).policies


async def test_of_pods_made_in_the_same_second_the_one_that_runs_is_the_newest(world):
    job = world.job()

    def end(second):
        return {"containerStatuses": [{"state": {"terminated": {"finishedAt": f"2026-01-01T00:00:0{second}Z"}}}]}

    world.pod(job, "a-runs")
    world.pod(job, "b-failed-second", phase="Failed", **end(2))
    world.pod(job, "c-failed-first", phase="Failed", **end(1))
    world.pod(job, "d-evicted", phase="Failed")
    names = [pod["metadata"]["name"] for pod in (await world.observed()).pods[Stage.TRAIN]]
    assert names == ["d-evicted", "c-failed-first", "b-failed-second", "a-runs"]


# --- observe


async def test_what_does_not_exist_is_none(world):
    assert await world.cluster.observe(Key("team", "other")) is None


async def test_only_own_jobs_and_their_pods_count(world):
    job = world.job()
    stranger = world.child(name="stranger", stage=Stage.PREPARE)
    stranger["metadata"]["ownerReferences"] = world.owner("another resource")
    stranger = world.put(JOBS, f"/apis/batch/v1{NAMESPACE}/jobs/stranger", stranger)
    world.pod(stranger, "strangers")
    world.pod(job, "younger", "2026-01-01T00:00:02Z")
    world.pod(job, "older", "2026-01-01T00:00:01Z")
    world.pod({"metadata": {"uid": "nobody", "labels": job["metadata"]["labels"]}}, "impostor")
    observed = await world.observed()
    assert list(observed.jobs) == [Stage.TRAIN]
    assert {stage: [pod["metadata"]["name"] for pod in pods] for stage, pods in observed.pods.items()} == {
        Stage.TRAIN: ["older", "younger"]
    }


async def test_the_progress_is_that_of_the_first_nodes_running_pod_of_the_current_stage(world):
    def says(pod, stage, fraction):
        world.progress[pod["metadata"]["uid"]] = Progress(stage=stage, activity="x", fraction=fraction, updated_at=1)

    says(world.pod(world.job(Stage.PREPARE), "prepare"), Stage.PREPARE, 1)
    train = world.job(Stage.TRAIN)
    assert (await world.observed()).progress is None, "the word of a stage that is over"
    says(world.pod(train, "failed", phase="Failed"), Stage.TRAIN, 0.9)
    says(world.pod(train, "second-node", "2026-01-01T00:00:09Z", index="1"), Stage.TRAIN, 0.2)
    assert (await world.observed()).progress is None, "only the first node speaks"
    says(world.pod(train, "first-node", "2026-01-01T00:00:05Z"), Stage.TRAIN, 0.5)
    assert (await world.observed()).progress.fraction == 0.5
    says(world.pod(train, "liar", "2026-01-01T00:00:08Z"), Stage.PUBLISH, 0.7)
    assert (await world.observed()).progress.fraction == 0.5


async def test_the_events_of_a_pod_that_does_not_start_are_read(world):
    job = world.job()
    for number, seen in ((1, "2026-01-01T00:00:09Z"), (2, "2026-01-01T00:00:03Z")):
        world.fake.put(f"/api/v1{NAMESPACE}/events/e{number}", {"reason": f"R{number}", "lastTimestamp": seen})

    def asked():
        return [path for _, path, _ in world.fake.requests if "events" in path]

    world.pod(job, "running")
    world.pod(job, "new", format_time(time.time()), phase="Pending")
    assert (await world.observed()).events == ()
    assert not asked(), "it has only just been made"
    pod = world.pod(job, "stuck", format_time(time.time() + 3600), phase="Pending")  # the server's clock is ahead
    assert [event["reason"] for event in (await world.observed()).events] == ["R2", "R1"], "oldest first"
    assert f"involvedObject.uid%3D{pod['metadata']['uid']}" in asked()[0].replace("=", "%3D")


async def test_of_several_nodes_the_events_of_the_one_that_does_not_start_or_is_not_there_are_read(world):
    def asked():
        return [path.rsplit("uid%3D", 1)[1] for _, path, _ in world.fake.requests if "events" in path]

    job = world.put(JOBS, JOB, {**world.child(), "spec": {"parallelism": 3}})
    world.pod(job, "first")
    stuck = world.pod(job, "second", phase="Pending", index="1")
    await world.observed()
    assert asked() == [stuck["metadata"]["uid"]]
    world.store.remove(stuck["metadata"]["uid"], 10**9)
    await world.observed()
    assert asked()[1:] == [job["metadata"]["uid"]]


async def test_the_workload_of_a_train_job_is_read_while_its_queue_holds_it(world):
    path = f"/apis/kueue.x-k8s.io/v1beta2{NAMESPACE}/workloads/job-demo-train"
    job = world.job()
    labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    world.fake.put(path, {"metadata": {"labels": labels}, "status": {"conditions": ["waits"]}})
    world.cluster = KubeCluster(
        world.api, world.store, lambda: 1.0, world.progress.get, world.recorder.record, reads_workloads=True
    )

    async def workload(suspend, labels):
        metadata = {**job["metadata"], "labels": {**job["metadata"]["labels"], **labels}}
        world.put(JOBS, JOB, {**job, "metadata": metadata, "spec": {"suspend": suspend}})
        return (await world.observed()).workload

    queued = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert await workload(suspend=True, labels={}) is None
    assert await workload(suspend=False, labels=queued) is None
    assert (await workload(suspend=True, labels=queued))["status"] == {"conditions": ["waits"]}
    asked = [path for _, path, _ in world.fake.requests if "workloads" in path]
    assert len(asked) == 1
    world.cluster = KubeCluster(world.api, world.store, lambda: 1.0, world.progress.get, world.recorder.record)
    assert await workload(suspend=True, labels=queued) is None, "not without the right"


async def test_the_events_of_a_job_that_gets_no_pod_are_read(world):
    world.fake.put(f"/api/v1{NAMESPACE}/events/e1", {"reason": "FailedCreate", "lastTimestamp": "2026-01-01T00:00:09Z"})
    job = world.job()
    job["metadata"]["creationTimestamp"] = format_time(time.time() - 60)
    world.store.put(JOBS, {**job, "metadata": {**job["metadata"], "resourceVersion": "999999"}})
    assert [event["reason"] for event in (await world.observed()).events] == ["FailedCreate"]


async def test_a_job_waits_for_the_pod_of_its_deleted_forerunner(world):
    resource, job = await world.resource(), world.job()
    pod = world.pod(job, "ending")
    world.store.remove(job["metadata"]["uid"], 10**9)
    del world.fake.objects[JOB]
    manifest = world.child()
    with pytest.raises(UnavailableError, match="is still ending"):
        await world.cluster.create(resource, manifest)
    world.store.remove(pod["metadata"]["uid"], 10**9)
    await world.cluster.create(resource, manifest)
