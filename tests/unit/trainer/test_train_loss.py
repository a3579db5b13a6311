"""The loss: the same however a step is cut, and the same as that of all logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_api.spec import Precision, Task
from finetune_trainer.data.store import Rows, open_split
from finetune_trainer.model.load import build_model, trainable_state
from finetune_trainer.train.batches import collate, micro_batches
from finetune_trainer.train.device import Device
from finetune_trainer.train.loop import accumulate_gradients
from finetune_trainer.train.loss import predict
from finetune_trainer.workspace import Workspace
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.unit.trainer.training_workspace import GENERATION, make_training

CPU = Device(torch.device("cpu"), Precision.FP32, "cpu")
SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gemma2, which caps logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.1)
    ),
    "granite, which scales logits": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("generation")
    make_training(folder, {"train": 24}, **GENERATION)
    return open_split(folder / "data", "train")


def gradients(model: torch.nn.Module, data: Rows, rows: np.ndarray, most_tokens: int, task: Task):
    model.zero_grad()
    groups = micro_batches(rows, data.lengths, most_tokens)
    loss = accumulate_gradients(model, [collate(data, g, 0, task) for g in groups], CPU, [1, 0])
    return (
        len(groups),
        float(loss),
        {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None},
    )


@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("changes", [{}, GENERATION], ids=["classification", "generation"])
def test_loss_and_gradients_do_not_depend_on_the_size_of_a_micro_batch(tmp_path: Path, method: str, changes) -> None:
    plan = make_training(tmp_path, method=method, **changes)
    labels = ["a", "b", "c"] if plan.task is Task.CLASSIFICATION else None
    model = build_model(plan, Workspace(tmp_path), labels).eval()  # without dropout, which is drawn per micro-batch
    with torch.no_grad():
        for weight in trainable_state(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    data = open_split(tmp_path / "data", "train")
    rows = np.arange(10, 26)
    whole_cuts, whole_loss, whole = gradients(model, data, rows, 10_000, plan.task)
    assert whole_cuts == 1
    for most in (1, 25, 70):
        cuts, loss, cut = gradients(model, data, rows, most, plan.task)
        assert cuts > 1
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_at_supervised_positions_are_the_models_own(completions: Rows, decoder: str) -> None:
    torch.manual_seed(0)
    model = DECODERS[decoder]().eval()
    batch = collate(completions, np.arange(8), 0, Task.GENERATION)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    supervised = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for row in range(8):
        supervised[row, : completions.lengths[row]] = torch.from_numpy(completions.loss_mask(row))
    labels = torch.where(supervised, batch.input_ids, -100)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    predictions = predict(model, batch)
    assert predictions.logits.shape == (int(supervised[:, 1:].sum()), 320)
    torch.testing.assert_close(predictions.losses().mean(), expected)
    assert model(input_ids=batch.input_ids).logits.shape == (*batch.input_ids.shape, 320)  # nothing of it is left


def test_a_model_that_does_not_call_its_output_layer_works_too(completions: Rows) -> None:
    torch.manual_seed(0)
    model = DECODERS["llama"]().eval()
    batch = collate(completions, np.arange(8), 0, Task.GENERATION)
    expected = predict(model, batch).losses()
    layer, weight = model.lm_head, model.lm_head.weight
    layer.forward = None  # whoever calls it fails
    model.get_output_embeddings = lambda: None
    model.forward = lambda input_ids, attention_mask: type(
        "Output", (), {"logits": model.model(input_ids, attention_mask).last_hidden_state @ weight.T}
    )
    torch.testing.assert_close(predict(model, batch).losses(), expected)


def test_dropout_belongs_to_the_step_and_not_to_what_ran_before(tmp_path: Path) -> None:
    plan = make_training(tmp_path)
    model = build_model(plan, Workspace(tmp_path), ["a", "b", "c"]).train()
    data = open_split(tmp_path / "data", "train")
    micro = [collate(data, np.arange(8), 0, Task.CLASSIFICATION)]
    first = float(accumulate_gradients(model, micro, CPU, [1, 0]))
    torch.rand(100)
    assert float(accumulate_gradients(model, micro, CPU, [1, 0])) == first
    assert float(accumulate_gradients(model, micro, CPU, [1, 1])) != first
    assert float(accumulate_gradients(model, micro, CPU, [2, 0])) != first
