"""What is promised of a job holds in any order of what may happen to it."""

import copy
from collections.abc import Coroutine
from typing import Any

import pytest
from finetune_api.constants import Phase, Reason, Stage
from finetune_api.progress import Outcome, Result
from finetune_operator.kueue import is_queued
from finetune_operator.observed import index_of, is_leaving, nodes_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fake_cluster import SPEC, FakeCluster, success


class Life(RuleBasedStateMachine):
    """Any order of the world's moves, with or without a reconcile in between: the promises hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster(copy.deepcopy(SPEC))
        self.highest: tuple[str, int | None, int] = ("", None, 0)
        self.final: str | None = None
        self.lost = 0
        """How often pods were taken away, in whatever way: no more disruptions may be told."""

    def _current(self) -> Stage | None:
        active = [stage for stage, job in self.cluster.jobs.items() if not job["status"].get("conditions")]
        return active[0] if active else None

    def _running(self) -> list[int]:
        """The nodes of the current stage that have a running pod."""
        pods = self.cluster.pods.get(self._current(), [])
        return [index_of(pod) for pod in pods if pod["status"]["phase"] == "Running"]

    def _nodes(self) -> int:
        stage = self._current()
        return nodes_of(self.cluster.jobs[stage]) if stage else 0

    @initialize(nodes=st.sampled_from([1, 2, 3]), queue=st.booleans())
    def user_submits(self, nodes: int, queue: bool) -> None:
        self.cluster.edit(resources={"gpus": 1, "nodes": nodes}, workspace={"claimName": "team"})
        if queue:
            self.cluster.edit(scheduling={"queueName": "gpus"})

    @rule(seconds=st.sampled_from([1, 3000]))
    def reconcile(self, seconds: float) -> None:
        present = {index_of(pod) for pod in self.cluster.pods.get(self._current(), [])}
        is_whole = self._running() and len(present) == self._nodes()
        _run(self.cluster.turn(seconds))
        if self._current() and (self.cluster.condition("Running") or ("False", ""))[0] == "True":
            assert is_whole, "no node is missing"
        if not self.cluster.body["spec"].get("suspend"):
            assert self.cluster.status.phase is not Phase.SUSPENDED

    @rule()
    @precondition(lambda self: len(self._running()) < self._nodes())
    def pod_starts(self) -> None:
        stage = self._current()
        assert stage is not None
        held = self.cluster.jobs[stage]["spec"].get("suspend") or any(map(is_leaving, self.cluster.pods.get(stage, [])))
        if not held:
            self.cluster.start(stage, min(set(range(self._nodes())) - set(self._running())))

    @rule(fraction=st.floats(0, 1))
    @precondition(lambda self: self._running())
    def pod_speaks(self, fraction: float) -> None:
        stage = self._current()
        assert stage is not None
        self.cluster.say(stage, fraction=fraction, step=int(fraction * 66), total_steps=66)

    @rule()
    @precondition(lambda self: self._running() and len(self._running()) == self._nodes())
    def pods_succeed(self) -> None:
        stage = self._current()
        assert stage is not None
        for node in range(1, self._nodes()):
            self.cluster.finish_pod(stage, Result(stage=stage, outcome=Outcome.SUCCEEDED), node)
        self.cluster.finish(stage, success(stage))

    @rule(reason=st.sampled_from(["EvictionByEvictionAPI", "PreemptionByScheduler", "DeletionByPodGC"]))
    @precondition(lambda self: self._running())
    def pod_is_disrupted(self, reason: str) -> None:
        self.lost += 1
        self.cluster.disrupt(self._current(), reason, node=self._running()[-1])

    @rule(held=st.booleans())
    @precondition(lambda self: self._current() is Stage.TRAIN)
    def queue_decides(self, held: bool) -> None:
        job = self.cluster.jobs[Stage.TRAIN]
        if is_queued(job):
            self.lost += held
            job["spec"]["suspend"] = held

    @rule()
    @precondition(lambda self: self._current())
    def leaving_pods_go(self) -> None:
        stage = self._current()
        suspended = self.cluster.jobs[stage]["spec"].get("suspend")
        pods = self.cluster.pods.get(stage, [])
        self.cluster.pods[stage] = [pod for pod in pods if not is_leaving(pod) and not suspended]

    @rule(code=st.sampled_from([1, 64, 75, 137]), final=st.booleans())
    @precondition(lambda self: self._running())
    def pod_fails(self, code: int, final: bool) -> None:
        stage = self._current()
        assert stage is not None
        self.lost += 1
        said = Result(stage=stage, outcome=Outcome.FAILED, reason=Reason.STAGE_FAILED, message="broken")
        self.cluster.crash(stage, code, said=said, final=final, node=self._running()[-1])

    @rule(suspend=st.booleans())
    def user_suspends(self, suspend: bool) -> None:
        self.cluster.edit(suspend=suspend)

    @rule(stage=st.sampled_from(list(Stage)))
    def somebody_deletes_a_job(self, stage: Stage) -> None:
        self.lost += 1
        self.cluster.jobs.pop(stage, None)
        self.cluster.pods.pop(stage, None)

    @rule(stage=st.sampled_from(list(Stage)))
    def pods_are_cleaned_up(self, stage: Stage) -> None:
        self.lost += 1
        self.cluster.pods[stage] = [p for p in self.cluster.pods.get(stage, []) if p["status"]["phase"] == "Running"]

    @invariant()
    def what_is_lost_is_counted_once(self) -> None:
        status = self.cluster.status
        assert (status.disruptions or 0) <= self.lost
        if status.disruptions:
            assert status.last_interruption is not None

    @invariant()
    def one_stage_at_a_time(self) -> None:
        active = [stage for stage, job in self.cluster.jobs.items() if not job["status"].get("conditions")]
        assert len(active) <= 1

    @invariant()
    def a_terminal_phase_is_final(self) -> None:
        phase = self.cluster.status.phase
        if self.final is not None:
            assert phase == self.final
        elif phase is not None and phase.finished:
            self.final = phase

    @invariant()
    def the_phase_fits_the_conditions(self) -> None:
        phase = self.cluster.status.phase
        if phase is Phase.SUCCEEDED:
            assert self.cluster.condition("Complete") == ("True", "Succeeded")
            assert self.cluster.status.progress is not None and self.cluster.status.progress.percentage == 100
        elif phase is Phase.FAILED:
            failed = self.cluster.condition("Failed")
            assert failed is not None and failed[0] == "True" and self.cluster.status.failure is not None
        elif self.cluster.status.progress is not None:
            assert self.cluster.status.progress.percentage < 100


def _run(coroutine: Coroutine[Any, Any, object]) -> None:
    """The fake never waits, so its coroutines end at the first step."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def live(lives: int, moves: int) -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=lives, stateful_step_count=moves, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_promises_hold_in_any_order_of_events() -> None:
    live(60, 40)


@pytest.mark.long
def test_promises_hold_in_very_many_lives() -> None:
    live(2000, 60)
