"""Training in several processes: two nodes of this machine, each with its launcher, as two pods would run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Progress, Result
from finetune_api.spec import Task
from finetune_trainer.errors import Interrupted
from finetune_trainer.launch import End, judge
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import forward
from finetune_trainer.train.distributed import deal
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.models import save_tiny_gpt2
from tests.unit.trainer.training_workspace import (
    CLASSIFICATION_ROWS,
    GENERATION,
    make_training,
    untie,
    weigh,
    write_data,
)

STEPS = 48
TRAINING = {
    "epochs": None,
    "max_steps": STEPS,
    "checkpoint_steps": 8,
    "evaluation_steps": 1,  # so that every step has its line in the log
    "micro_batch_tokens": 30,
}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": GENERATION,
    "Full": {"method": "Full", "lora": None},
}
"""The first one draws dropout in its adapters, the second one in its encoder."""

TOLERANCE = 1e-4
TWO = {"device": {"nodes": 2}}


class Nodes:
    """Two launchers that run a plan, each with its own log, termination message and telemetry."""

    def __init__(self, plan: Plan, *, other_plan: Plan | None = None) -> None:
        self.folder = Path(plan.workspace)
        master, *self.ports = free_ports(3)
        self.processes = []
        for node, own in enumerate((plan, other_plan or plan)):
            plan_path, end = self.folder / f"plan-{node}.json", self.folder / f"end-{node}.json"
            plan_path.write_text(own.to_json())
            end.unlink(missing_ok=True)
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "FINETUNE_NODE_RANK": str(node),
                "FINETUNE_MASTER_ADDR": "127.0.0.1",
                "FINETUNE_MASTER_PORT": str(master),
                "FINETUNE_TELEMETRY_PORT": str(self.ports[node]),
                "FINETUNE_TERMINATION_LOG": str(end),
            }
            command = [sys.executable, "-m", "finetune_trainer", "train", "--plan", str(plan_path)]
            with (self.folder / f"log-{node}.txt").open("ab") as log:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self) -> list[int]:
        """The exit codes."""
        return [process.wait(timeout=90) for process in self.processes]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self.logs()
            time.sleep(0.02)

    def worker(self, node: int) -> int:
        pid = self.processes[node].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def result(self, node: int) -> Result:
        return Result.model_validate_json((self.folder / f"end-{node}.json").read_bytes())

    def progress(self, node: int) -> Progress | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[node]}/progress", timeout=5) as answer:
                return Progress.model_validate_json(answer.read())
        except OSError:
            return None

    def logs(self) -> str:
        return "\n".join((self.folder / f"log-{node}.txt").read_text()[-3000:] for node in range(2))


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def curve(plan: Plan) -> list[float]:
    """Training and evaluation loss of each step."""
    lines = map(json.loads, (Path(plan.workspace) / "report" / "training.jsonl").read_text().splitlines())
    return [line["trainingLoss"] if "trainingLoss" in line else line["evaluation"]["loss"] for line in lines]


def steps(plan: Plan) -> list[str]:
    return sorted(path.name for path in (Path(plan.workspace) / "checkpoints").glob("step-*"))


def saved(plan: Plan, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of that step or a later one is there."""
    return lambda: any(int(name.removeprefix("step-")) >= step for name in steps(plan))


def best(plan: Plan) -> dict[str, torch.Tensor]:
    return load_file(Path(plan.workspace) / "checkpoints" / "best" / "weights.safetensors")


def train_alone(plan: Plan, stop_at: int = -1) -> Result:
    telemetry = Telemetry(Stage.TRAIN, plan.job, None)
    update = telemetry.update

    def watch(**fields: Any) -> None:
        update(**fields)
        if fields.get("step") == stop_at:
            telemetry.stop_requested.set()

    telemetry.update = watch  # type: ignore[method-assign]
    return run(plan, telemetry)


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Plan, Plan]]:
    """The same job trained by one process and, in another workspace, by two; and what the two have shown."""
    folder, changes = tmp_path_factory.mktemp("trained"), {**METHODS[request.param], "training": TRAINING}
    one, two = make_training(folder / "one", **changes), make_training(folder / "two", **changes, **TWO)
    train_alone(one)
    with Nodes(two) as nodes:
        nodes.wait_until(saved(two, 8))
        served = [nodes.progress(node) for node in range(2)]
        assert nodes.wait() == [0, 0], nodes.logs()
        first, second = nodes.result(0), nodes.result(1)
    assert served[0] is not None and served[1] is None, "the first process speaks for all"
    assert first.train is not None and second.train is None
    assert first.outcome is second.outcome is Outcome.SUCCEEDED
    yield one, two


def test_two_processes_learn_what_one_learns(trained: tuple[Plan, Plan], tmp_path: Path) -> None:
    """One test, so that `pytest -n` trains each of them once."""
    one, two = trained
    assert len(curve(one)) == 2 * STEPS
    assert curve(two) == pytest.approx(curve(one), abs=TOLERANCE)
    assert curve(one)[-1] < curve(one)[1] - 10 * TOLERANCE, "it does learn"
    assert steps(two) == steps(one)
    for name, weight in best(one).items():
        torch.testing.assert_close(best(two)[name], weight, rtol=0, atol=TOLERANCE)

    # one process goes on with what two have saved
    shutil.copytree(Path(two.workspace) / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / steps(two)[-1])
    plan = make_training(tmp_path, **_changes(one))
    train_alone(plan)
    assert curve(plan) == pytest.approx(curve(one)[-16:], abs=TOLERANCE), "the last checkpoint but one is 8 steps older"
    for name, weight in best(one).items():
        torch.testing.assert_close(best(plan)[name], weight, rtol=0, atol=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize(("trained", "lost"), [("LoRA", "process"), ("Full", "pod")], indirect=["trained"])
def test_two_processes_that_lose_one_or_are_stopped_go_on_exactly(
    trained: tuple[Plan, Plan], lost: str, tmp_path: Path
) -> None:
    """SIGTERM to one node; then SIGKILL to a process of it, or to the other one as a whole: bit for bit as without."""
    _, whole = trained
    plan = make_training(tmp_path, **_changes(whole), **TWO)
    with Nodes(plan) as nodes:
        nodes.wait_until(saved(plan, 8))
        nodes.processes[1].send_signal(signal.SIGTERM)
        assert nodes.wait() == [75, 75], nodes.logs()
        results = [nodes.result(node) for node in range(2)]
    assert results[0] == results[1]
    assert results[0].step is not None and steps(plan)[-1] == f"step-{results[0].step:08d}"
    with Nodes(plan) as nodes:
        nodes.wait_until(saved(plan, results[0].step + 9))
        if lost == "process":
            os.kill(nodes.worker(1), signal.SIGKILL)
        else:
            nodes.processes[0].kill()  # its launcher, with which the kernel ends its worker
        assert nodes.wait() == ([75, 75] if lost == "process" else [-signal.SIGKILL, 75]), nodes.logs()
        assert nodes.result(1).reason is Reason.INTERRUPTED
    with Nodes(plan) as nodes:
        assert nodes.wait() == [0, 0], nodes.logs()
    expected, found = best(whole), best(plan)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert curve(plan)[-1] == curve(whole)[-1]


def _changes(plan: Plan) -> dict[str, Any]:
    name = "LoRA" if plan.task is Task.GENERATION else "Full"
    return {**METHODS[name], "training": TRAINING}


@pytest.mark.long
@pytest.mark.parametrize("trained", ["Full"], indirect=True)
def test_a_sharded_run_goes_on_with_another_number_of_processes(trained: tuple[Plan, Plan], tmp_path: Path) -> None:
    """Two processes, then one, then two again."""
    whole, _ = trained
    changes = _changes(whole)
    one, two = make_training(tmp_path, **changes), make_training(tmp_path, **changes, **TWO)
    with Nodes(two) as nodes:
        nodes.wait_until(saved(two, 16))
        nodes.processes[0].send_signal(signal.SIGTERM)
        assert nodes.wait() == [75, 75], nodes.logs()
    newest = tmp_path / "checkpoints" / steps(two)[-1]
    assert {path.name for path in newest.iterdir()} == {"shards", "training.pt", "state.json", "manifest.json"}
    (shard := min((newest / "shards").glob("__1_*"))).write_bytes(
        shard.read_bytes()[:-1]
    )  # costs the newest checkpoint
    with pytest.raises(Interrupted, match="stopped after step 36"):
        train_alone(one, stop_at=36)
    with Nodes(two) as nodes:
        assert nodes.wait() == [0, 0], nodes.logs()
    assert curve(two) == pytest.approx(curve(whole), abs=TOLERANCE)
    for name, weight in best(whole).items():
        torch.testing.assert_close(best(two)[name], weight, rtol=0, atol=TOLERANCE)


FULL = {"method": "Full", "lora": None}
KINDS: dict[str, dict[str, Any]] = {
    "Full": {**FULL, **GENERATION},
    "Full with an output layer of its own": {**FULL, **GENERATION},
    "Full of a GPT-2": {**FULL, **GENERATION},
    "Full with clipped gradients": {**FULL, **GENERATION, "training": {"max_grad_norm": 0.05}},
    "Full in one micro-batch": {**FULL, **GENERATION, "training": {"micro_batch_tokens": 10_000}},
    "Full with activations computed again": {**FULL, **GENERATION, "training": {"activation_checkpointing": True}},
    "a classifier with activations computed again": {**FULL, "training": {"activation_checkpointing": True}},
    "last layers in bf16": {**FULL, **GENERATION, "last_layers": 1, "training": {"precision": "bf16"}},
    "last layers of a classifier": {**FULL, "last_layers": 1},
    "head first, then all": {**FULL, "head_first": {"steps": 5, "learning_rate": 0.01}},
    "head first, then LoRA": {"head_first": {"steps": 5, "learning_rate": 0.01}},
    "Head": {"method": "Head", "lora": None},
    "Full with weights": FULL,
    "DoRA in bf16": {"lora": {"variant": "DoRA"}, "training": {"precision": "bf16"}},
    "LoRA in one micro-batch": {**GENERATION, "training": {"micro_batch_tokens": 10_000}},
    "LoRA, and one process runs out of memory": {
        **GENERATION,
        "lora": {"dropout": 0.0},  # which is drawn per micro-batch
        "training": {"micro_batch_tokens": 60},  # a pass for each of the two in most steps
    },
    "DPO": {
        **{"task": "Generation", "dpo": {"beta": 0.1}, "training": {"micro_batch_tokens": 60}},
        "evaluation": {"metrics": ["loss", "rewardAccuracy"]},
    },
}


@pytest.mark.long
def test_every_method_learns_in_two_processes_what_it_learns_in_one(tmp_path: Path, monkeypatch) -> None:
    """Logits come in chunks of three targets, which the backward pass computes anew."""
    plans: list[tuple[Plan, Plan]] = []
    for number, (kind, settings) in enumerate(KINDS.items()):
        training = {"checkpoint_steps": 6, "evaluation_steps": 1, "micro_batch_tokens": 30}
        changes = {**settings, "training": {**training, **settings.get("training", {})}}
        folders = [tmp_path / f"{number}-{name}" for name in ("one", "two")]
        if "GPT-2" in kind:
            for folder in folders:
                save_tiny_gpt2(folder / "model")
        plans.append((make_training(folders[0], **changes), make_training(folders[1], **changes, **TWO)))
        if "its own" in kind:
            for folder in folders:
                untie(Workspace(folder))
        if "weights" in kind:
            for folder in folders:
                weigh(Workspace(folder), [(1.0, 0.3, 0.0)[row % 3] for row in range(CLASSIFICATION_ROWS["train"])])
    paths = [tmp_path / f"{number}{'-short' if 'memory' in kind else ''}.json" for number, kind in enumerate(KINDS)]
    for path, (_, two) in zip(paths, plans, strict=True):
        path.write_text(two.to_json())
    logits = 4 * 320 * 3
    monkeypatch.setattr(forward, "LOGITS_BYTES", logits)
    environment = os.environ | {
        **{"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "test"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORTS": " ".join(map(str, free_ports(len(plans))))},
    }
    command = [sys.executable, "-m", "tests.unit.trainer.run_plans", str(logits), *map(str, paths)]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.DEVNULL) for rank in range(2)
    ]
    for one, _ in plans:
        train_alone(one)
    assert [process.wait(timeout=150) for process in processes] == [0, 0]
    for kind, (one, two) in zip(KINDS, plans, strict=True):
        assert curve(two) == pytest.approx(curve(one), abs=TOLERANCE), kind
        for name, weight in best(one).items():
            torch.testing.assert_close(best(two)[name], weight, rtol=0, atol=TOLERANCE, msg=kind)


def test_a_mistake_that_one_process_finds_is_final(tmp_path: Path) -> None:
    """The others only lost it, and would be tried again; the first code that is final ends the whole Job."""
    plan, other = make_training(tmp_path / "plan", **TWO), make_training(tmp_path / "other", **TWO)
    write_data(Workspace(tmp_path / "other"), Task.CLASSIFICATION, {"train": 0, "validation": 5})
    with Nodes(plan, other_plan=other) as nodes:
        assert nodes.wait() == [75, 64], nodes.logs()
        assert (nodes.result(0).outcome, nodes.result(0).reason) == (Outcome.INTERRUPTED, Reason.INTERRUPTED)
        assert nodes.result(1).reason is Reason.DATA_INVALID


def test_a_node_that_waits_for_the_others_stops_at_once(tmp_path: Path) -> None:
    with Nodes(make_training(tmp_path, **TWO)) as nodes:
        nodes.processes[1].kill()
        log = tmp_path / "log-0.txt"
        while "node 0 of 2" not in log.read_text():
            time.sleep(0.05)
        time.sleep(1)
        nodes.processes[0].send_signal(signal.SIGTERM)
        assert nodes.processes[0].wait(timeout=10) == 75
        assert "waited for each other" in nodes.result(0).message


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9))
def test_micro_batches_are_dealt_out_evenly(costs: list[int], processes: int) -> None:
    shares = deal(costs, processes)
    assert sorted(number for share in shares for number in share.numbers) == list(range(len(costs)))
    assert len({len(share.numbers) + share.idle for share in shares}) == 1
    assert min(share.idle for share in shares) == 0
    loads = [sum(costs[number] for number in share.numbers) for share in shares]
    assert max(loads) - min(loads) <= max(costs)


def end(code: int, reason: Reason | None = None, outcome: Outcome = Outcome.FAILED, step: int | None = None) -> End:
    return End(code=code, result=Result(stage=Stage.TRAIN, outcome=outcome, reason=reason, step=step))


DONE = end(0, outcome=Outcome.SUCCEEDED)
WRONG = end(64, Reason.DATA_INVALID)
BROKEN = end(1, Reason.STAGE_FAILED)
SAVED = end(75, Reason.INTERRUPTED, Outcome.INTERRUPTED, step=7)
LOST = end(75, Reason.INTERRUPTED, Outcome.INTERRUPTED)


@pytest.mark.parametrize(
    ("ends", "codes", "expected"),
    [
        ({0: DONE, 1: DONE}, {}, (0, None)),
        ({0: LOST, 1: BROKEN, 2: WRONG}, {0: 75, 1: 1, 2: 64}, (64, Reason.DATA_INVALID)),
        ({0: LOST, 1: BROKEN}, {0: 75, 1: 1}, (1, Reason.STAGE_FAILED)),
        ({0: LOST, 1: SAVED}, {0: 75, 1: 75}, (75, Reason.INTERRUPTED)),
        ({0: LOST}, {0: 75, 1: -9}, (75, Reason.INTERRUPTED)),
        ({}, {0: -9, 1: -9}, (75, Reason.INTERRUPTED)),
        ({0: LOST}, {0: 75, 1: -11}, (139, Reason.STAGE_FAILED)),
        ({0: LOST}, {0: 75, 1: -6}, (134, Reason.STAGE_FAILED)),
        ({0: LOST}, {0: 75, 1: 2}, (2, Reason.STAGE_FAILED)),
    ],
)
def test_a_node_ends_like_the_process_that_is_to_blame(
    ends: dict[int, End], codes: dict[int, int], expected: tuple[int, Reason | None]
) -> None:
    found = judge(ends, codes, max(2, len(ends)), out_of_memory=False, on_gpus=False)
    assert (found.code, found.result.reason) == expected


def test_a_node_that_ran_out_of_memory_says_so() -> None:
    found = judge({0: LOST}, {0: 75, 1: -9}, 2, out_of_memory=True, on_gpus=False)
    assert (found.code, found.result.reason) == (137, Reason.OOM_KILLED)
    assert "resources.limits.memory" in found.result.message


def test_what_tells_of_saved_steps_comes_first() -> None:
    assert judge({0: LOST, 1: SAVED}, {}, 2, out_of_memory=False, on_gpus=False).result.step == 7


def test_an_abort_on_gpus_is_the_loss_of_the_others() -> None:
    assert judge({0: LOST}, {0: 75, 1: -6}, 2, out_of_memory=False, on_gpus=True).code == 75
