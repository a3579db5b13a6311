"""Elections against a fake API server, in the time of a clock that the test moves."""

import asyncio
import contextlib

import pytest
from finetune_operator import leader
from finetune_operator.cluster import UnavailableError
from finetune_operator.leader import LeaderElection, LeadershipLostError

from tests.fake_kubernetes import fake_kubernetes, status

LEASE = "/apis/coordination.k8s.io/v1/namespaces/system/leases/finetune-operator"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leader, "RETRY_PERIOD", 0.01)


@pytest.fixture
async def fake():
    async with fake_kubernetes() as pair:
        yield pair


def replica(fake, name: str, clock: Clock) -> LeaderElection:
    return LeaderElection(fake[1], "system", "finetune-operator", name, clock)


async def gets_it(election: LeaderElection, seconds: float = 10.0) -> bool:
    """Within these seconds of a busy machine; who is expected not to get it is given less."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(election.acquire(), seconds)
    return election.leading


async def test_the_first_replica_leads_and_the_second_waits(fake):
    clock = Clock()
    first, second = replica(fake, "first", clock), replica(fake, "second", clock)
    assert not first.leading
    assert await gets_it(first)
    assert not await gets_it(second, 0.15)
    spec = fake[0].objects[LEASE]["spec"]
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("first", 15, 0)


async def test_of_many_that_start_together_one_leads(fake):
    clock = Clock()
    replicas = [replica(fake, f"r{number}", clock) for number in range(5)]
    assert sum(await asyncio.gather(*(gets_it(each, 1.0) for each in replicas))) == 1


async def test_a_silent_leader_is_followed_after_the_duration_that_the_follower_has_seen(fake):
    clock = Clock()
    first, second = replica(fake, "first", clock), replica(fake, "second", clock)
    assert await gets_it(first)
    clock.now += 600  # long before the second one came: it has seen nothing of that time
    assert not await gets_it(second, 0.15)
    clock.now += 14.9
    assert not await gets_it(second, 0.15)
    assert not first.leading, "the old leader has stopped acting before"
    clock.now += 0.2
    assert await gets_it(second)
    assert fake[0].objects[LEASE]["spec"]["leaseTransitions"] == 1


async def test_a_follower_that_has_looked_before_need_not_wait_from_anew(fake):
    clock = Clock()
    assert await gets_it(replica(fake, "first", clock))
    second, third = replica(fake, "second", clock), replica(fake, "third", clock)
    await second.look()
    clock.now += 15.1
    assert not await gets_it(third, 0.15), "this one sees it for the first time"
    assert await gets_it(second)


async def test_other_clocks_do_not_matter(fake):
    """The leader's clock is years ahead, or behind: its time stamps are never compared with ours."""
    clock = Clock()
    for stamp in ("1999-01-01T00:00:00.000000Z", "2099-01-01T00:00:00.000000Z"):
        spec = {"holderIdentity": "other", "leaseDurationSeconds": 15, "renewTime": stamp}
        fake[0].put(LEASE, {"spec": spec})
        election = replica(fake, "us", clock)
        assert not await gets_it(election, 0.15)
        clock.now += 16
        assert await gets_it(election)


async def test_a_renewing_leader_keeps_the_lease_for_ever(fake):
    clock = Clock()
    first, second = replica(fake, "first", clock), replica(fake, "second", clock)
    assert await gets_it(first)
    holding = asyncio.create_task(first.hold())
    for _ in range(20):
        clock.now += 5
        assert not await gets_it(second, 0.05)
    assert first.leading
    assert not holding.done()
    holding.cancel()


async def test_a_leader_that_cannot_renew_stops_before_another_can_begin(fake):
    clock = Clock()
    election = replica(fake, "first", clock)
    assert await gets_it(election)
    assert election.seconds_to_write() == pytest.approx(10)
    fake[0].refusals = [status(500, "InternalError", "etcd is away")] * 10_000
    holding = asyncio.create_task(election.hold())
    await asyncio.sleep(0.05)
    clock.now += 9.9
    await asyncio.sleep(0.05)
    assert election.leading
    assert election.seconds_to_write() == pytest.approx(5.1), "a write must end before the Lease can pass on"
    clock.now += 0.2
    assert not election.leading, "at once, not when hold() notices"
    with pytest.raises(UnavailableError):
        election.seconds_to_write()
    with pytest.raises(LeadershipLostError, match="etcd is away"):
        await asyncio.wait_for(holding, 1)


async def test_the_deadline_counts_from_before_the_renewal_was_sent(fake, monkeypatch):
    """Its answer may come late: the followers count from when the Lease changed, which was earlier."""
    clock = Clock()
    election = replica(fake, "first", clock)
    request = fake[1].request

    async def slow(method, *arguments, **options):
        answer = await request(method, *arguments, **options)
        clock.now += 3 if method == "POST" else 0
        return answer

    monkeypatch.setattr(fake[1], "request", slow)
    assert await gets_it(election)
    assert clock.now == 1003
    clock.now += 6.9
    assert election.leading
    clock.now += 0.2
    assert not election.leading


async def test_a_leader_whose_lease_was_taken_stops_at_once_and_does_not_take_it_back(fake):
    clock = Clock()
    election = replica(fake, "first", clock)
    assert await gets_it(election)
    holding = asyncio.create_task(election.hold())
    spec = fake[0].objects[LEASE]["spec"]
    fake[0].put(LEASE, {"spec": {**spec, "holderIdentity": "thief"}})
    with pytest.raises(LeadershipLostError, match="another replica"):
        await asyncio.wait_for(holding, 5)
    assert not election.leading
    assert fake[0].objects[LEASE]["spec"]["holderIdentity"] == "thief"


async def test_a_released_lease_passes_on_at_once(fake):
    clock = Clock()
    first, second = replica(fake, "first", clock), replica(fake, "second", clock)
    assert await gets_it(first)
    assert not await gets_it(second, 0.15)
    await first.release()
    assert not first.leading
    assert await gets_it(second)
    await first.release()
    assert fake[0].objects[LEASE]["spec"]["holderIdentity"] == "second", "who has not got it cannot release it"


async def test_a_restarted_container_of_the_same_pod_need_not_wait(fake):
    clock = Clock()
    assert await gets_it(replica(fake, "pod-1", clock))
    assert await gets_it(replica(fake, "pod-1", clock))


async def test_of_two_that_take_an_expired_lease_at_once_one_fails(fake, monkeypatch, caplog):
    """Both have read it as expired; the second to write must not believe that it holds it."""
    clock = Clock()
    fake[0].put(LEASE, {"spec": {"holderIdentity": "dead", "leaseDurationSeconds": 15}})
    first, second = replica(fake, "first", clock), replica(fake, "second", clock)
    await first.look()
    await second.look()
    clock.now += 16
    both_have_read = asyncio.Barrier(2)
    request = fake[1].request

    async def meet(method, *arguments, **options):
        if method == "PUT":
            with contextlib.suppress(asyncio.BrokenBarrierError):
                await both_have_read.wait()
                await both_have_read.abort()
        return await request(method, *arguments, **options)

    monkeypatch.setattr(fake[1], "request", meet)
    assert sorted(await asyncio.gather(gets_it(first, 1.0), gets_it(second, 1.0))) == [False, True]
    assert not [record for record in caplog.records if record.levelname == "WARNING"], "that is no trouble"


async def test_an_api_server_that_is_away_is_told_once_and_waited_for(fake, caplog):
    clock = Clock()
    fake[0].refusals = [status(403, "Forbidden", "leases is forbidden: User cannot create")] * 5
    assert await gets_it(replica(fake, "first", clock))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["The Lease system/finetune-operator: leases is forbidden: User cannot create"]
