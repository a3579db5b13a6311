"""How a model is run: the same losses and gradients as its plain forward pass on padded rows, however a step is cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_api.spec import Precision, Task
from finetune_trainer.data.store import Rows, open_split
from finetune_trainer.model.load import build_model, trainable_state
from finetune_trainer.train import forward as forward_module
from finetune_trainer.train.device import Device
from finetune_trainer.train.forward import Forward, compile_blocks, prove
from finetune_trainer.train.linear import speed_up
from finetune_trainer.train.loop import accumulate_gradients
from finetune_trainer.train.micro_batches import Batching
from finetune_trainer.workspace import Workspace
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.unit.trainer.training_workspace import GENERATION, make_training

CPU = Device(torch.device("cpu"), Precision.FP32, "cpu")
NARROW = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = NARROW | {"intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
SMALL_HEADS = SMALL | {"head_dim": 8}
PACKING: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL_HEADS)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL_HEADS)),
    "gemma2, which caps scores and logits and has windows": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL_HEADS, final_logit_softcapping=0.1, sliding_window=3)
    ),
    "gemma3, which has windows": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL_HEADS, sliding_window=3)),
    "mistral, which has windows": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3)),
    "granite, which scales logits": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
    "cohere, which scales logits": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.5)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)),
    "opt, whose output layer cannot be run apart": lambda: OPTForCausalLM(
        OPTConfig(**NARROW, ffn_dim=64, word_embed_proj_dim=32)
    ),
}
PADDED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "its attention is not exchangeable": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)),
        "cannot be exchanged",
    ),
    "it has no attention": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2)),
        "linear attention",
    ),
    "it has sinks": (lambda: GptOssForCausalLM(GptOssConfig(**SMALL_HEADS, num_local_experts=4)), "s_aux"),
    "it attends in chunks": (
        lambda: Llama4ForCausalLM(Llama4TextConfig(**SMALL_HEADS, intermediate_size_mlp=64, num_local_experts=2)),
        "chunked attention",
    ),
}


def make(decoder: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = decoder()
    model.config.use_cache = False
    with torch.no_grad():
        for weight in model.parameters():  # far enough from its start for every part to matter
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("generation")
    make_training(folder, {"train": 24}, **GENERATION)
    return open_split(folder / "data", "train")


def plain_losses(model: torch.nn.Module, data: Rows, rows: np.ndarray) -> torch.Tensor:
    """As Hugging Face computes them: rows padded, all logits, labels shifted."""
    batch = Batching(Task.GENERATION, False, 10_000, 0).read(data, rows)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    supervised = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for place, row in enumerate(rows.tolist()):
        supervised[place, : data.lengths[row]] = torch.from_numpy(data.loss_mask(row))
    labels = torch.where(supervised, batch.input_ids, -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    return (difference / sum(float(expected[name].double().square().sum()) for name in expected)) ** 0.5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("decoder", PACKING)
def test_packed_and_accumulated_gradients_are_those_of_padded_execution(
    completions: Rows, decoder: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: torch.nn.Module = make(PACKING[decoder])
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    rows = np.arange(12)
    losses = plain_losses(model, completions, rows)
    supervised = losses[losses != 0]
    supervised.mean().backward()
    expected, loss = gradients_of(model), float(supervised.detach().double().sum())

    speed_up(model)
    forward = prove(model, Task.GENERATION, CPU)
    assert (forward.packs, forward.why_padded, forward.batching) == (True, None, "packed")
    monkeypatch.setattr(forward_module, "LOGITS_BYTES", 4 * 320 * 7)  # several chunks
    for tokens in (10_000, 60, 1):
        model.zero_grad()
        batching = Batching(Task.GENERATION, True, tokens, 0)
        micro = [batching.read(completions, group) for group in batching.cut(completions, rows)]
        assert float(accumulate_gradients(forward, micro, CPU, [1, 0])) == pytest.approx(loss, rel=1e-6)
        assert relative_error(gradients_of(model), expected) < 1e-5


@pytest.mark.parametrize("decoder", ["llama", "gemma2, which caps scores and logits and has windows"])
def test_compiled_blocks_give_the_same_and_are_few(completions: Rows, decoder: str) -> None:
    """Without kernels, which need a compiler of C++: what is tested is that other documents are no other graph."""
    model = make(PACKING[decoder]).eval()
    forward = prove(model, Task.GENERATION, CPU)
    batching = Batching(Task.GENERATION, True, 64, 0, in_buckets=True)
    batches = [batching.read(completions, group) for group in batching.cut(completions, np.arange(24))]
    expected = [forward.losses(batch).detach() for batch in batches]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(forward, backend="aot_eager")
    for batch, losses in zip(batches, expected, strict=True):
        found = forward.losses(batch)
        torch.testing.assert_close(found.detach(), losses)
        found.sum().backward()
    lengths = {batch.input_ids.shape[1] for batch in batches}
    assert len(batches) > 2 * len(lengths)
    # a block is cut at its attention into a few graphs; local and global layers differ
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8 * len(lengths)


@pytest.mark.parametrize("case", PADDED)
def test_a_model_that_cannot_pack_is_padded_and_says_why(completions: Rows, case: str) -> None:
    decoder, why = PADDED[case]
    model = make(decoder).eval()
    rows = np.arange(8)
    before = model.config._attn_implementation
    with torch.no_grad():
        losses = plain_losses(model, completions, rows)
    forward = prove(model, Task.GENERATION, CPU)
    assert not forward.packs
    assert why in (forward.why_padded or "")
    assert forward.batching == f"padded: {forward.why_padded}"
    assert model.config._attn_implementation == before
    batch = Batching(Task.GENERATION, False, 10_000, 0).read(completions, rows)
    with torch.no_grad():
        torch.testing.assert_close(forward.losses(batch), losses[losses != 0])


def test_documents_that_would_see_each_other_are_found_out() -> None:
    """Here a layer mixes neighbours beside its attention, which no name and no config tells."""
    model = make(PACKING["llama"])
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: own(hidden) + 0.1 * hidden.cumsum(1)
    forward = prove(model, Task.GENERATION, CPU)
    assert (forward.packs, forward.why_padded) == (False, "its documents would see each other")


def test_proving_leaves_no_trace() -> None:
    model = make(PACKING["llama"]).train()
    state = torch.get_rng_state()
    prove(model, Task.GENERATION, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


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
    forward = prove(model, plan.task, CPU)

    def run(batching: Batching) -> tuple[int, float, dict[str, torch.Tensor]]:
        model.zero_grad()
        micro = [batching.read(data, group) for group in batching.cut(data, np.arange(10, 26))]
        return len(micro), float(accumulate_gradients(forward, micro, CPU, [1, 0])), gradients_of(model)

    whole_cuts, whole_loss, whole = run(Batching(plan.task, forward.packs, 10_000, 0))
    assert whole_cuts == 1
    for most, padding in ((1, None), (25, None), (70, None), (70, 5)):
        cuts, loss, cut = run(Batching(plan.task, forward.packs, most, 0, padding))
        assert cuts > 1
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name in whole:
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-5, atol=1e-6)


def test_dropout_belongs_to_the_step_and_not_to_what_ran_before(tmp_path: Path) -> None:
    plan = make_training(tmp_path)
    forward = Forward(build_model(plan, Workspace(tmp_path), ["a", "b", "c"]).train(), plan.task)
    data = open_split(tmp_path / "data", "train")
    micro = [Batching(plan.task, False, 10_000, 0).read(data, np.arange(8))]
    first = float(accumulate_gradients(forward, micro, CPU, [1, 0]))
    torch.rand(100)
    assert float(accumulate_gradients(forward, micro, CPU, [1, 0])) == first
    assert float(accumulate_gradients(forward, micro, CPU, [1, 1])) != first
    assert float(accumulate_gradients(forward, micro, CPU, [2, 0])) != first
