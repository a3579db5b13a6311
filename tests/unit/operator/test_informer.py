"""The store and what keeps it true: watch events, own writes and lists, in any order."""

import asyncio
import contextlib

import pytest
from finetune_api.constants import JOB_LABEL
from finetune_operator import informer as module
from finetune_operator.informer import Informer
from finetune_operator.observed import Key
from finetune_operator.store import FINE_TUNE_JOBS, JOBS, KINDS, PODS, POLICIES, Store
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_kubernetes import fake_kubernetes, status

KEY = Key("team", "demo")
WATCH = (JOBS, None)


def body(uid="u1", version="1", name="demo", namespace="team", label="demo", **fields):
    labels = {JOB_LABEL: label} if label else {}
    metadata = {"uid": uid, "resourceVersion": version, "name": name, "namespace": namespace, "labels": labels}
    return {"metadata": {**metadata, "managedFields": ["long"]}, **fields}


# --- store


def names(store, kind, key=KEY):
    return sorted(each["metadata"]["uid"] for each in store.get(kind, key))


def test_objects_are_found_by_the_job_that_they_are_or_are_labelled_with():
    store = Store()
    store.put(FINE_TUNE_JOBS, body("f"))
    store.put(JOBS, body("j", name="demo-train"))
    store.put(JOBS, body("other", name="demo-train", label="demo2"))
    store.put(JOBS, body("elsewhere", name="demo-train", namespace="team2"))
    store.put(PODS, body("unlabelled", label=None))
    assert names(store, FINE_TUNE_JOBS) == ["f"]
    assert names(store, JOBS) == ["j"]
    assert names(store, PODS) == []
    assert list(store.known()) == [KEY]


def test_every_change_is_told_with_the_jobs_key_and_nothing_else_is():
    store, told = Store(), []
    store.changed = told.append
    store.put(JOBS, body(version="5"))
    store.put(JOBS, body(version="5"))
    store.put(JOBS, body(version="4"))
    store.remove("unknown", 10**9)
    assert told == [KEY]
    store.put(JOBS, body(version="6", label="renamed"))
    assert told == [KEY, Key("team", "renamed")]
    assert names(store, JOBS) == []
    store.remove("u1", 10**9)
    assert told[2:] == [Key("team", "renamed")]


def test_of_two_objects_of_one_name_both_are_kept_until_one_is_deleted():
    store = Store()
    store.put(JOBS, body("new", "9"))
    store.put(JOBS, body("old", "3"))
    store.remove("old", 10**9)
    assert names(store, JOBS) == ["new"]


def test_without_comparable_versions_the_last_word_counts():
    store = Store()
    store.put(JOBS, body(version="abc", status=1))
    assert store.put(JOBS, body(version="abb", status=2))
    assert store.get(JOBS, KEY)[0]["status"] == 2


@given(st.permutations(range(1, 8)))
def test_in_whatever_order_states_arrive_the_newest_stays(order):
    store = Store()
    for version in order:
        store.put(JOBS, body(version=str(version), status=version))
    assert [each["status"] for each in store.get(JOBS, KEY)] == [7]


def test_a_list_removes_what_is_gone_and_keeps_what_is_younger_or_elsewhere():
    store = Store()
    for each in (
        body("gone", "3", "a"), body("stays", "4", "b"), body("younger", "11", "c"), body("far", "5", "d", "team2"),
    ):  # fmt: skip
        store.put(JOBS, each)
    assert store.replace(JOBS, [body("stays", "4", "b"), body("missed", "9", "e")], "10", namespace="team") == 2
    assert names(store, JOBS) == ["missed", "stays", "younger"]
    assert names(store, JOBS, Key("team2", "demo")) == ["far"]


def test_a_list_of_what_belongs_to_one_job_changes_nothing_else():
    store = Store()
    for each in (body("gone", "3"), body("other", "4", label="other"), body("far", "5", namespace="team2")):
        store.put(JOBS, each)
    assert store.replace(JOBS, [body("new", "9")], "10", key=KEY) == 2
    assert names(store, JOBS) == ["new"]
    assert names(store, JOBS, Key("team", "other")) == ["other"]
    assert names(store, JOBS, Key("team2", "demo")) == ["far"]


def test_of_a_policy_only_its_end_is_news():
    store, told = Store(), []
    store.changed = told.append
    store.put(POLICIES, body("p", spec={"egress": []}))
    assert "spec" not in store.get(POLICIES, KEY)[0]
    assert not told
    store.remove("p", 10**9)
    assert told == [KEY]


def test_the_end_of_a_policy_for_all_jobs_is_news_for_each_of_its_namespace():
    store, told = Store(), []
    store.put(POLICIES, body("guard", label=None))
    for number, name in enumerate(("one", "two")):
        store.put(FINE_TUNE_JOBS, body(f"{number}", name=name))
    store.put(FINE_TUNE_JOBS, body("3", name="three", namespace="far"))
    store.changed = told.append
    store.remove("guard", 10**9)
    assert told == [Key("team", "one"), Key("team", "two")]


def test_our_own_objects_are_not_changed_by_storing_them():
    original = body()
    Store().put(JOBS, original)
    assert "managedFields" in original["metadata"]


# --- informer


@pytest.fixture
async def world():
    async with fake_kubernetes() as (fake, api):
        store = Store()
        informer = Informer(api, store, ())
        task = asyncio.create_task(informer.run())
        yield fake, store, informer
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def settle():
    await asyncio.sleep(0.1)


async def test_it_is_synced_when_every_kind_was_listed_after_its_watch(world):
    fake, store, informer = world
    fake.put("/apis/batch/v1/namespaces/team/jobs/demo-train", {"metadata": {"labels": {JOB_LABEL: "demo"}}})
    assert not informer.synced.is_set()
    for kind in KINDS[:2]:
        informer.answered((kind, None), listed=True)
    informer.answered((POLICIES, None), listed=True)
    informer.answered((PODS, None), listed=False)
    await settle()
    assert not informer.synced.is_set()
    informer.answered((PODS, None), listed=True)
    await asyncio.wait_for(informer.synced.wait(), 1)
    assert len(store.get(JOBS, KEY)) == 1


async def test_what_was_deleted_while_the_watch_was_broken_is_found_out(world):
    """kopf lists anew and reports what is there; that something is not, it does not say."""
    _, store, informer = world
    informer.saw(WATCH, "ADDED", body("lost", "1"))
    assert names(store, JOBS) == ["lost"]
    fake = world[0]
    fake.put("/apis/batch/v1/namespaces/team/jobs/other", {"metadata": {"labels": {JOB_LABEL: "other"}}})
    informer.answered(WATCH, listed=True)
    await settle()
    assert names(store, JOBS) == []


async def test_watch_events_change_the_store(world):
    _, store, informer = world
    informer.saw(WATCH, None, body("a", "1"))
    informer.saw(WATCH, "ADDED", body("b", "2"))
    informer.saw(WATCH, "DELETED", body("a", "3"))
    assert names(store, JOBS) == ["b"]


async def test_a_list_that_fails_is_told_and_tried_again(world, monkeypatch, caplog):
    fake, _, informer = world
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    fake.refuse_reads, fake.refusals = True, [status(403, "Forbidden", "jobs is forbidden: User cannot list")] * 2
    for kind in KINDS:
        informer.answered((kind, None), listed=True)
    await asyncio.wait_for(informer.synced.wait(), 1)
    assert "jobs is forbidden: User cannot list" in caplog.text


async def test_it_lists_by_itself_from_time_to_time(world, monkeypatch):
    fake, store, informer = world
    monkeypatch.setattr(module, "RESYNC_SECONDS", 0.02)
    informer.answered(WATCH, listed=True)  # the next wait is a short one
    await settle()
    fake.put("/apis/batch/v1/namespaces/team/jobs/demo-train", {"metadata": {"labels": {JOB_LABEL: "demo"}}})
    await settle()
    assert len(store.get(JOBS, KEY)) == 1


def test_a_deleted_object_does_not_come_back_with_an_older_list():
    store = Store()
    old = body("u1", "1")
    store.put(JOBS, old)
    store.remove("u1", 5)
    store.replace(JOBS, [old], "4")
    assert not store.put(JOBS, old)
    assert names(store, JOBS) == []
    assert store.put(JOBS, body("u1", str(10))), "it lost its label for a while"


async def test_it_is_unhealthy_only_if_a_watch_hangs_while_the_server_answers(world, monkeypatch):
    _, _, informer = world
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    for kind in KINDS:
        informer.answered((kind, None), listed=False)
    clock[0] += 1000
    informer._api.last_answer = clock[0]
    assert informer.health()[0], "before the first lists it waits for the CRD or for rights: a restart would not help"
    informer.synced.set()
    for kind in KINDS:
        informer.answered((kind, None), listed=False)
    clock[0] += 290
    informer._api.last_answer = clock[0]
    assert informer.health()[0]
    informer.answered((FINE_TUNE_JOBS, None), listed=False)
    informer.saw((JOBS, None), "MODIFIED", body())
    clock[0] += 20
    informer._api.last_answer = clock[0]
    assert informer.ages() == {"finetunejobs": 20, "jobs": 20, "pods": 310, "networkpolicies": 310}
    well, words = informer.health()
    assert not well
    assert "pods: the watch was proven to work 310 s ago" in words
    clock[0] += 40  # nothing answers any more: a restart would not help
    assert informer.health()[0]
