"""The adapter against a fake API server: what is created, what is left alone, which error is which."""

import time

import pytest
from finetune_api.constants import HASH_ANNOTATION, JOB_LABEL, STAGE_LABEL, Phase, Stage
from finetune_api.progress import Progress
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster import ForbiddenError, NameClashError, RejectedError, UnavailableError
from finetune_operator.event_recorder import EventRecorder
from finetune_operator.kube import KubeCluster
from finetune_operator.observed import Key, format_time, is_suspended_by_us, suspension
from finetune_operator.render.metadata import JOB_UID_ANNOTATION
from finetune_operator.store import FINE_TUNE_JOBS, JOBS, PODS, POLICIES, Store

from tests.fake_kubernetes import fake_kubernetes, status

KEY = Key("team", "demo")
NAMESPACE = "/namespaces/team"
RESOURCE = f"/apis/finetune-operator.io/v1alpha1{NAMESPACE}/finetunejobs/demo"
JOB = f"/apis/batch/v1{NAMESPACE}/jobs/demo-train"
GUARD = f"/apis/networking.k8s.io/v1{NAMESPACE}/networkpolicies/guard"
POLICY = f"/apis/networking.k8s.io/v1{NAMESPACE}/networkpolicies/demo-train"
CLAIM = f"/api/v1{NAMESPACE}/persistentvolumeclaims/demo-workspace"


class World:
    """A FineTuneJob on the fake server, known to the store, and the adapter."""

    def __init__(self, fake, api) -> None:
        self.fake, self.api = fake, api
        self.store = Store()
        self.seconds: float | Exception = 10.0
        self.progress: dict[str, Progress] = {}
        self.recorder = EventRecorder(api, self._seconds_to_write)
        self.cluster = KubeCluster(api, self.store, self._seconds_to_write, self.progress.get, self.recorder.record)
        self.put(FINE_TUNE_JOBS, RESOURCE, {"spec": {"suspend": False}})

    def _seconds_to_write(self) -> float:
        if isinstance(self.seconds, Exception):
            raise self.seconds
        return self.seconds

    def put(self, kind, path, body):
        body = self.fake.put(path, body)
        self.store.put(kind, body)
        return body

    @property
    def uid(self) -> str:
        return self.fake.objects[RESOURCE]["metadata"]["uid"]

    async def resource(self):
        found = await self.cluster.observe(KEY)
        assert found
        return found[0]

    async def observed(self):
        found = await self.cluster.observe(KEY)
        assert found
        return found[1]

    def owner(self, uid=None):
        return [{"kind": "FineTuneJob", "name": "demo", "uid": uid or self.uid, "controller": True}]

    def child(self, kind="Job", name="demo-train", stage=Stage.TRAIN, content="1", **fields):
        version = {"Job": "batch/v1", "NetworkPolicy": "networking.k8s.io/v1"}.get(kind, "v1")
        metadata = {
            "name": name,
            "namespace": "team",
            "labels": {JOB_LABEL: "demo", STAGE_LABEL: str(stage)},
            "annotations": {HASH_ANNOTATION: content},
            "ownerReferences": self.owner(),
        }
        return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": {"suspend": False}, **fields}

    def guard(self, **fields):
        """A policy for all jobs of the namespace."""
        policy = self.child("NetworkPolicy", name="guard", **fields)
        del policy["metadata"]["ownerReferences"]
        policy["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "finetune-operator"}
        return policy

    def job(self, stage=Stage.TRAIN):
        return self.put(
            JOBS, f"/apis/batch/v1{NAMESPACE}/jobs/demo-{stage}", self.child(name=f"demo-{stage}", stage=stage)
        )

    def pod(self, job, name, created="2026-01-01T00:00:00Z", phase="Running", index="0", **pod_status):
        metadata = {
            "creationTimestamp": created,
            "labels": {JOB_LABEL: "demo", STAGE_LABEL: job["metadata"]["labels"][STAGE_LABEL]},
            "annotations": {"batch.kubernetes.io/job-completion-index": index},
            "ownerReferences": [{"kind": "Job", "uid": job["metadata"]["uid"]}],
        }
        return self.put(
            PODS, f"/api/v1{NAMESPACE}/pods/{name}", {"metadata": metadata, "status": {"phase": phase, **pod_status}}
        )


@pytest.fixture
async def world():
    async with fake_kubernetes() as (fake, api):
        yield World(fake, api)


# --- create


async def test_a_child_is_posted_in_our_name_and_is_known_at_once(world):
    await world.cluster.create(await world.resource(), world.child())
    assert world.fake.writes() == [("POST", f"{JOB.rsplit('/', 1)[0]}?fieldManager=finetune-operator")]
    assert Stage.TRAIN in (await world.observed()).jobs, "the watch may be late: it must not be created twice"


async def test_a_service_of_ours_is_brought_up_to_date(world):
    resource, path = await world.resource(), f"/api/v1{NAMESPACE}/services/demo-train"
    await world.cluster.create(resource, world.child("Service", content="1"))
    await world.cluster.create(resource, world.child("Service", content="2"))
    assert world.fake.objects[path]["metadata"]["annotations"][HASH_ANNOTATION] == "2"
    world.fake.objects[path]["metadata"]["ownerReferences"] = []
    with pytest.raises(NameClashError, match="Service demo-train exists and belongs to somebody else"):
        await world.cluster.create(resource, world.child("Service", content="3"))


async def test_a_child_that_is_there_and_ours_is_left_as_it_is(world):
    resource = await world.resource()
    await world.cluster.create(resource, world.child(content="1"))
    before = world.fake.objects[JOB]
    await world.cluster.create(resource, world.child(content="2"))
    assert world.fake.objects[JOB] == before, "a Job's template cannot be changed"


async def test_an_outdated_policy_of_ours_is_replaced_as_a_whole(world):
    resource = await world.resource()
    await world.cluster.create(resource, world.child("NetworkPolicy", content="1", spec={"egress": [{}], "old": True}))
    await world.cluster.create(resource, world.child("NetworkPolicy", content="2", spec={"egress": []}))
    assert world.fake.objects[POLICY]["spec"] == {"egress": []}
    count = len(world.fake.writes())
    await world.cluster.create(resource, world.child("NetworkPolicy", content="2", spec={"egress": []}))
    assert len(world.fake.writes()) == count + 1, "only the POST: nothing has changed"


@pytest.mark.parametrize("kind", ["Job", "NetworkPolicy"])
async def test_an_object_of_somebody_else_is_never_touched(world, kind):
    child = world.child(kind)
    path = {"Job": JOB, "NetworkPolicy": POLICY}[kind]
    for owners in ([], [{"kind": "CronJob", "name": "demo", "uid": "theirs"}]):
        theirs = world.fake.put(path, {**child, "metadata": {**child["metadata"], "ownerReferences": owners}})
        with pytest.raises(NameClashError, match=f"{kind} demo-train exists and belongs to somebody else"):
            await world.cluster.create(await world.resource(), child)
        assert world.fake.objects[path] == theirs
    assert not (await world.observed()).jobs


async def test_what_is_left_of_a_predecessor_is_waited_for(world):
    """kubectl delete and apply in one breath: garbage collection comes later, and that is no name clash."""
    child = world.child()
    world.fake.put(JOB, {**child, "metadata": {**child["metadata"], "ownerReferences": world.owner("older")}})
    with pytest.raises(UnavailableError, match="still being deleted"):
        await world.cluster.create(await world.resource(), child)
    world.fake.put(JOB, {**child, "metadata": {**child["metadata"], "deletionTimestamp": "now"}})
    with pytest.raises(UnavailableError, match="still being deleted"):
        await world.cluster.create(await world.resource(), child)


async def test_a_retained_claim_is_ours_by_its_annotation(world):
    claim = world.child("PersistentVolumeClaim", "demo-workspace")
    claim["metadata"] |= {"ownerReferences": [], "annotations": {JOB_UID_ANNOTATION: world.uid}}
    await world.cluster.create(await world.resource(), claim)
    await world.cluster.create(await world.resource(), claim)
    claim["metadata"]["annotations"][JOB_UID_ANNOTATION] = "an earlier one's"
    world.fake.put(CLAIM, claim)
    with pytest.raises(NameClashError, match=r"retained from an earlier FineTuneJob.*spec\.workspace\.claimName"):
        await world.cluster.create(await world.resource(), claim)


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (status(422, "Invalid", "spec.template: Invalid value"), RejectedError),
        (status(400, "BadRequest", "unknown field"), RejectedError),
        (status(403, "Forbidden", "exceeded quota: gpus"), UnavailableError),
        (status(404, "NotFound", 'namespaces "team" not found'), UnavailableError),
        (status(429, "TooManyRequests", "slow down"), UnavailableError),
        (status(500, "InternalError", "failed calling webhook"), UnavailableError),
        (502, UnavailableError),
    ],
)
async def test_a_refusal_keeps_the_servers_words(world, refusal, error):
    world.fake.refusals = [refusal]
    words = refusal["message"] if isinstance(refusal, dict) else "502"
    with pytest.raises(error, match=f"cannot create Job demo-train: .*{words}"):
        await world.cluster.create(await world.resource(), world.child())


async def test_a_namespace_that_is_being_deleted_is_no_trouble(world, caplog):
    refusal = status(403, "Forbidden", "it is being terminated", "NamespaceTerminating")
    world.fake.refusals = [refusal]
    await world.cluster.create(await world.resource(), world.child())
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


async def test_an_api_server_that_is_away_can_be_tried_again(world):
    world.api.url = "http://127.0.0.1:9"
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9 cannot be reached"):
        await world.cluster.create(await world.resource(), world.child())


async def test_who_does_not_lead_writes_nothing(world):
    resource = await world.resource()
    world.job()
    world.seconds = UnavailableError("this replica is not the leader")
    for write in (
        world.cluster.create(resource, world.child(name="demo-publish", stage=Stage.PUBLISH)),
        world.cluster.change_job(resource, Stage.TRAIN, suspension(True)),
        world.cluster.delete_child(resource, Stage.TRAIN),
        world.cluster.delete(resource),
        world.cluster.write_status(resource, FineTuneJobStatus(phase=Phase.FAILED)),
    ):
        with pytest.raises(UnavailableError, match="not the leader"):
            await write
    assert not world.fake.writes()


# --- change and delete


async def test_suspend_is_patched_and_known_at_once(world):
    world.job()
    await world.cluster.change_job(await world.resource(), Stage.TRAIN, suspension(True))
    assert world.fake.objects[JOB]["spec"]["suspend"] is True
    assert is_suspended_by_us(world.fake.objects[JOB]), "or a queue could not be told from us"
    assert (await world.observed()).jobs[Stage.TRAIN]["spec"]["suspend"] is True
    await world.cluster.change_job(
        await world.resource(), Stage.PUBLISH, suspension(True)
    )  # there is none: nothing to do


async def test_a_child_that_was_made_anew_is_neither_suspended_nor_deleted(world):
    world.job()
    del world.fake.objects[JOB]
    other = world.fake.put(JOB, world.child())
    resource = await world.resource()
    await world.cluster.delete_child(resource, Stage.TRAIN)
    with pytest.raises(UnavailableError, match="has been modified"):
        await world.cluster.change_job(resource, Stage.TRAIN, suspension(True))
    assert world.fake.objects[JOB] == other
    assert (await world.observed()).jobs[Stage.TRAIN] == other, "and it is known now"


async def test_a_job_is_changed_only_as_it_was_seen(world):
    """Two replicas may act for a moment: what the one has stopped the other does not start."""
    job, resource = world.job(), await world.resource()
    stopped = world.fake.put(JOB, {**job, "spec": {"suspend": True}})
    with pytest.raises(UnavailableError, match="has been modified"):
        await world.cluster.change_job(resource, Stage.TRAIN, suspension(False))
    assert world.fake.objects[JOB] == stopped
    await world.cluster.change_job(resource, Stage.TRAIN, suspension(False))
    assert world.fake.objects[JOB]["spec"]["suspend"] is False


async def test_a_deleted_child_takes_its_pods_along_and_is_known_to_go(world):
    world.job()
    await world.cluster.delete_child(await world.resource(), Stage.TRAIN)
    assert world.fake.requests[-1][2]["propagationPolicy"] == "Foreground"
    assert "deletionTimestamp" in (await world.observed()).jobs[Stage.TRAIN]["metadata"]


async def test_deleting_is_for_exactly_this_resource(world):
    resource = await world.resource()
    del world.fake.objects[RESOURCE]
    await world.cluster.delete(resource)  # gone already
    newer = world.fake.put(RESOURCE, {"spec": {}})
    await world.cluster.delete(resource)
    assert world.fake.objects[RESOURCE] == newer
    world.store.put(FINE_TUNE_JOBS, newer)
    world.store.remove(resource.uid, 10**9)
    await world.cluster.delete(await world.resource())
    assert RESOURCE not in world.fake.objects


# --- status


async def test_a_status_replaces_the_old_one_and_is_known_at_once(world):
    await world.cluster.write_status(await world.resource(), FineTuneJobStatus(phase=Phase.PENDING, message="waits"))
    await world.cluster.write_status(await world.resource(), FineTuneJobStatus(phase=Phase.PREPARING))
    assert world.fake.objects[RESOURCE]["status"] == {"phase": "Preparing"}
    assert (await world.resource()).status == FineTuneJobStatus(phase=Phase.PREPARING)


async def test_a_status_that_was_worked_out_from_an_older_one_is_not_written(world):
    """And what was written by somebody else meanwhile becomes known, whether the watch works or not."""
    resource = await world.resource()
    told = []
    world.store.changed = told.append
    world.fake.put(RESOURCE, {"spec": {}, "status": {"phase": "Failed", "message": "by hand"}})
    await world.cluster.write_status(resource, FineTuneJobStatus(phase=Phase.PREPARING))
    assert world.fake.objects[RESOURCE]["status"] == {"phase": "Failed", "message": "by hand"}
    assert (await world.resource()).status.message == "by hand"
    assert told == [KEY], "so it comes up again"
    await world.cluster.write_status(await world.resource(), FineTuneJobStatus(phase=Phase.PREPARING))
    assert world.fake.objects[RESOURCE]["status"] == {"phase": "Preparing"}, "nothing of the other one is left"


async def test_a_status_write_touches_neither_spec_nor_metadata(world):
    resource = await world.resource()
    body = world.fake.objects[RESOURCE]
    await world.cluster.write_status(resource, FineTuneJobStatus(phase=Phase.PREPARING))
    method, path, sent = world.fake.requests[-1]
    assert (method, path) == ("PUT", f"{RESOURCE}/status?fieldManager=finetune-operator")
    assert set(sent["metadata"]) == {"name", "namespace", "uid", "resourceVersion"}
    after = world.fake.objects[RESOURCE]
    assert after["spec"] == body["spec"]
    assert {**after["metadata"], "resourceVersion": ""} == {**body["metadata"], "resourceVersion": ""}


async def test_a_late_watch_event_does_not_bring_back_the_old_status(world):
    old = world.fake.objects[RESOURCE]
    await world.cluster.write_status(await world.resource(), FineTuneJobStatus(phase=Phase.PREPARING))
    world.store.put(FINE_TUNE_JOBS, old)
    assert (await world.resource()).status.phase == Phase.PREPARING


async def test_the_status_of_a_resource_that_was_made_anew_is_not_written(world):
    resource = await world.resource()
    del world.fake.objects[RESOURCE]
    await world.cluster.write_status(resource, FineTuneJobStatus(phase=Phase.FAILED))  # 404
    world.fake.put(RESOURCE, {"spec": {}})
    await world.cluster.write_status(resource, FineTuneJobStatus(phase=Phase.FAILED))  # 409
    assert "status" not in world.fake.objects[RESOURCE]


async def test_a_resource_that_is_deleted_while_its_status_is_written_stays_deleted(world):
    resource = await world.resource()
    answer = world.fake.put(RESOURCE, {"spec": {}, "status": {"phase": "Pending"}})
    world.store.remove(resource.uid, 10**9)
    world.store.update(FINE_TUNE_JOBS, answer)
    assert await world.cluster.observe(KEY) is None


async def test_a_status_that_the_server_refuses_is_an_error(world):
    world.fake.refusals = [status(422, "Invalid", "status.phase: Unsupported value")]
    with pytest.raises(RejectedError, match=r"cannot write the status: status\.phase"):
        await world.cluster.write_status(await world.resource(), FineTuneJobStatus(phase=Phase.FAILED))


async def test_policies_are_known_the_jobs_own_and_the_namespaces(world):
    resource = await world.resource()
    assert not (await world.observed()).policies
    await world.cluster.create(resource, world.child("NetworkPolicy"))
    await world.cluster.create(resource, world.guard())
    both = {"demo-train": "1", "guard": "1"}
    assert (await world.observed()).policies == both, "the watch may be late"
    world.store.remove(world.fake.objects[GUARD]["metadata"]["uid"], 0)
    assert (await world.observed()).policies == {"demo-train": "1"}
    await world.cluster.create(resource, world.guard())
    assert (await world.observed()).policies == both, "it was there all the time"


async def test_a_policy_of_a_predecessor_is_none_of_ours(world):
    theirs = world.child("NetworkPolicy")
    theirs["metadata"]["ownerReferences"] = world.owner(uid="of a job that was deleted")
    world.put(POLICIES, POLICY, theirs)
    assert not (await world.observed()).policies


async def test_a_policy_for_all_jobs_is_renewed_by_whichever_needs_it(world):
    resource = await world.resource()
    world.put(POLICIES, GUARD, world.guard(spec={"egress": [{}]}))
    await world.cluster.create(resource, world.guard(content="2", spec={"egress": []}))
    assert world.fake.objects[GUARD]["spec"] == {"egress": []}
    assert (await world.observed()).policies == {"guard": "2"}


async def test_a_policy_of_somebody_else_in_the_place_of_all_jobs_stops_them_and_fails_none(world):
    theirs = world.guard()
    theirs["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "Helm"}
    before = world.fake.put(GUARD, theirs)
    with pytest.raises(ForbiddenError, match="NetworkPolicy guard exists and is not ours, and no pod may start"):
        await world.cluster.create(await world.resource(), world.guard())
    assert world.fake.objects[GUARD] == before


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
