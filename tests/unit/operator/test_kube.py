"""The adapter against a fake API server: what is created, what is left alone, which error is which."""

import pytest
from finetune_api.constants import HASH_ANNOTATION, Phase, Stage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.cluster import ForbiddenError, NameClashError, RejectedError, UnavailableError
from finetune_operator.observed import is_suspended_by_us, suspension
from finetune_operator.render.metadata import JOB_UID_ANNOTATION
from finetune_operator.store import FINE_TUNE_JOBS, POLICIES

from tests.fake_kubernetes import status
from tests.kube_world import CLAIM, GUARD, JOB, KEY, NAMESPACE, POLICY, RESOURCE, kube_world


@pytest.fixture
async def world():
    async with kube_world() as world:
        yield world


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
