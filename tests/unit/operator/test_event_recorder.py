"""Events: once each, about the right resource, and in nobody's way."""

import asyncio
from functools import partial

import pytest
from finetune_operator.cluster import Event, UnavailableError
from finetune_operator.event_recorder import MAX_WAITING, EventRecorder
from finetune_operator.observed import Resource

from tests.fake_kubernetes import fake_kubernetes, status

STARTING = Event("Normal", "Pending", "starting")


class World:
    def __init__(self, fake, api) -> None:
        self.fake, self.api = fake, api
        self.seconds: float | Exception = 10.0
        self.recorder = EventRecorder(api, self._seconds_to_write, "replica-1")
        self.resource = Resource.read({"metadata": {"namespace": "team", "name": "demo", "uid": "u1"}, "spec": {}})

    def _seconds_to_write(self) -> float:
        if isinstance(self.seconds, Exception):
            raise self.seconds
        return self.seconds

    async def write(self, *events):
        for event in events:
            self.recorder.record(self.resource, event)
        await self.recorder.flush()

    def has_events(self, number):
        return len(self.events) == number

    @property
    def events(self):
        return [body for path, body in self.fake.objects.items() if "/events/" in path]


async def until(holds):
    for _ in range(5000):
        if holds():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it did not happen within 5 s")


@pytest.fixture
async def world():
    async with fake_kubernetes() as (fake, api):
        yield World(fake, api)


async def test_an_event_is_recorded_once_about_this_resource(world):
    for message in ("waits", "waits", "still waits"):
        await world.write(Event("Warning", "Unschedulable", message))
    await world.write(Event("Warning", "Unschedulable", "again", key="attempt 2"))
    assert [event["message"] for event in world.events] == ["waits", "again"]
    about = world.events[0]["involvedObject"]
    assert (about["kind"], about["namespace"], about["name"], about["uid"]) == ("FineTuneJob", "team", "demo", "u1")
    assert world.events[0]["source"] == {"component": "finetune-operator"}
    assert world.events[0]["reportingInstance"] == "replica-1"


async def test_what_is_recorded_twice_before_it_is_written_is_written_once(world):
    await world.write(STARTING, STARTING)
    assert len(world.fake.requests) == 1


async def test_events_are_a_courtesy(world, caplog):
    world.fake.refusals = [status(403, "Forbidden", "events is forbidden"), 500]
    long = Event("Normal", "Pending", "x" * 5000)
    await world.write(long)
    await world.write(long)
    assert "Event Pending of team/demo was not recorded: events is forbidden" in caplog.text
    await world.write(long)
    assert len(world.fake.requests[-1][2]["message"]) == 1024


async def test_a_namespace_that_is_being_deleted_is_no_trouble(world, caplog):
    world.fake.refusals = [status(403, "Forbidden", "it is being terminated", "NamespaceTerminating")]
    await world.write(STARTING)
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


async def test_who_does_not_lead_writes_nothing(world):
    world.seconds = UnavailableError("this replica is not the leader")
    await world.write(STARTING)
    assert not world.fake.requests


async def test_what_is_under_way_when_the_task_ends_is_written_by_the_last_flush(world):
    task = asyncio.create_task(world.recorder.run())
    world.recorder.record(world.resource, STARTING)
    world.recorder.record(world.resource, Event("Normal", "Preparing", "at work"))
    await until(lambda: world.fake.requests)
    task.cancel()
    await asyncio.wait([task])
    await world.recorder.flush()
    assert {event["reason"] for event in world.events} == {"Pending", "Preparing"}


async def test_whoever_records_does_not_wait(world):
    task = asyncio.create_task(world.recorder.run())
    for number in range(3):
        world.recorder.record(world.resource, Event("Normal", "Pending", "", str(number)))
        assert len(world.events) == number
        await until(partial(world.has_events, number + 1))
    task.cancel()


async def test_those_that_wait_have_a_bound(world, caplog):
    for number in range(MAX_WAITING + 1):
        world.recorder.record(world.resource, Event("Normal", "Pending", "", str(number)))
    assert "too many wait" in caplog.text
