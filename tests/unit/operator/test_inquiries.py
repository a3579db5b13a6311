"""Questions that are asked again and again: how often, what of the answer is kept, what a refusal does."""

import itertools
from collections.abc import AsyncIterator

import pytest
from finetune_operator.inquiries import Inquiries

from tests.fake_kubernetes import FakeKubernetes, fake_kubernetes, status

POD = {"metadata": {"name": "demo-train-0-x", "namespace": "team", "uid": "pod-1"}}
JOB = {"metadata": {"name": "demo-train", "namespace": "team", "uid": "job-1", "generation": 1}}
EVENTS = "/api/v1/namespaces/team/events"
WORKLOADS = "/apis/kueue.x-k8s.io/{}/namespaces/team/workloads"
NO_KUEUE = status(404, "NotFound", "the server could not find the requested resource")


class World:
    def __init__(self, fake: FakeKubernetes, inquiries: Inquiries) -> None:
        self.fake, self.inquiries = fake, inquiries
        self.now = 0.0

    @property
    def asked(self) -> list[str]:
        return [path for _, path, _ in self.fake.requests]

    def is_said(self, message: str, **fields: object) -> None:
        self.fake.put(f"{EVENTS}/e1", {"reason": "FailedMount", "message": message, **fields})

    async def messages(self) -> list[str]:
        return [event["message"] for event in await self.inquiries.events_about(POD)]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with fake_kubernetes() as (fake, api):
        world = World(fake, Inquiries(api, lambda: world.now))
        yield world


async def test_the_same_answer_is_asked_for_later_and_later(world: World) -> None:
    world.is_said("no such volume", count=1)
    times, count = [], 0
    for second in range(300):
        world.now = second
        world.is_said("no such volume", count=second)  # the kubelet says it again: nothing new
        assert await world.messages() == ["no such volume"]
        if len(world.asked) > count:
            times.append(second)
            count = len(world.asked)
    assert [later - sooner for sooner, later in itertools.pairwise(times)] == [5, 10, 20, 40, 60, 60, 60]
    world.is_said("mounted")
    world.now += 60
    assert await world.messages() == ["mounted"]
    world.now += 5
    world.is_said("started")
    assert await world.messages() == ["started"], "it has changed: it is looked at closely again"


async def test_a_thousand_questions_are_not_asked_at_once(world: World) -> None:
    pods = [{"metadata": {**POD["metadata"], "uid": f"pod-{number}"}} for number in range(1000)]
    for pod in pods:
        await world.inquiries.events_about(pod)
    first = len(world.asked)
    for second in range(100):
        world.now = 100 + second
        for pod in pods:
            await world.inquiries.events_about(pod)
    assert (first, len(world.asked) - first) == (11, 110)
    assert len(set(world.asked)) > 100, "none is asked again before others were asked once"


async def test_a_refusal_is_logged_once_and_leaves_what_is_known(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.is_said("no such volume")
    await world.messages()
    world.fake.refuse_reads = True
    world.fake.refusals = [status(403, "Forbidden", "events is forbidden"), 500, 500]
    for world.now in (10, 100, 200):
        assert await world.messages() == ["no such volume"]
    assert not caplog.records
    world.fake.refusals = [status(403, "Forbidden", "events is forbidden"), 500]
    other = {"metadata": {**POD["metadata"], "uid": "pod-2"}}
    for world.now in (300, 400):
        assert not await world.inquiries.events_about(other)
    assert [record.message for record in caplog.records] == [
        "Cannot read the events of demo-train-0-x: events is forbidden"
    ]


@pytest.mark.parametrize("version", ["v1beta2", "v1beta1"])
async def test_the_workload_is_found_in_every_version_of_kueue(world: World, version: str) -> None:
    if version == "v1beta1":
        world.fake.refuse_reads, world.fake.refusals = True, [NO_KUEUE]
    conditions = [{"type": "QuotaReserved", "status": "False", "message": "waits"}]
    world.fake.put(
        f"{WORKLOADS.format(version)}/job-demo-train",
        {"metadata": {"labels": {"kueue.x-k8s.io/job-uid": "job-1"}}, "status": {"conditions": conditions}},
    )
    assert await world.inquiries.workload_of(JOB) == {"spec": {}, "status": {"conditions": conditions}}
    assert world.asked[-1].startswith(WORKLOADS.format(version))
    assert "labelSelector=kueue.x-k8s.io/job-uid%3Djob-1" in world.asked[-1]


async def test_a_job_that_is_suspended_anew_is_asked_about_at_once(world: World) -> None:
    await world.inquiries.workload_of(JOB)
    await world.inquiries.workload_of(JOB)
    assert len(world.asked) == 1
    await world.inquiries.workload_of({"metadata": {**JOB["metadata"], "generation": 2}})
    assert len(world.asked) == 2


async def test_without_kueue_nothing_is_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.fake.refuse_reads, world.fake.refusals = True, [NO_KUEUE, NO_KUEUE]
    assert await world.inquiries.workload_of(JOB) is None
    assert not caplog.records
