"""Faults at random moments, on two replicas of the operator and a cluster that lives by itself, in virtual time.

While they last every change is judged (`tests.promises`); when they are over, every job ends without help.
"""

import asyncio
import copy
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from finetune_api.constants import JOB_LABEL, Phase
from finetune_operator.evidence import is_finished
from finetune_operator.observed import Manifest, Resource, has_ended, merge_patch
from finetune_operator.render.network import GUARD, TRANSFERS

from tests import virtual_time
from tests.fake_cluster import SPEC
from tests.played_cluster import PlayedCluster
from tests.played_operator import Replica, play
from tests.promises import Referee

NAMESPACE = "/namespaces/team"
RESOURCES = f"/apis/finetune-operator.io/v1alpha1{NAMESPACE}/finetunejobs"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/system/leases/finetune-operator"
FOREIGN_JOB = f"/apis/batch/v1{NAMESPACE}/jobs/clash-train"
POLICIES = f"/apis/networking.k8s.io/v1{NAMESPACE}/networkpolicies"
CHILDREN = ("jobs", "pods", "configmaps", "networkpolicies", "persistentvolumeclaims")
NAMES = ("one", "two", "three", "clash")

FAULTS_PER_JOB = 12
"""After so many another job arrives."""

QUIET_SECONDS = 120
LONGEST_RECOVERY = 3600


class Campaign:
    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.injected: Counter[str] = Counter()
        self.names: list[str] = []
        self._seed = seed
        self._monkeypatch = monkeypatch
        self._random = random.Random(seed)
        self._pending_edits: dict[str, Any] = {}
        self._excuses: Counter[str] = Counter()  # by FineTuneJob: what may make a stage that was done run again

    async def run(self, faults: int) -> None:
        random.seed(self._seed)
        self.referee = Referee()
        self.cluster = PlayedCluster(self.referee.saw)
        self.referee.cluster = self.cluster
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.referee.broken.append(f"{context['message']}: {context.get('exception')!r}")
        )
        play(self._monkeypatch, self.cluster)
        self.cluster.put(FOREIGN_JOB, {"metadata": {"labels": {}}, "spec": {"suspend": True, "template": {}}})
        self.replicas = [Replica(self.cluster, f"replica-{number}") for number in (1, 2)]
        for name in NAMES:
            self._submit(name)
        try:
            await self._inject(faults)
            await self._suspend_and_resume_all()
            await self._all_end()
            await self._nothing_begins_again()
        finally:
            for replica in self.replicas:
                replica.stop()

    def _submit(self, name: str) -> None:
        if name not in self.names:
            self.names.append(name)
        spec = {**copy.deepcopy(SPEC), "limits": {"retries": 10}}
        self.cluster.put(f"{RESOURCES}/{name}", {"metadata": {"name": name}, "spec": spec})

    # --- the course of it

    async def _inject(self, count: int) -> None:
        faults = [getattr(self, name) for name in dir(self) if name.startswith("fault_")]
        while self.injected.total() < count:
            await asyncio.sleep(self._random.expovariate(1 / 4))
            if self.injected.total() // FAULTS_PER_JOB > len(self.names) - len(NAMES):
                self._submit(f"late-{len(self.names)}")
            fault = self._random.choice(faults)
            if fault() is not False:
                self.injected[fault.__name__.removeprefix("fault_")] += 1
        await asyncio.sleep(60)
        self.cluster.errors.clear()
        self.cluster.lost_answers = 0

    async def _suspend_and_resume_all(self) -> None:
        self._edit_all(suspend=True)
        await asyncio.sleep(QUIET_SECONDS)
        for name, resource in self._resources().items():
            if not is_finished(resource.status):
                assert resource.status.phase is Phase.SUSPENDED, f"{name}: {resource.status}"
        assert not [path for path, pod in self.cluster.pods() if pod["status"]["phase"] in ("Pending", "Running")]
        for path, job in self._children(["jobs"]):
            if not has_ended(job):
                needed = {GUARD} if path.endswith("-train") else {GUARD, TRANSFERS}
                assert {f"{POLICIES}/{name}" for name in needed} <= self.cluster.objects.keys(), f"{path} is exposed"
        self._edit_all(suspend=False)

    async def _all_end(self) -> None:
        for _ in range(LONGEST_RECOVERY // 10):
            await asyncio.sleep(10)
            if all(is_finished(resource.status) for resource in self._resources().values()):
                break
        for name, resource in self._resources().items():
            status = resource.status
            assert is_finished(status), f"{name} has not ended: {status}"
            if name == "clash":
                assert status.failure is not None and status.failure.reason in ("NameClash", "StageFailed"), status
            elif resource.uid not in self.referee.gave_up:
                assert status.phase is Phase.SUCCEEDED, f"{name} has failed for no reason: {status}"
        for workspace in self.cluster.workspaces.values():
            for stage, times in workspace.completions.items():
                words = f"{stage} of {workspace.job} was done {times} times: a result was lost"
                assert times <= 1 + self._excuses[workspace.job], words
        assert self.cluster.objects[FOREIGN_JOB]["spec"] == {"suspend": True, "template": {}}

    async def _nothing_begins_again(self) -> None:
        await asyncio.sleep(QUIET_SECONDS)
        before, writes = self._resources(), self.referee.status_writes
        for path, _ in self._children(CHILDREN):
            self.cluster.delete(path)
        await asyncio.sleep(QUIET_SECONDS * 3)
        assert self._resources() == before
        assert self.referee.status_writes == writes
        assert not self._children(["jobs", "pods"])

    def _resources(self) -> dict[str, Resource]:
        bodies = self.cluster.objects.items()
        return {body["metadata"]["name"]: Resource.read(body) for path, body in bodies if path.startswith(RESOURCES)}

    def _children(self, kinds: Sequence[str]) -> list[tuple[str, Manifest]]:
        objects = self.cluster.objects.items()
        return [(path, body) for path, body in objects if path != FOREIGN_JOB and path.split("/")[-2] in kinds]

    def _edit_all(self, **spec: Any) -> None:
        for name in self.names:
            self._edit(name, spec)

    def _edit(self, name: str, spec: Manifest) -> None:
        path = f"{RESOURCES}/{name}"
        body = self.cluster.objects[path]
        self.cluster.put(path, {**body, "spec": {**body["spec"], **spec}})

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self.cluster.schedule(seconds, act)

    # --- faults: the operator's own

    def fault_kill(self) -> None:
        self._random.choice(self.replicas).kill()

    def fault_kill_both(self) -> None:
        for replica in self.replicas:
            replica.kill()

    def fault_lease_moved(self) -> bool | None:
        lease = self.cluster.objects.get(LEASE)
        if lease is None:
            return False
        holder = self._random.choice(["replica-1", "replica-2", "nobody that we know"])
        self.cluster.put(LEASE, {**lease, "spec": {**lease["spec"], "holderIdentity": holder}})
        return None

    def fault_lease_deleted(self) -> bool | None:
        return None if LEASE in self.cluster.objects and self.cluster.remove(LEASE) else False

    def fault_clock(self) -> None:
        hours = self._random.choice([0.0, 0.001, 0.05, 2.0, 12.0])
        self._random.choice(self.replicas).skew[0] = self._random.choice([-1, 1]) * hours * 3600

    # --- the API server's

    def fault_server_restarted(self) -> None:
        self.cluster.is_down = True
        self.cluster.break_watches()

        def back() -> None:
            self.cluster.is_down = False

        self._later(self._random.uniform(1, 25), back)

    def fault_watches_broken(self) -> None:
        self.cluster.break_watches()

    def fault_watches_too_old(self) -> None:
        self.cluster.break_watches(too_old=True)

    def fault_watches_silent(self) -> None:
        for stream in self.cluster.streams:
            stream.deaf = self._random.random() < 0.5

    def fault_errors(self) -> None:
        codes = [409, 429, 500, 503, 504]
        self.cluster.errors = [self._random.choice(codes) for _ in range(self._random.randrange(1, 20))]

    def fault_answers_lost(self) -> None:
        self.cluster.lost_answers = self._random.randrange(1, 8)

    def fault_slow(self) -> None:
        self.cluster.slowness = self._random.choice([20, 100, 300])

        def fast() -> None:
            self.cluster.slowness = 1.0

        self._later(self._random.uniform(5, 40), fast)

    # --- somebody's hand

    def fault_child_deleted(self) -> bool | None:
        children = self._children(CHILDREN)
        if not children:
            return False
        path, body = self._random.choice(children)
        self._excuses[body["metadata"]["labels"].get(JOB_LABEL, "of all jobs")] += 1
        how = self._random.choice(["background", "foreground", "force"])
        if how == "foreground" and "/jobs/" in path:
            gone = {**body["metadata"], "deletionTimestamp": self.cluster.now()}
            self.cluster.put(path, {**body, "metadata": gone})
        else:
            self.cluster.delete(path, force=how == "force")
        return None

    def fault_status_edited(self) -> bool | None:
        name = self._random.choice(self.names)
        path = f"{RESOURCES}/{name}"
        body = self.cluster.objects[path]
        status = body.get("status") or {}
        if self._pending_edits.get(path) == status:
            return False  # nobody has answered to the last one yet: together they might prove what never was
        moment = self._random.choice(["9999-12-31T23:59:59Z", "2026-99-99T99:99:99Z", "1970-01-01T00:00:00Z"])
        change: Manifest = self._random.choice([
            {"phase": self._random.choice(list(Phase)).value},
            {self._random.choice(sorted(status) or ["phase"]): None},
            {"startTime": moment},
            {"progress": {"percentage": 100, "step": 10**6, "lastUpdatedTime": moment}},
            {"progress": {"percentage": 0, "step": 0, "lastUpdatedTime": moment}},
            {"attempt": 77, "message": "by hand", "metric": "loss=0", "observedGeneration": 10**6},
        ])  # fmt: skip
        self._excuses[name] += 1
        edited = self.cluster.put(path, {**body, "status": merge_patch(status, change)})
        self._pending_edits[path] = edited["status"]
        return None

    def fault_suspended_for_a_while(self) -> None:
        name = self._random.choice(self.names)
        self._edit(name, {"suspend": True})
        self._later(self._random.uniform(0.1, 40), lambda: self._edit(name, {"suspend": False}))

    def fault_deleted_and_made_anew(self) -> bool | None:
        if self._random.random() < 0.7:
            return False
        name = self._random.choice(self.names)
        self.cluster.remove(f"{RESOURCES}/{name}")
        self._submit(name)
        return None

    # --- the world's

    def fault_trainer_killed(self) -> bool | None:
        if not self.cluster.trainers:
            return False
        self.cluster.kill_trainer(self._random.choice(list(self.cluster.trainers)), self._random.choice([1, 137]))
        return None

    def fault_node_drained(self) -> bool | None:
        running = [path for path, pod in self.cluster.pods() if pod["metadata"]["uid"] in self.cluster.trainers]
        return self.cluster.drain(self._random.choice(running)) if running else False


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "finetune_operator")


def campaign(seed: int, faults: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Raises AssertionError with the seed if a promise is broken."""
    run = Campaign(seed, monkeypatch)
    virtual_time.run(run.run(faults))
    assert not run.referee.broken, f"seed {seed}:\n" + "\n".join(run.referee.broken)
    return run.injected


@pytest.mark.parametrize("seed", range(8))
def test_faults_break_no_promise(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert campaign(seed, 30, monkeypatch).total() >= 30


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_very_many_faults_break_no_promise(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign(seed, 100, monkeypatch)
