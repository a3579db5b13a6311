"""Run length: what the user sees in status.resolved."""

import math

from finetune_api.status import DataStatus
from finetune_operator.sizing import run_length
from hypothesis import given
from hypothesis import strategies as st

from tests.statuses import data_status


def data(rows: int, tokens: int = 0) -> DataStatus:
    return data_status(rows, tokens, 512)


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
