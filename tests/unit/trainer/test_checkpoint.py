"""Checkpoints: whole or not there, and only of the same run."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_api.constants import Reason
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.train import checkpoint as module
from finetune_trainer.train.checkpoint import Best, Checkpoints, RunState, identify
from finetune_trainer.train.loop import make_optimizer

from tests.plans import make_plan


def checkpoints(folder: Path, fingerprint: str = "f" * 64, **changes: Any) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", identify(make_plan(folder, **changes), fingerprint))


def trained(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = make_optimizer(model, 0.01)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    noise = random.random() + np.random.rand()
    (model(torch.randn(8, 4)) + noise).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_steps(store: Checkpoints, *numbers: int) -> None:
    for number in numbers:
        model, optimizer = trained()
        store.save(model, optimizer, RunState(step=number))


def names(store: Checkpoints) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    model, optimizer = trained()
    state = RunState(step=3, evaluated_step=2, loss_sum=0.1 + 0.2, loss_targets=7, seconds=1.5)
    store.save(model, optimizer, state)
    step(model, optimizer)
    draws = (random.random(), float(np.random.rand()), float(torch.rand(())))

    again, other = trained(0)
    path = store.newest()
    assert path is not None
    assert store.load(path, again, other) == state
    step(again, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == draws


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save_steps(store, 10, 20, 30, 100)
    assert names(store) == ["step-00000030", "step-00000100"]
    assert store.newest() == store.folder / "step-00000100"


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).newest() is None


@pytest.mark.parametrize("file", ["weights.safetensors", "training.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, caplog, file: str, damage: str) -> None:
    store = checkpoints(tmp_path)
    save_steps(store, 10, 20)
    path = store.folder / "step-00000020" / file
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-10])
    else:
        path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    assert store.newest() == store.folder / "step-00000010"
    assert "step-00000020 is broken" in caplog.text
    assert names(store) == ["step-00000010"]


def test_without_a_whole_checkpoint_the_best_is_nobodys(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save_steps(store, 10)
    store.save_best(trained()[0], Best(step=10, score=0.5))
    (store.folder / "step-00000010" / "manifest.json").unlink()
    assert store.newest() is None
    assert store.best() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"learning_rate": 0.5}}, r"training\.learningRate was 0\.001 and is now 0\.5"),
        ({"training": {"epochs": None, "max_steps": 9}}, r"training\.maxSteps was None and is now 9"),
        ({"lora": {"rank": 8}}, r"method\.lora\.rank was 4 and is now 8"),
        ({"method": "Full"}, r"method\.type was LoRA and is now Full"),
        ({"model": {"revision": "b"}}, r"model\.revision was None and is now b"),
        ({"evaluation": {"metrics": ["loss"]}}, r"evaluation\.metrics"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_their_names(tmp_path: Path, changes, message: str) -> None:
    save_steps(checkpoints(tmp_path), 10)
    with pytest.raises(UserError, match=message) as caught:
        checkpoints(tmp_path, **changes).newest()
    assert caught.value.reason is Reason.INVALID_SPEC


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    save_steps(checkpoints(tmp_path), 10)
    with pytest.raises(UserError, match="the prepared data is not the same"):
        checkpoints(tmp_path, fingerprint="e" * 64).newest()


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    save_steps(checkpoints(tmp_path), 10)
    changes = {"training": {"checkpoint_steps": 3, "micro_batch_tokens": 64, "precision": None}}
    assert checkpoints(tmp_path, **changes).newest() is not None


def test_a_full_disk_costs_no_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = checkpoints(tmp_path)
    save_steps(store, 10, 20)

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_steps(store, 30)
    assert names(store) == ["step-00000010", "step-00000020"]


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save_steps(store, 10)
    shutil.copytree(store.folder / "step-00000010", store.folder / ".step-00000020.1234abcd")
    assert store.newest() == store.folder / "step-00000010"
    assert names(store) == ["step-00000010"]


def test_the_best_survives_a_kill_between_its_renames(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save_steps(store, 10)
    for number, leftover in ((20, ".best.new"), (10, ".best.old")):
        store.save_best(trained()[0], Best(step=number, score=number / 100))
        store.best_folder.rename(store.folder / leftover)
    (store.folder / ".best.cut").mkdir()
    assert store.newest() is not None
    assert store.best() == Best(step=10, score=0.1)
    assert names(store) == ["best", "step-00000010"]


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_best_that_is_damaged_is_not_published(tmp_path: Path, damage: str) -> None:
    store = checkpoints(tmp_path)
    model, _ = trained()
    store.save_best(model, Best(step=1, score=0.25))
    path = store.best_folder / "weights.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a number like any other
    if damage == "gone":
        path.unlink()
    with pytest.raises(StageError, match=r"best/weights\.safetensors is missing or damaged: delete"):
        store.load_best(model)


def test_the_better_one_takes_the_place_of_the_best(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    first, _ = trained(1)
    second, _ = trained(5)
    store.save_best(first, Best(step=1, score=0.25))
    store.save_best(second, Best(step=5, score=0.5))
    assert store.best() == Best(step=5, score=0.5)
    store.load_best(first)
    assert torch.equal(first[0].weight, second[0].weight)
    assert names(store) == ["best"]
