"""Run length and micro-batch: what the user sees in status.resolved, and what keeps a small machine alive."""

import math

import pytest
from finetune_api.rules import parse_spec
from finetune_api.spec import FineTuneJobSpec, Task
from finetune_api.status import DataStatus, ModelStatus
from finetune_operator.sizing import activation_bytes_per_token, micro_batch_tokens, run_length
from hypothesis import given
from hypothesis import strategies as st

MINILM = ModelStatus(architecture="Bert", parameters=22_700_000, layers=6, hidden_size=384, vocabulary_size=30522)
LLAMA_8B = ModelStatus(
    architecture="Llama", parameters=8_030_000_000, layers=32, hidden_size=4096, vocabulary_size=128256
)
UNKNOWN = ModelStatus(architecture="Odd", parameters=1_000_000)


def data(rows: int, tokens: int = 0) -> DataStatus:
    return DataStatus(
        rows_read=rows,
        rows_kept=rows,
        rows_rejected=0,
        train_rows=rows,
        validation_rows=0,
        test_rows=0,
        tokens=tokens,
        supervised_tokens=tokens,
        truncated_rows=0,
        max_length=512,
        fingerprint="f",
    )


def spec(task: str = "Classification", method: str = "LoRA", **resources) -> FineTuneJobSpec:
    return parse_spec(
        {
            "task": task,
            "model": {"uri": "hf://owner/name"},
            "dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}]},
            "method": {"type": method},
            "resources": resources,
        }
    )


def test_the_last_batch_of_an_epoch_may_be_smaller_and_still_is_a_step():
    run = run_length(data(1001), sequences=100, tokens=None, epochs=3.0, max_steps=None)
    assert (run.steps_per_epoch, run.total_steps) == (11, 33)
    assert (run.checkpoint_steps, run.evaluation_steps) == (2, 11)


def test_half_an_epoch_is_evaluated_at_its_end():
    run = run_length(data(1000), sequences=10, tokens=None, epochs=0.5, max_steps=None)
    assert (run.total_steps, run.evaluation_steps) == (50, 50)


def test_max_steps_decide_over_the_epochs_and_end_within_one():
    run = run_length(data(1000), sequences=1, tokens=None, epochs=None, max_steps=7)
    assert (run.total_steps, run.checkpoint_steps, run.evaluation_steps) == (7, 1, 7)


def test_token_budgets_count_tokens_and_not_rows():
    run = run_length(data(1000, tokens=50_000), sequences=None, tokens=4096, epochs=2.0, max_steps=None)
    assert run.steps_per_epoch == math.ceil(50_000 / 4096)


@given(
    rows=st.integers(0, 10**9),
    sequences=st.integers(1, 65536),
    epochs=st.floats(0, 1000, exclude_min=True),
)
def test_every_run_has_steps_that_can_be_counted(rows, sequences, epochs):
    run = run_length(data(rows), sequences, None, epochs, None)
    assert run.total_steps >= 1
    assert 1 <= run.checkpoint_steps <= run.total_steps
    assert 1 <= run.evaluation_steps <= run.total_steps
    assert run.checkpoint_steps * 20 >= run.total_steps


def test_the_activation_formula_grows_with_width_depth_and_the_vocabulary_of_generation():
    assert activation_bytes_per_token(MINILM, Task.CLASSIFICATION) == 2 * 34 * 384 * 6
    assert activation_bytes_per_token(MINILM, Task.GENERATION) == 2 * 34 * 384 * 6 + 12 * 30522


def test_a_small_encoder_takes_an_optimizer_step_in_one_pass():
    assert micro_batch_tokens(spec(), MINILM, max_length=128, batch_tokens=32 * 128) == 32 * 128


def test_a_large_decoder_gets_one_row_of_full_length_at_a_time():
    assert micro_batch_tokens(spec("Generation", gpus=1), LLAMA_8B, 2048, 16 * 2048) == 2048


def test_a_gpu_holds_more_than_a_cpu_is_given():
    on_cpu = micro_batch_tokens(spec(), MINILM, 512, 10**6)
    assert micro_batch_tokens(spec(gpus=1), MINILM, 512, 10**6) > on_cpu > 512


@pytest.mark.parametrize("limit", ["1Gi", "512Mi", "1000", "0"])
def test_a_memory_limit_that_the_weights_fill_leaves_one_row(limit):
    assert micro_batch_tokens(spec(limits={"memory": limit}), MINILM, 512, 10**6) == 512


def test_a_memory_limit_bounds_the_pass_and_full_tuning_leaves_less_of_it():
    lora = micro_batch_tokens(spec(limits={"memory": "2Gi"}), MINILM, 64, 10**6)
    full = micro_batch_tokens(spec(method="Full", limits={"memory": "2Gi"}), MINILM, 64, 10**6)
    assert micro_batch_tokens(spec(limits={"memory": "64Gi"}), MINILM, 64, 10**6) > lora > full > 64
    kept = lora * activation_bytes_per_token(MINILM, Task.CLASSIFICATION)
    assert kept + 4 * MINILM.parameters < 2**30  # beside a GiB for the process itself


def test_host_memory_says_nothing_about_a_gpu_unless_training_may_fall_back_to_cpu():
    resources = {"gpus": 1, "limits": {"memory": "1Gi"}}
    assert micro_batch_tokens(spec(**resources), MINILM, 64, 10**6) > 10_000
    assert micro_batch_tokens(spec(**resources, allowCpuFallback=True), MINILM, 64, 10**6) == 64


@pytest.mark.parametrize("limit", ["1e999999999", "1e9999999999999999999999"])
def test_an_absurd_limit_is_as_good_as_none(limit):
    assert micro_batch_tokens(spec(limits={"memory": limit}), MINILM, 64, 4096) == 4096


def test_a_model_of_unknown_shape_gets_the_least():
    assert micro_batch_tokens(spec(), UNKNOWN, 256, 10**6) == 256


def test_a_row_longer_than_the_token_budget_still_fits():
    assert micro_batch_tokens(spec(), MINILM, max_length=512, batch_tokens=100) == 512
