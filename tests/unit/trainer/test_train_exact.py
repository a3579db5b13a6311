"""A run that is killed, wherever it is, ends in the same weights bit for bit, with the same evidence."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import ExitCode, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Result
from finetune_trainer.errors import Interrupted
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import loop, reporting
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.run import run
from safetensors.torch import load_file

from tests.models import save_tiny_bloom
from tests.unit.trainer.deaths import CALLS, DEATHS, LOG, TERMINATION, Death, attempt
from tests.unit.trainer.training_workspace import GENERATION, PREFERENCE, make_training, stop_after

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.unit.trainer.deaths"])

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"lora": {"variant": "RsLoRA"}},
    "DoRA": {"lora": {"variant": "DoRA"}},
    "Full": {"method": "Full", "lora": None},
    "lastLayers": {"method": "Full", "lora": None, "last_layers": 1},
    "Head": {"method": "Head", "lora": None},
}
MODELS = {"encoder": {}, "packed decoder": GENERATION, "padded decoder": GENERATION, "pairs": PREFERENCE}
ROWS = {"train": 26, "validation": 9, "test": 7}
QUICK = [207, 27, 105, 162, 6, 206]
"""Seeds whose jobs and deaths together are of every kind, see `test_the_quick_seeds_are_of_every_kind`."""


@dataclass(frozen=True)
class Job:
    model: str
    method: str
    changes: dict[str, Any]

    @property
    def kinds(self) -> set[str]:
        """What there is of it, by names."""
        training = self.changes["training"]
        named = {name for name in ("batch_sequences", "batch_tokens", "early_stopping") if training[name]}
        return {self.model, self.method, training["precision"], *named} | self.changes.keys() & {"head_first"}

    def make(self, folder: Path) -> Plan:
        """The job in a workspace of its own, with dropout in the model and in the adapters."""
        folder.mkdir()
        if self.model == "padded decoder":
            save_tiny_bloom(folder / "model")
        plan = make_training(folder, ROWS, **self.changes)
        if self.model in ("packed decoder", "pairs"):
            config = folder / "model" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
        (folder / "plan.json").write_text(plan.to_json())
        return plan


def draw_job(chance: random.Random) -> Job:
    model = chance.choice(list(MODELS))
    method = chance.choice([name for name in METHODS if name != "Head" or model == "encoder"])
    by_tokens = chance.random() < 0.5
    training = {
        "seed": chance.randrange(1000),
        "epochs": chance.choice([1.5, 2.0]),
        "batch_sequences": None if by_tokens else chance.randint(3, 7),
        "batch_tokens": chance.randint(50, 100) if by_tokens else None,
        "micro_batch_tokens": chance.randint(20, 60),
        "precision": chance.choice(["fp32", "fp32", "bf16"]),
        "schedule": chance.choice(["Cosine", "Linear", "Constant"]),
        "checkpoint_steps": chance.choice([None, 1, 2, 3, 4, 5]),
        "evaluation_steps": chance.choice([1, 2, 3, 4, 5]),
        "early_stopping": {"patience": chance.randint(1, 3), "minimum_improvement": chance.choice([0.0, 1.0])}
        if chance.random() < 0.4
        else None,
    }
    changes = {"training": training, **METHODS[method], **MODELS[model]}
    if model == "encoder" and method != "Head" and chance.random() < 0.5:
        changes["head_first"] = {"epochs": chance.choice([0.5, 1.0]), "learning_rate": 0.01}
    return Job(model, method, changes)


def draw_deaths(chance: random.Random, calls: dict[str, int], number: int) -> tuple[Death, ...]:
    """A kill, a SIGTERM, or a SIGTERM whose grace period is over too soon; `calls` are those of a run in one go.

    The first attempts die early and where a run often is, so that something is left for later ones.
    """
    place = chance.choice([place for place, count in calls.items() if count > (3 if number < 3 else 0)])
    sign = chance.choice([signal.SIGKILL, signal.SIGTERM])
    deaths = [Death(sign, place, chance.randint(1, max(1, calls[place] // (2 + number))), chance.random() < 0.5)]
    if sign is signal.SIGTERM and chance.random() < 0.5:
        saving = ("a checkpoint", "weights to a file", "hash of a file", "fsync", "rename", "rmtree", "optimizer")
        deaths.append(Death(signal.SIGKILL, chance.choice(saving), chance.randint(1, 4), chance.random() < 0.5))
    return tuple(deaths)


def run_to_its_end(folder: Path, deaths: tuple[Death, ...] = (), sign: int = 0, after: float = 0) -> int:
    """One attempt of the job in `folder`, which gets a signal after so many seconds. Returns its exit code."""
    process = PROCESSES.Process(target=attempt, args=(folder, deaths))
    process.start()
    if sign:
        process.join(after)
        if process.exitcode is None:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(process.pid, sign)
    process.join()
    return process.exitcode


class Campaign:
    """A job and the same job that dies again and again, in two workspaces."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.job = draw_job(self.chance)
        self.whole, self.dying = folder / "whole", folder / "dying"
        for workspace in (self.whole, self.dying):
            self.job.make(workspace)
        self.deaths: list[str] = []
        """Of the second one: signal, and what the stage was at."""

    def run(self) -> None:
        started = time.monotonic()
        assert run_to_its_end(self.whole) == 0, log_of(self.whole)
        seconds = time.monotonic() - started
        calls = json.loads((self.whole / CALLS).read_text())
        for number in range(self.chance.randint(4, 7)):
            if self._attempt(number, calls, seconds):
                break
        else:
            assert run_to_its_end(self.dying) == 0, log_of(self.dying)
        planned = self.dying / DEATHS
        self.deaths += planned.read_text().splitlines() if planned.exists() else []

    def _attempt(self, number: int, calls: dict[str, int], seconds: float) -> bool:
        """Whether it came to its end."""
        safe = newest_step(self.dying)
        (self.dying / TERMINATION).unlink(missing_ok=True)
        if number and self.chance.random() < 0.3:
            sign = self.chance.choice([signal.SIGKILL, signal.SIGTERM])
            code = run_to_its_end(self.dying, (), sign, self.chance.uniform(0, seconds))
            if code:
                self.deaths.append(f"{sign.name} at a random moment")
        else:
            code = run_to_its_end(self.dying, draw_deaths(self.chance, calls, number))
        # SIGTERM before the stage has a handler for it ends the process at once
        assert code in (0, ExitCode.TRY_AGAIN, -signal.SIGKILL, -signal.SIGTERM), log_of(self.dying)
        if code == ExitCode.TRY_AGAIN:
            told = Result.model_validate_json((self.dying / TERMINATION).read_bytes())
            assert told.outcome is Outcome.INTERRUPTED
            assert not told.step or told.step == newest_step(self.dying), "the step that was told is safe"
        assert newest_step(self.dying) >= safe, "no death costs a checkpoint"
        return code == 0

    def check(self) -> None:
        assert_same_training(self.whole, self.dying)
        results = [Result.model_validate_json((w / TERMINATION).read_bytes()) for w in (self.whole, self.dying)]
        steady = {"train": {"tokens_per_second", "samples_per_second", "peak_memory_bytes"}}
        assert results[0].model_dump(exclude=steady) == results[1].model_dump(exclude=steady)
        left = [path.name for folder in ("checkpoints", "report") for path in (self.dying / folder).glob(".*")]
        assert not left, "what a death left halves of is cleaned up"


def assert_same_training(one: Path, other: Path) -> None:
    """Weights, optimizer, state, log and evidence in two workspaces are equal, but for how long it took."""
    assert newest_step(one) == newest_step(other) > 0
    newest = f"checkpoints/step-{newest_step(one):08d}"
    for folder in (newest, "checkpoints/best"):
        assert same(*(load_file(workspace / folder / "weights.safetensors") for workspace in (one, other)))
    states = [torch.load(w / newest / "training.pt", weights_only=True)["optimizer"] for w in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert all(same(state, states[1]["state"][key]) for key, state in states[0]["state"].items())
    for file in (f"{newest}/state.json", "checkpoints/best/best.json", "report/training.jsonl"):
        assert without_speed(one / file) == without_speed(other / file)
    assert (one / "report/evaluation.json").read_bytes() == (other / "report/evaluation.json").read_bytes()


def log_of(workspace: Path) -> str:
    return (workspace / LOG).read_text()[-3000:]


def newest_step(workspace: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in (workspace / "checkpoints").glob("step-*")), default=0)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_speed(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file."""
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("seconds", "tokensPerSecond")}
        for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the fork server, which starts with the first test: OpenMP's threads do not survive a fork."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def check_seed(folder: Path, seed: int) -> None:
    campaign = Campaign(folder, seed)
    started = time.monotonic()
    campaign.run()
    seconds = time.monotonic() - started
    print(
        f"\nseed {seed}, {seconds:.1f} s, {', '.join(sorted(campaign.job.kinds))}", *campaign.deaths, sep="\n  death: "
    )
    assert campaign.deaths
    campaign.check()


@pytest.mark.parametrize("seed", QUICK)
def test_a_run_that_dies_again_and_again_ends_in_the_same_weights(tmp_path: Path, seed: int) -> None:
    check_seed(tmp_path, seed)


def test_the_quick_seeds_are_of_every_kind() -> None:
    jobs = [draw_job(random.Random(seed)) for seed in QUICK]
    options = {"batch_sequences", "batch_tokens", "early_stopping", "head_first", "fp32", "bf16"}
    assert set().union(*(job.kinds for job in jobs)) == {*MODELS, *METHODS, *options}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1050))
def test_any_run_that_dies_again_and_again_ends_in_the_same_weights(tmp_path: Path, seed: int) -> None:
    check_seed(tmp_path, seed)


SAVES = {"training": {"checkpoint_steps": 3, "evaluation_steps": 4, "micro_batch_tokens": 30}}
"""44 rows, 8 per step, 2 epochs: 12 steps, checkpoints at 3 6 9 12, evaluations at 4 8 12."""


KINDS = {"classification": {}, "generation": GENERATION, "pairs": PREFERENCE}


def train(plan: Plan, telemetry: Telemetry | None = None) -> Result:
    return run(plan, telemetry or Telemetry(Stage.TRAIN, plan.job, 0))


@pytest.fixture(autouse=True)
def report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.0)


@pytest.fixture(scope="module", params=KINDS)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result, dict[str, Any]]:
    """A job that was run in one go: its workspace and result, and how to make the same job elsewhere."""
    changes = {**SAVES, **KINDS[request.param]}
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "REPORT_SECONDS", 0.0)
        return folder, train(make_training(folder, **changes)), changes


def test_a_stop_does_not_wait_for_the_end_of_a_step(whole, tmp_path: Path, monkeypatch) -> None:
    """SIGTERM arrives while step 6 has half of its gradients: they are dropped, and the run goes on exactly."""
    plan = make_training(tmp_path, **whole[2])
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    original, save = Forward.losses, Checkpoints.save
    gradients_at_save: list[int] = []
    inside = 0

    def losses(self, batch):
        nonlocal inside
        if torch.is_grad_enabled() and telemetry.progress.step == 5:
            inside += 1
            telemetry.stop_requested.set()
        return original(self, batch)

    def note(self, model, optimizer, state):
        gradients_at_save.append(sum(weight.grad is not None for weight in model.parameters()))
        save(self, model, optimizer, state)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "losses", losses)
        patch.setattr(Checkpoints, "save", note)
        with pytest.raises(Interrupted, match="stopped after step 5 of 12, which is saved") as interrupted:
            train(plan, telemetry)
    assert (interrupted.value.step, inside) == (5, 1)
    assert gradients_at_save == [0, 0]
    train(plan)
    assert_same_training(whole[0], tmp_path)


@pytest.mark.parametrize("broken", [None, "training.pt", "manifest.json"])
def test_what_a_death_left_costs_steps_and_no_bit(whole, tmp_path: Path, broken: str | None) -> None:
    """It came in the evaluation after step 8, which is saved; a later one broke the checkpoint, and lines of the log."""
    plan = make_training(tmp_path, **whole[2])
    with pytest.raises(Interrupted):
        train(plan, stop_after(plan, 8))
    if broken:
        (tmp_path / "checkpoints" / "step-00000008" / broken).write_bytes(b"broken")
    with (tmp_path / "report" / "training.jsonl").open("a") as log:
        log.write('{"step": 8, "evaluation": {"loss": 1.0}, "best": true}\n{"step": 9, "trai')
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    train(plan, telemetry)
    assert telemetry.progress.resumed_from_step == (6 if broken else 8)
    assert_same_training(whole[0], tmp_path)
    steps = [line["step"] for line in without_speed(tmp_path / "report/training.jsonl") if "trainingLoss" in line]
    assert steps == list(range(1, 13))


def test_a_finished_run_gives_its_result_again_without_training(whole, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result, changes = whole
    monkeypatch.setattr(loop.Loop, "run", lambda _: pytest.fail("it trains"))
    assert train(make_training(folder, **changes)) == result


def test_a_finished_training_without_its_result_is_evaluated_only(whole, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result, changes = whole
    report = folder / "report" / "evaluation.json"
    before = report.read_bytes()
    report.unlink()
    (folder / "checkpoints" / "result.json").unlink()
    monkeypatch.setattr(loop.Loop, "_step", lambda _: pytest.fail("it trains"))
    again = train(make_training(folder, **changes))
    assert report.read_bytes() == before
    assert again.model_copy(update={"train": None}) == result.model_copy(update={"train": None})
    assert again.train.scores == result.train.scores
    assert again.train.training_loss == result.train.training_loss


def test_a_best_that_is_gone_is_made_again(whole, tmp_path: Path) -> None:
    plan = make_training(tmp_path, **whole[2])
    train(plan)
    shutil.rmtree(tmp_path / "checkpoints" / "best")
    again = train(plan)
    assert again.train.best_step == 12
    assert again.train.training_loss == whole[1].train.training_loss
