"""The facts for the memory plan: found on a model without weights, the same as on one that has them."""

import resource
from pathlib import Path

import pytest
import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan
from finetune_api.spec import Precision, Task
from finetune_api.status import ActivationStatus, ModelStatus
from finetune_trainer.errors import UserError
from finetune_trainer.model.adapters import apply_method, training_mode
from finetune_trainer.model.facts import load_config, read_facts
from finetune_trainer.model.load import build_model, build_skeleton
from finetune_trainer.train.device import cast_frozen
from finetune_trainer.train.footprint import add_footprint, measure_activations
from finetune_trainer.workspace import Workspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.models import save_tiny_bert, save_tiny_gpt2, save_tiny_llama
from tests.plans import make_plan

GENERATION = {"task": "Generation", "evaluation": {"metrics": ["loss"]}}
FULL = {"method": "Full", "lora": None}
GPU = {"device": {"gpus": 1}, "training": {"precision": None}}
LABELS = ["a", "b", "c"]


def labels_of(plan: Plan) -> list[str] | None:
    return LABELS if plan.task is Task.CLASSIFICATION else None


def facts_of(plan: Plan) -> ModelStatus:
    workspace = Workspace(Path(plan.workspace))
    facts = read_facts(workspace.model, load_config(workspace.model, trust_remote_code=False))
    return add_footprint(facts, lambda: build_skeleton(plan, workspace, labels_of(plan)), plan)


def kept_bytes(model: torch.nn.Module, tokens: int, precision: Precision) -> int:
    """What a real pass of the transformer saves for its backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor

    encoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BF16):
        output = encoder(input_ids=torch.full((1, tokens), 7))
        del output
        return sum(storage.nbytes() for storage in seen.values())


def predicted(activations: ActivationStatus, tokens: int) -> int:
    per_row = activations.bytes_per_token * tokens + activations.bytes_per_token_pair * tokens**2
    return activations.fixed_bytes + per_row


CASES = {
    "classification": (save_tiny_bert, {}),
    "classification, full": (save_tiny_bert, FULL),
    "generation": (save_tiny_llama, GENERATION),
    "generation, full": (save_tiny_llama, GENERATION | FULL),
    "generation, last layer": (save_tiny_llama, GENERATION | FULL | {"last_layers": 1}),
    "generation, DoRA with dropout": (save_tiny_llama, GENERATION | {"lora": {"variant": "DoRA", "dropout": 0.1}}),
    "generation, bf16": (save_tiny_llama, GENERATION | {"training": {"precision": "bf16"}}),
    "full in bf16": (save_tiny_llama, GENERATION | FULL | {"training": {"precision": "bf16"}}),
    "transposed layers": (save_tiny_gpt2, GENERATION),
}


@pytest.mark.parametrize("case", CASES)
def test_the_activations_are_those_of_a_real_pass(tmp_path: Path, case: str) -> None:
    save, changes = CASES[case]
    plan, workspace = make_plan(tmp_path, **changes), Workspace(tmp_path)
    save(workspace.model)
    activations = facts_of(plan).activations
    assert activations is not None and activations.precision is plan.training.precision
    model = build_model(plan, workspace, labels_of(plan))
    cast_frozen(model, activations.precision)
    training_mode(model, head_only=False)
    for tokens in (50, 100):
        assert predicted(activations, tokens) == pytest.approx(
            kept_bytes(model, tokens, activations.precision), rel=0.02
        )


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_counted_as_training_has_them(tmp_path: Path, case: str) -> None:
    save, changes = CASES[case]
    plan, workspace = make_plan(tmp_path, **changes), Workspace(tmp_path)
    save(workspace.model)
    facts, model = facts_of(plan), build_model(plan, workspace, labels_of(plan))
    assert facts.trainable_parameters == sum(w.numel() for w in model.parameters() if w.requires_grad) > 0
    assert facts.frozen_parameters == sum(w.numel() for w in model.parameters() if not w.requires_grad)
    cast_frozen(model, Precision.BF16)
    assert facts.frozen_linear_parameters == sum(w.numel() for w in model.parameters() if w.dtype is torch.bfloat16)
    assert facts.supports_checkpointing is True


def test_head_tuning_keeps_nothing_of_the_frozen_encoder(tmp_path: Path) -> None:
    save_tiny_bert(Workspace(tmp_path).model)
    activations = facts_of(make_plan(tmp_path, method="Head", lora=None)).activations
    full = facts_of(make_plan(tmp_path, **FULL)).activations
    assert activations is not None and full is not None
    assert activations.bytes_per_token < full.bytes_per_token / 20


def test_an_accelerator_keeps_no_attention_scores_and_computes_in_bf16(tmp_path: Path) -> None:
    save_tiny_bert(Workspace(tmp_path).model)
    on_cpu, on_gpu = (facts_of(make_plan(tmp_path, **changes)).activations for changes in ({}, GPU))
    assert on_cpu is not None and on_gpu is not None
    assert on_cpu.bytes_per_token_pair > 0, "attention with dropout has no fused kernel on CPU"
    assert (on_gpu.precision, on_gpu.bytes_per_token_pair) == (Precision.BF16, 0)
    fallback = facts_of(make_plan(tmp_path, **GPU | {"device": {"gpus": 1, "allow_cpu_fallback": True}}))
    assert fallback.activations == on_cpu


def test_an_8b_model_is_measured_without_its_weights() -> None:
    plan = make_plan(Path("/nowhere"), **GENERATION, **GPU, lora={"rank": 16, "alpha": 32, "dropout": 0.05})
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip

    def build() -> torch.nn.Module:
        with torch.device("meta"):
            return apply_method(AutoModelForCausalLM.from_config(config, dtype=torch.float32), plan)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = add_footprint(ModelStatus(architecture="Llama", parameters=1, context_length=8192), build, plan)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024, "KiB"
    assert (facts.trainable_parameters, facts.frozen_parameters) == (41_943_040, 8_030_261_248)
    assert facts.frozen_linear_parameters == 6_979_321_856
    assert facts.activations is not None and facts.activations.bytes_per_token == 11_890_944


def test_a_model_that_cannot_be_run_without_weights_is_left_to_formulas(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> torch.nn.Module:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("t5", num_layers=1, d_model=32))

    known = ModelStatus(architecture="T5ForSequenceClassification", parameters=5)
    facts = add_footprint(known, build, make_plan(Path("/nowhere"), **FULL))
    assert facts.activations is None
    assert facts.trainable_parameters
    assert "goes by formulas: no dry run of T5ForSequenceClassification" in caplog.text


def test_checkpointing_that_the_model_cannot_do_is_refused_in_prepare(tmp_path: Path) -> None:
    save_tiny_bert(Workspace(tmp_path).model)
    plan = make_plan(tmp_path, training={"activation_checkpointing": True})

    def build() -> torch.nn.Module:
        model = build_skeleton(plan, Workspace(tmp_path), LABELS)
        model.get_base_model().supports_gradient_checkpointing = False
        return model

    with pytest.raises(UserError, match=r"training\.activationCheckpointing: Bert.* leave it out") as caught:
        add_footprint(ModelStatus(architecture="Bert", parameters=1), build, plan)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_widths_are_found_under_the_names_that_families_use(tmp_path: Path) -> None:
    configs = [
        AutoConfig.for_model("llama", intermediate_size=688),
        AutoConfig.for_model("gpt2", n_embd=64),
        AutoConfig.for_model("distilbert", hidden_dim=99),
        AutoConfig.for_model("qwen3_moe", moe_intermediate_size=96, num_experts_per_tok=8),
    ]
    assert [read_facts(tmp_path, config).intermediate_size for config in configs] == [688, 256, 99, 768]
    grouped = read_facts(tmp_path, AutoConfig.for_model("llama", num_attention_heads=8, num_key_value_heads=2))
    assert (grouped.attention_heads, grouped.key_value_heads) == (8, 2)


def test_a_short_context_is_no_obstacle(tmp_path: Path) -> None:
    save_tiny_bert(Workspace(tmp_path).model, context_length=16)
    plan = make_plan(tmp_path)
    skeleton = build_skeleton(plan, Workspace(tmp_path), LABELS)
    assert measure_activations(skeleton, plan, 16).bytes_per_token > 0
