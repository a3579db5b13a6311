"""The memory plan: what practitioners know of well-known models, what is chosen, and what is refused."""

from dataclasses import replace

import pytest
from finetune_api.constants import Stage
from finetune_api.rules import parse_spec
from finetune_api.spec import FineTuneJobSpec, MethodType, Precision, Task
from finetune_api.status import ActivationStatus, DataStatus, FineTuneJobStatus, LengthStatus, ModelStatus
from finetune_operator.layout import PodLayout
from finetune_operator.observed import Key, Resource
from finetune_operator.plans import build_plan
from finetune_operator.resolved import resolved_status
from finetune_operator.sizing import GIB, MemoryPlan, Training, advise, estimate, explain, plan_memory
from hypothesis import given
from hypothesis import strategies as st

from tests.statuses import data_status

LLAMA_8B = ModelStatus(
    architecture="LlamaForCausalLM",
    parameters=8_030_261_248,
    layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    vocabulary_size=128256,
    tied_embeddings=False,
)
LLAMA_70B = LLAMA_8B.model_copy(
    update={"parameters": 70_553_706_496, "layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
)
BERT_BASE = ModelStatus(
    architecture="BertModel",
    parameters=109_482_240,
    layers=12,
    hidden_size=768,
    intermediate_size=3072,
    vocabulary_size=30522,
)
MINILM = ModelStatus(architecture="Bert", parameters=22_700_000, layers=6, hidden_size=384, vocabulary_size=30522)
UNKNOWN = ModelStatus(architecture="Odd", parameters=1_000_000)


def with_lora(model: ModelStatus) -> ModelStatus:
    """As prepare finds LoRA of rank 16 on Llama 3 8B for an accelerator; checked in tests/unit/trainer."""
    activations = ActivationStatus(
        precision=Precision.BF16, fixed_bytes=83_492_864, bytes_per_token=11_890_944, bytes_per_token_pair=0
    )
    counts = {
        "trainable_parameters": 41_943_040,
        "frozen_parameters": model.parameters,
        "frozen_linear_parameters": 6_979_321_856,
    }
    return model.model_copy(update={**counts, "activations": activations})


def data(longest: int = 512, rows: int = 1000) -> DataStatus:
    lengths = LengthStatus(p50=longest, p95=longest, p99=longest, longest=longest)
    return data_status(rows, rows * longest, longest).model_copy(update={"lengths": lengths})


def make_spec(
    task: str = "Classification", method: str = "LoRA", training=None, lora=None, dpo=None, **resources
) -> FineTuneJobSpec:
    return parse_spec(
        {
            "task": task,
            "model": {"uri": "hf://owner/name"},
            "dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}]},
            "method": {"type": method, "lora": lora, "dpo": dpo},
            "training": training or {},
            "resources": resources,
            "workspace": {"claimName": "shared"},
        }
    )


def plan_for(model: ModelStatus, spec: FineTuneJobSpec, longest: int = 512) -> MemoryPlan:
    plan = build_plan(resource(), spec, Stage.TRAIN, PodLayout())
    return plan_memory(spec, plan.training.model_copy(update={"max_length": longest}), model, data(longest))


def resource(**found) -> Resource:
    return Resource(Key("team", "demo"), "uid-000000", 1, False, {}, FineTuneJobStatus(**found))


def training(model: ModelStatus, method=MethodType.FULL, precision=Precision.BF16, **settings) -> Training:
    usual = {"task": Task.GENERATION, "longest": 2048, "batch_tokens": 32768, "gpus": 1}
    return Training(method=method, model=model, precision=precision, **usual | settings)


@pytest.mark.parametrize(("model", "gib"), [(LLAMA_8B, 119.7), (LLAMA_70B, 1051.3), (BERT_BASE, 1.63)])
def test_full_tuning_with_adam_takes_16_bytes_per_weight(model, gib):
    memory = estimate(training(model), 2048, checkpointing=False)
    assert (memory.weights + memory.gradients + memory.optimizer) / GIB == pytest.approx(gib, rel=1e-3)
    assert memory.weights == memory.gradients == memory.optimizer // 2 == 4 * model.parameters


def test_lora_of_an_8b_model_is_its_bf16_weights_and_little_else():
    memory = estimate(training(with_lora(LLAMA_8B), MethodType.LORA), 2048, checkpointing=False)
    assert memory.weights == 2 * 6_979_321_856 + 4 * (8_030_261_248 - 6_979_321_856 + 41_943_040)  # 17 GiB
    assert (memory.gradients, memory.optimizer) == (4 * 41_943_040, 8 * 41_943_040)


def test_an_8b_model_fits_a_card_of_24_gb_with_lora_if_activations_are_computed_again():
    spec = make_spec("Generation", gpus=1, gpuMemory="24Gi")
    plan = plan_for(with_lora(LLAMA_8B), spec, 2048)
    assert plan.fits and plan.activation_checkpointing
    assert plan.micro_batch_tokens >= 2048
    assert plan_for(with_lora(LLAMA_8B), make_spec("Generation", gpus=1, gpuMemory="20Gi"), 2048).fits is False


def test_qlora_keeps_the_linear_layers_of_an_8b_model_in_half_a_byte_per_weight():
    spec = make_spec("Generation", lora={"quantization": "NF4"}, gpus=1, gpuMemory="16Gi")
    plan = plan_for(with_lora(LLAMA_8B), spec, 2048)
    assert plan.fits
    assert plan.memory.weights == pytest.approx(0.516 * 6_979_321_856 + 4 * 1_092_882_432, rel=1e-3)
    without = make_spec("Generation", gpus=1, gpuMemory="16Gi")
    refused = plan_for(with_lora(LLAMA_8B), without, 2048)
    assert not refused.fits and "set method.lora.quantization: NF4" in advise(refused, without)


def test_a_preference_pair_is_never_torn_apart():
    spec = make_spec("Generation", dpo={}, gpus=1)
    training = build_plan(resource(), spec, Stage.TRAIN, PodLayout()).training
    unknown = data(100).model_copy(update={"lengths": None})
    plan = plan_memory(spec, training.model_copy(update={"max_length": 100}), LLAMA_70B, unknown)
    assert plan.micro_batch_tokens >= 200


def test_with_more_memory_activations_are_kept_and_passes_are_larger():
    plans = [
        plan_for(with_lora(LLAMA_8B), make_spec("Generation", gpus=1, gpuMemory=size), 2048)
        for size in ("48Gi", "80Gi", "141Gi")
    ]
    assert all(plan.fits and not plan.activation_checkpointing for plan in plans)
    tokens = [plan.micro_batch_tokens for plan in plans]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] <= 16 * 2048, "no pass is larger than an optimizer step"


def test_without_a_limit_weights_cast_to_bf16_leave_room_for_tokens():
    activations = ActivationStatus(
        precision=Precision.BF16, fixed_bytes=13_958_643_712, bytes_per_token=7_771_404, bytes_per_token_pair=0
    )
    model = LLAMA_8B.model_copy(update={"activations": activations})
    plan = plan_for(model, make_spec("Generation", "Full", gpus=1), 64)
    assert 64 < plan.micro_batch_tokens < 4 * GIB // 7_771_404


def test_a_small_encoder_takes_an_optimizer_step_in_one_pass():
    assert plan_for(MINILM, make_spec(), 128).micro_batch_tokens == 32 * 128


def test_prepares_longest_row_counts_and_not_what_was_allowed():
    spec = make_spec("Generation", gpus=1, gpuMemory="24Gi")
    short = plan_memory(
        spec, build_plan(resource(), spec, Stage.TRAIN, PodLayout()).training, with_lora(LLAMA_8B), data(100)
    )
    assert short.fits and not short.activation_checkpointing


def test_full_tuning_takes_as_many_gpus_as_it_needs():
    def gpus(size: str) -> int:
        return plan_for(LLAMA_8B, make_spec("Generation", "Full", gpuMemory=size), 2048).gpus

    assert [gpus("192Gi"), gpus("80Gi"), gpus("48Gi"), gpus("24Gi")] == [1, 2, 4, 8]
    lora = plan_for(with_lora(LLAMA_8B), make_spec("Generation", gpuMemory="80Gi"), 2048)
    assert lora.gpus == 1


def test_a_70b_model_does_not_fit_8_gpus_in_full_and_is_told_what_would_help():
    spec = make_spec("Generation", "Full", gpuMemory="80Gi")
    plan = plan_for(LLAMA_70B, spec, 2048)
    assert not plan.fits
    assert (plan.gpus, plan.activation_checkpointing) == (8, True), "the plan that comes closest"
    assert "per GPU: weights 32.9, gradients 32.9, optimizer 65.7" in explain(plan)
    assert "use method.type LoRA instead of Full" in advise(plan, spec)


def test_what_would_help_is_only_what_can():
    spec = make_spec("Generation", gpus=1, gpuMemory="20Gi", training={"activationCheckpointing": False})
    advice = advise(plan_for(with_lora(LLAMA_8B), spec, 2048), spec)
    expected = (
        "leave out training.activationCheckpointing",
        "set method.lora.quantization: NF4",
        "lower training.maxLength",
    )
    assert advice.startswith("; ".join(expected))
    assert "LoRA" not in advice and "resources.gpus," not in advice
    on_cpu = make_spec(limits={"memory": "500Mi"})
    assert advise(plan_for(MINILM, on_cpu), on_cpu) == "raise resources.limits.memory to 1Gi"


@pytest.mark.parametrize("wanted", [True, False])
def test_the_users_own_choice_of_checkpointing_stays(wanted):
    settings = {"activationCheckpointing": wanted}
    spec = make_spec("Generation", gpus=1, gpuMemory="24Gi", training=settings)
    plan = plan_for(with_lora(LLAMA_8B), spec, 2048)
    assert (plan.activation_checkpointing, plan.fits) == (wanted, wanted)


def test_a_model_that_cannot_compute_activations_again_is_not_planned_to():
    model = with_lora(LLAMA_8B).model_copy(update={"supports_checkpointing": False})
    plan = plan_for(model, make_spec("Generation", gpus=1, gpuMemory="24Gi"), 2048)
    assert not plan.activation_checkpointing and not plan.fits


def test_without_a_limit_nothing_is_refused_and_a_pass_has_the_usual_share():
    plan = plan_for(LLAMA_70B, make_spec("Generation", "Full", gpus=1), 2048)
    assert (plan.limit, plan.fits, plan.micro_batch_tokens) == (None, True, 2048)
    assert "GiB per GPU" in explain(plan) and " of " not in explain(plan)


@pytest.mark.parametrize("limit", ["1Gi", "512Mi", "1000", "0"])
def test_a_memory_limit_that_the_weights_fill_leaves_one_row(limit):
    plan = plan_for(BERT_BASE, make_spec(method="Full", limits={"memory": limit}))
    assert (plan.micro_batch_tokens, plan.fits) == (512, False)


def test_a_memory_limit_bounds_the_pass_and_full_tuning_leaves_less_of_it():
    tokens = [
        plan_for(MINILM, make_spec(method=method, limits={"memory": limit}), 64).micro_batch_tokens
        for method, limit in (("LoRA", "64Gi"), ("LoRA", "800Mi"), ("Full", "1Gi"))
    ]
    assert tokens[0] == 32 * 64
    assert tokens[0] > tokens[1] > 64
    assert tokens[0] > tokens[2] > 64


@pytest.mark.parametrize(("nodes", "gpus", "tokens"), [(2, 1, 800), (2, 2, 500), (1, 4, 500)])
def test_no_device_of_several_is_left_without_work(nodes: int, gpus: int, tokens: int):
    """Eight rows of 200 tokens on average."""
    found = data(500).model_copy(update={"train_rows": 100, "tokens": 20_000})
    spec = make_spec("Generation", training={"batchSize": {"sequences": 8}}, gpus=gpus, nodes=nodes, gpuMemory="80Gi")
    plan = build_plan(resource(model=with_lora(LLAMA_8B), data=found), spec, Stage.TRAIN, PodLayout())
    assert plan.training.micro_batch_tokens == tokens


def test_freed_memory_is_given_back_at_once_only_where_it_is_short():
    roomy, tight = make_spec(limits={"memory": "64Gi"}), make_spec(limits={"memory": "2Gi"})
    assert not plan_for(MINILM, make_spec()).compact_heap
    assert not plan_for(MINILM, roomy).compact_heap
    short = plan_for(MINILM, tight)
    assert short.compact_heap
    assert short.fits
    assert build_plan(resource(model=MINILM, data=data(512)), tight, Stage.TRAIN, PodLayout()).device.compact_heap
    assert not plan_for(LLAMA_8B, make_spec("Generation", gpus=1, gpuMemory="80Gi")).compact_heap


def test_host_memory_says_nothing_about_a_gpu_unless_training_may_fall_back_to_cpu():
    resources = {"gpus": 1, "gpuMemory": "80Gi", "limits": {"memory": "1Gi"}}
    assert plan_for(MINILM, make_spec(**resources)).limit == 80 * GIB
    assert plan_for(MINILM, make_spec(**resources, allowCpuFallback=True)).limit == GIB


def test_an_absurd_limit_is_as_good_as_none():
    assert plan_for(MINILM, make_spec(limits={"memory": "1e99"}), 64).micro_batch_tokens == 32 * 64


def test_a_model_of_unknown_shape_can_be_planned():
    plan = plan_for(UNKNOWN, make_spec(gpus=1, gpuMemory="1Gi"))
    assert plan.micro_batch_tokens >= 512


def test_a_row_longer_than_the_token_budget_still_fits():
    spec = make_spec(training={"batchSize": {"tokens": 100}})
    assert plan_for(MINILM, spec).micro_batch_tokens == 512


def test_the_plan_is_what_the_trainer_gets_and_the_status_shows():
    spec = make_spec("Generation", gpuMemory="24Gi")
    found = resource(model=with_lora(LLAMA_8B), data=data(2048))
    before, plan = (
        build_plan(resource(), spec, Stage.PREPARE, PodLayout()),
        build_plan(found, spec, Stage.TRAIN, PodLayout()),
    )
    assert (before.device.gpus, before.device.estimated_memory_bytes) == (1, None)
    assert resolved_status(before, None, None).gpus is None
    memory = plan_for(with_lora(LLAMA_8B), spec, 2048)
    assert plan.training.activation_checkpointing is True
    assert plan.training.micro_batch_tokens == memory.micro_batch_tokens
    assert (plan.device.gpus, plan.device.compact_heap) == (1, False)
    assert plan.device.estimated_memory_bytes == memory.memory.total <= 24 * GIB
    shown = resolved_status(plan, None, None)
    assert (shown.gpus, shown.activation_checkpointing) == (1, True)


sizes = st.integers(1, 200)
models = st.builds(
    ModelStatus,
    architecture=st.just("Any"),
    parameters=st.integers(1, 10**12),
    layers=st.none() | sizes,
    hidden_size=st.none() | st.integers(1, 20_000),
    intermediate_size=st.none() | st.integers(1, 80_000),
    vocabulary_size=st.none() | st.integers(1, 300_000),
    trainable_parameters=st.none() | st.integers(0, 10**12),
    frozen_parameters=st.none() | st.integers(0, 10**12),
    activations=st.none()
    | st.fixed_dictionaries(
        {
            "precision": st.sampled_from(Precision),
            "fixed_bytes": st.integers(0, 10**12),
            "bytes_per_token": st.integers(0, 10**9),
            "bytes_per_token_pair": st.integers(0, 10**6),
        }
    ).map(ActivationStatus.model_validate),
)
trainings = st.builds(
    Training,
    task=st.sampled_from(Task),
    method=st.sampled_from(MethodType),
    model=models,
    precision=st.sampled_from(Precision),
    longest=st.integers(1, 100_000),
    batch_tokens=st.integers(1, 10**7),
    gpus=st.sampled_from((0, 1, 2, 4, 8)),
    nodes=st.integers(1, 4),
)


@given(trainings, st.integers(1, 10**6), st.integers(0, 10**6), st.booleans())
def test_more_tokens_never_need_less(job, tokens, more, checkpointing):
    assert estimate(job, tokens, checkpointing).total <= estimate(job, tokens + more, checkpointing).total


@given(trainings, st.integers(1, 10**6))
def test_checkpointing_never_needs_more(job, tokens):
    assert estimate(job, tokens, checkpointing=True).total <= estimate(job, tokens, checkpointing=False).total


@given(trainings, st.integers(1, 10**6))
def test_bf16_never_needs_more_than_fp32_for_weights(job, tokens):
    half, single = (
        estimate(replace(job, precision=precision), tokens, False).weights
        for precision in (Precision.BF16, Precision.FP32)
    )
    assert half <= single
