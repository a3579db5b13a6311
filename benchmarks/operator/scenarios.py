"""What is measured. Each scenario makes its own nodes and jobs, and removes them."""

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_api.constants import Stage

from benchmarks.operator.fake_nodes import address_of, fake_nodes, make_stages
from benchmarks.operator.jobs import NAME, Jobs, job_name, namespace
from benchmarks.operator.subject import Requests, Subject, wait_until_idle
from benchmarks.operator.trainers import Trainers

MIB = 2**20
WHOLE_LIFE = {Stage.PREPARE: 5.0, Stage.TRAIN: 20.0, Stage.PUBLISH: 2.0}
TRAINING = {Stage.PREPARE: 1.0}
"""Seconds per stage; a stage that is not named does not end."""

TRAINERS = 200
STEADY_SECONDS = 60
POLL_SECONDS = 5.0
FILL_SECONDS = 600
"""The Job controller, too, needs minutes for a thousand pods: it makes 20 requests a second."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. `good` is whether it meets the target; None: there is no target."""

    what: str
    found: str
    target: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class World:
    """A namespace on fake nodes, and the operator that watches it."""

    jobs: Jobs
    subject: Subject

    async def wait_for_phases(self, **least: int) -> None:
        """Until at least so many jobs are in these phases."""
        end = time.monotonic() + FILL_SECONDS
        while True:
            phases = await self.subject.phases()
            if all(phases.get(phase, 0) >= number for phase, number in least.items()):
                return
            if time.monotonic() > end:
                raise TimeoutError(f"after {FILL_SECONDS} s the jobs are {phases}, not {least}")
            await asyncio.sleep(1)

    async def requests_while(self, seconds: float) -> Requests:
        before = await self.subject.requests()
        await asyncio.sleep(seconds)
        return await self.subject.requests() - before

    async def idle_writes(self) -> Figure:
        """Nobody else writes to these FineTuneJobs, so that each write is a change, or was none."""
        pairs = [(await self._status_writes(), self.jobs.changes)]
        while pairs[-1][0] != pairs[-1][1] and len(pairs) < 20:  # one of them may just be under way
            await asyncio.sleep(0.5)
            pairs.append((await self._status_writes(), self.jobs.changes))
        writes, changes = min(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        if changes > writes:
            raise RuntimeError("another operator writes to these jobs: end it, the figures are of both")
        return Figure("status writes without a change", f"{writes - changes} of {writes}", "0", writes == changes)

    async def _status_writes(self) -> int:
        requests = await self.subject.requests()
        found = (n for (_, resource, code), n in requests.items() if resource.endswith("/status") and code == "200")
        return sum(found)

    def memory(self) -> Figure:
        self.subject.note_memory()
        return below("peak memory of the operator", self.subject.peak_memory / MIB, 300, "MiB")


@asynccontextmanager
async def make_world(count: int, nodes: int, stages: str) -> AsyncIterator[World]:
    say(f"making {nodes} nodes and {count} volumes")
    with fake_nodes(nodes, stages), tempfile.TemporaryDirectory() as folder:
        async with namespace(count) as jobs:
            subject = Subject(NAME, Path(folder, "operator.log"))
            subject.start()
            try:
                await wait_until_idle(subject, 0, 60)
                say(f"applying {count} jobs")
                yield World(jobs, subject)
            finally:
                subject.kill()
                say("removing all of it")


async def arrival(count: int, nodes: int) -> list[Figure]:
    """Ten jobs a second, which live through all stages as fast as the cluster lets them."""
    async with make_world(count, nodes, make_stages(WHOLE_LIFE)) as here:
        cpu = await here.subject.cpu_seconds()
        await here.jobs.apply(range(count), per_second=10)
        await here.jobs.wait_until_acted_on(60)
        cpu = await here.subject.cpu_seconds() - cpu
        delays = here.jobs.delays()
        ended = (await here.subject.phases()).get("Succeeded", 0)
        return [
            below("applied to first child Job, median", at(delays, 0.5), 1, "s"),
            below("applied to first child Job, p99", at(delays, 0.99), 5, "s"),
            Figure("jobs that had succeeded when the last one was acted on", f"{ended}"),
            Figure("CPU time of the operator for each job until then", f"{cpu / count * 1000:.0f} ms"),
            here.memory(),
        ]


async def burst(count: int, nodes: int) -> list[Figure]:
    """All jobs at once; some train, the others prepare without an end. Then quiet, then a restart."""
    training = min(count, TRAINERS)
    stages = make_stages(TRAINING, [job_name(number) for number in range(training)])
    pods = Trainers([address_of(number) for number in range(count)], moving=False)
    async with pods.serve(), make_world(count, nodes, stages) as here:
        began, cpu = time.monotonic(), await here.subject.cpu_seconds()
        await here.jobs.apply(range(count))
        await here.jobs.wait_until_acted_on(300)
        delays = here.jobs.delays()
        last = max(here.jobs.acted_on.values()) - began
        cpu = await here.subject.cpu_seconds() - cpu
        say(f"all acted on after {last:.1f} s; waiting for their pods")
        await here.wait_for_phases(Training=training, Preparing=count - training)
        await asyncio.sleep(3 * POLL_SECONDS)  # until all trainers were asked
        say("quiet")
        quiet = await here.requests_while(STEADY_SECONDS)
        writes = await here.idle_writes()
        say("restart")
        here.subject.kill()
        killed = time.monotonic()
        here.subject.start()
        await wait_until_idle(here.subject, count, 120)
        restart = time.monotonic() - killed
        return [
            Figure("applied to first child Job, median", f"{at(delays, 0.5):.1f} s"),
            Figure("applied to first child Job, p99", f"{at(delays, 0.99):.1f} s"),
            below("all acted on", last, 30, "s"),
            Figure("CPU time of the operator for each job until then", f"{cpu / count * 1000:.0f} ms"),
            below(f"nothing new, {training} in training: API requests per second", per_second(quiet), 2),
            *breakdown(quiet),
            writes,
            below("from kill -9 to steady, another replica's Lease included", restart, 30, "s"),
            here.memory(),
        ]  # fmt: skip


async def trainers(count: int, nodes: int) -> list[Figure]:
    """That many trainers, each answer of which is news."""
    pods = Trainers([address_of(number) for number in range(count)], moving=True)
    async with pods.serve(), make_world(count, nodes, make_stages(TRAINING)) as here:
        await here.jobs.apply(range(count))
        await here.wait_for_phases(Training=count)
        await asyncio.sleep(2 * POLL_SECONDS)
        for trainer in pods.of.values():
            trainer.asked.clear()
        requests = await here.requests_while(STEADY_SECONDS)
        gaps = sorted(gap for trainer in pods.of.values() for gap in trainer.gaps())
        fewest, least = min(len(trainer.asked) for trainer in pods.of.values()), int(STEADY_SECONDS / POLL_SECONDS) - 1
        overlaps = sum(trainer.most_at_once > 1 for trainer in pods.of.values())
        return [
            Figure("time between two polls of one trainer, median", f"{at(gaps, 0.5):.1f} s"),
            below("time between two polls of one trainer, longest", gaps[-1], 2 * POLL_SECONDS, "s"),
            Figure(f"polls of one trainer in {STEADY_SECONDS} s, fewest", f"{fewest}", f">= {least}", fewest >= least),
            Figure("trainers that were asked while being asked", f"{overlaps}", "0", overlaps == 0),
            below("API requests per second", per_second(requests), 2),
            *breakdown(requests),
            await here.idle_writes(),
            here.memory(),
        ]


SCENARIOS = {
    "arrival": (arrival, 1000, "jobs, 10 a second"),
    "burst": (burst, 1000, "jobs at once"),
    "trainers": (trainers, TRAINERS, "trainers, all with news"),
}
"""Name -> what it does, with how many, and what they are."""


def per_second(requests: Requests) -> float:
    return requests.total() / STEADY_SECONDS


def breakdown(requests: Requests) -> list[Figure]:
    """Per second, without what there is less of than one in half a minute."""
    frequent = [(right, number / STEADY_SECONDS) for right, number in requests.most_common() if number > 2]
    return [Figure(f"... {verb} {resource}", f"{number:.2f}") for (verb, resource, _), number in frequent]


def below(what: str, value: float, limit: float, unit: str = "") -> Figure:
    return Figure(what, f"{value:.3g} {unit}".strip(), f"< {limit:g} {unit}".strip(), value < limit)


def at(ordered: list[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)
