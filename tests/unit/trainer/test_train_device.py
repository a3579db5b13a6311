"""The device: never CPU in silence, and bf16 that computes the same with less memory."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_api.constants import Reason
from finetune_api.plan import PlanDevice
from finetune_api.spec import Precision, Task
from finetune_trainer.data.store import open_split
from finetune_trainer.errors import UserError
from finetune_trainer.model.load import build_model, trainable_state
from finetune_trainer.train.device import Device, cast_frozen, choose_device
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.loop import accumulate_gradients
from finetune_trainer.train.micro_batches import Batching
from finetune_trainer.workspace import Workspace

from tests.unit.trainer.training_workspace import GENERATION, make_training, untie

BF16 = Device(torch.device("cpu"), Precision.BF16, "cpu")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
def test_a_missing_gpu_is_a_failure() -> None:
    with pytest.raises(UserError, match=r"resources\.gpus.*resources\.allowCpuFallback") as caught:
        choose_device(PlanDevice(gpus=1, nodes=1, allow_cpu_fallback=False), None)
    assert caught.value.reason is Reason.ACCELERATOR_MISSING


@pytest.mark.usefixtures("no_cuda")
def test_the_fallback_to_cpu_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        device = choose_device(PlanDevice(gpus=1, nodes=1, allow_cpu_fallback=True), None)
    assert (device.torch_device.type, device.precision) == ("cpu", Precision.FP32)
    assert "training on CPU" in caplog.text


@pytest.mark.parametrize("fallback", [False, True])
def test_fewer_gpus_than_asked_for_are_a_failure(monkeypatch: pytest.MonkeyPatch, fallback: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="asks for 2 GPUs on each node, but torch finds 1") as caught:
        choose_device(PlanDevice(gpus=2, nodes=1, allow_cpu_fallback=fallback), None, 1)
    assert caught.value.reason is Reason.ACCELERATOR_MISSING


def test_who_asks_for_no_gpu_trains_on_cpu(caplog: pytest.LogCaptureFixture) -> None:
    device = choose_device(PlanDevice(gpus=0, nodes=1, allow_cpu_fallback=False), Precision.BF16)
    assert (device.torch_device.type, device.precision, device.name) == ("cpu", Precision.BF16, "cpu")
    assert not caplog.text
    assert device.peak_memory() > 10_000_000


@pytest.mark.parametrize("changes", [{}, GENERATION], ids=["classification", "generation"])
def test_frozen_weights_in_bf16_change_no_bit_of_loss_or_gradient(tmp_path: Path, changes) -> None:
    plan = make_training(tmp_path, **changes)
    data = open_split(tmp_path / "data", "train")
    micro = [Batching(plan.task, False, 10_000, 0).read(data, np.arange(8))]
    results = []
    for cast in (False, True):
        model = build_model(plan, Workspace(tmp_path), ["a", "b", "c"] if plan.task is Task.CLASSIFICATION else None)
        if cast:
            cast_frozen(model, Precision.BF16)
        loss = accumulate_gradients(Forward(model.train(), plan.task), micro, BF16, [1, 0])
        results.append((float(loss), {n: w.grad for n, w in model.named_parameters() if w.requires_grad}, model))
    (loss, grads, _), (cast_loss, cast_grads, cast_model) = results
    assert loss == cast_loss
    assert all(torch.equal(grads[name], cast_grads[name]) for name in grads)
    assert {w.dtype for w in trainable_state(cast_model).values()} == {torch.float32}
    assert sum(w.dtype is torch.bfloat16 for w in cast_model.parameters()) >= 12


def test_an_adapted_output_layer_keeps_its_weights_too(tmp_path: Path) -> None:
    plan = make_training(tmp_path, lora={"target_modules": ["lm_head", "q_proj"]}, **GENERATION)
    untie(Workspace(tmp_path))
    model = build_model(plan, Workspace(tmp_path), None)
    cast_frozen(model, Precision.BF16)
    types = {name: weight.dtype for name, weight in model.named_parameters() if "base_layer" in name}
    assert types.pop("base_model.model.lm_head.base_layer.weight") is torch.float32
    assert set(types.values()) == {torch.bfloat16}


def test_a_layer_that_shares_the_embeddings_keeps_them_in_fp32(tmp_path: Path) -> None:
    plan = make_training(tmp_path, **GENERATION)
    model = build_model(plan, Workspace(tmp_path), None)
    model.other_head = torch.nn.Linear(32, 320, bias=False)
    model.other_head.weight = model.get_input_embeddings().weight
    cast_frozen(model, Precision.BF16)
    assert model.get_input_embeddings().weight.dtype is torch.float32


def test_fp32_casts_nothing(tmp_path: Path) -> None:
    plan = make_training(tmp_path)
    model = build_model(plan, Workspace(tmp_path), ["a", "b", "c"])
    cast_frozen(model, Precision.FP32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
