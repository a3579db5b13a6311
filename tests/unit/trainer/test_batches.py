"""The batch plan: every row once per epoch, sizes kept, the same plan every time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_api.spec import BatchSize, Task
from finetune_trainer.data.store import Rows, TokenizedRow, open_split, write_split
from finetune_trainer.train.batches import BatchPlan
from finetune_trainer.train.micro_batches import Batching, bucket, packs, padded_groups
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(lambda values: np.array(values, np.int32))
SIZES = st.one_of(st.builds(BatchSize, sequences=st.integers(1, 20)), st.builds(BatchSize, tokens=st.integers(1, 200)))


@given(LENGTHS, SIZES, st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_every_epoch_has_every_row_once_and_steps_keep_their_size(
    lengths: np.ndarray, size: BatchSize, seed: int, epochs: int
) -> None:
    plan = BatchPlan(lengths, size, seed, epochs=epochs)
    steps = [plan.rows(step) for step in range(plan.total_steps)]
    assert sorted(np.concatenate(steps)) == sorted(np.tile(np.arange(len(lengths)), epochs))
    for rows in steps:
        if size.sequences:
            assert 1 <= len(rows) <= size.sequences
        else:
            assert len(rows) == 1 or lengths[rows].sum() <= size.tokens
    assert plan.epoch(0) == 0
    assert plan.epoch(plan.total_steps) == epochs


@given(LENGTHS, SIZES, st.integers(0, 100), st.floats(0.1, 4.0))
def test_a_step_is_the_same_whenever_it_is_asked_for(
    lengths: np.ndarray, size: BatchSize, seed: int, epochs: float
) -> None:
    first = BatchPlan(lengths, size, seed, epochs=epochs)
    steps = [first.rows(step).tolist() for step in range(first.total_steps)]
    for step in reversed(range(first.total_steps)):
        again = BatchPlan(lengths, size, seed, epochs=epochs)
        assert again.rows(step).tolist() == steps[step] == first.rows(step).tolist()


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    lengths = np.full(50, 5, np.int32)
    size = BatchSize(sequences=50)
    plan = BatchPlan(lengths, size, 1, epochs=2)
    other = BatchPlan(lengths, size, 2, epochs=2)
    orders = {tuple(p.rows(step).tolist()) for p in (plan, other) for step in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (0.5, 2), (0.01, 1), (1.25, 5), (2.3, 10), (3, 12)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_a_step(epochs: float, steps: int) -> None:
    plan = BatchPlan(np.full(13, 5, np.int32), BatchSize(sequences=4), 1, epochs=epochs)
    assert plan.total_steps == steps


def test_max_steps_go_on_through_the_epochs() -> None:
    plan = BatchPlan(np.full(10, 5, np.int32), BatchSize(sequences=4), 1, max_steps=7)
    assert plan.total_steps == 7
    assert [len(plan.rows(step)) for step in range(7)] == [4, 4, 2, 4, 4, 2, 4]
    assert plan.epoch(3) == 1
    assert plan.epoch(7) == pytest.approx(2 + 1 / 3)


def test_no_rows_make_no_plan() -> None:
    with pytest.raises(ValueError, match="no rows"):
        BatchPlan(np.array([], np.int32), BatchSize(sequences=4), 1, epochs=1)


CUTS = st.one_of(st.just(None), st.integers(0, 50))


@given(LENGTHS, st.integers(1, 200), CUTS, st.randoms())
def test_padded_groups_hold_all_rows_within_the_budget_and_bound_their_padding(
    lengths, most: int, most_padding: int | None, random
) -> None:
    rows = np.array(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    groups = padded_groups(rows, lengths, most, most_padding)
    assert sorted(np.concatenate(groups)) == sorted(rows)
    for group in groups:
        longest = lengths[group].max()
        assert len(group) == 1 or len(group) * longest <= most
        assert most_padding is None or (longest - lengths[group]).sum() <= most_padding
    longest = [int(lengths[group].max()) for group in groups]
    assert longest == sorted(longest, reverse=True)


@given(LENGTHS, st.integers(1, 200), st.randoms())
def test_packs_hold_all_rows_within_the_budget(lengths, most: int, random) -> None:
    rows = np.array(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    found = packs(rows, lengths, most)
    assert sorted(np.concatenate(found)) == sorted(rows)
    assert all(len(pack) == 1 or lengths[pack].sum() <= most for pack in found)
    # two packs that would fit into one are a wasted pass; the search for the number of packs goes in tenths
    fewest = -(-int(lengths[rows].sum()) // most)
    assert len(found) <= max(2 * fewest, fewest + 1) * 1.2 + 1


def test_packs_are_about_as_large_as_each_other() -> None:
    lengths = np.array([100] + [10] * 30 + [30] * 5, np.int32)
    sizes = [int(lengths[pack].sum()) for pack in packs(np.arange(len(lengths)), lengths, 300)]
    assert sizes == [280, 270]


def test_classification_rows_are_padded_on_the_right(tmp_path: Path) -> None:
    rows = [TokenizedRow([5, 6, 7], label=2), TokenizedRow([8], label=0)]
    data = _write(tmp_path, rows, Task.CLASSIFICATION)
    batch = Batching(Task.CLASSIFICATION, packed=False, micro_batch_tokens=100, pad_token_id=99).read(
        data, np.array([1, 0])
    )
    assert batch.input_ids.tolist() == [[8, 99, 99], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch.targets.tolist() == [0, 2]
    assert (batch.positions, batch.tokens) == (None, 4)


def test_rows_of_one_length_need_no_mask(tmp_path: Path) -> None:
    data = _write(tmp_path, [TokenizedRow([5, 6], label=1)] * 2, Task.CLASSIFICATION)
    batch = Batching(Task.CLASSIFICATION, packed=False, micro_batch_tokens=100, pad_token_id=0).read(data, np.arange(2))
    assert batch.attention_mask is None


DOCUMENTS = [
    TokenizedRow([5, 6, 7, 8], loss_mask=[False, False, True, True]),
    TokenizedRow([9, 10], loss_mask=[True, True]),  # nothing stands before its first token
    TokenizedRow([11], loss_mask=[True]),
]


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_the_supervised_tokens_seen_from_the_token_before(tmp_path: Path, packed: bool) -> None:
    data = _write(tmp_path, DOCUMENTS, Task.GENERATION)
    batch = Batching(Task.GENERATION, packed, micro_batch_tokens=100, pad_token_id=0).read(data, np.arange(3))
    assert batch.targets.tolist() == [7, 8, 10]
    assert batch.input_ids.flatten()[batch.positions].tolist() == [6, 7, 9]
    assert batch.targets.dtype == torch.int64
    assert batch.tokens == 7


def test_packed_documents_stand_side_by_side_and_count_their_own_positions(tmp_path: Path) -> None:
    data = _write(tmp_path, DOCUMENTS, Task.GENERATION)
    batch = Batching(Task.GENERATION, True, micro_batch_tokens=100, pad_token_id=0).read(data, np.array([1, 0]))
    assert batch.input_ids.tolist() == [[9, 10, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert batch.documents.lengths == (2, 4)
    assert batch.documents.starts.tolist() == [0, 2, 6]
    assert batch.attention_mask is None


@given(st.integers(1, 10**6))
def test_buckets_are_few_and_hardly_longer(length: int) -> None:
    assert length <= bucket(length) <= max(length + 7, 1.125 * length)
    power = 1 << length.bit_length()
    assert length > 10_000 or len({bucket(other) for other in range(power, 2 * power)}) <= 9


def test_a_lengthened_pack_has_one_more_document_without_targets(tmp_path: Path) -> None:
    data = _write(tmp_path, DOCUMENTS, Task.GENERATION)
    batching = Batching(Task.GENERATION, True, micro_batch_tokens=100, pad_token_id=0)
    plain = batching.read(data, np.arange(3))
    batching.in_buckets = True
    longer = batching.read(data, np.arange(3))
    assert longer.documents.lengths == (4, 2, 1, 1)
    assert longer.input_ids.tolist() == [[*plain.input_ids[0].tolist(), 0]]
    assert longer.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert torch.equal(longer.positions, plain.positions)
    assert longer.tokens == plain.tokens == 7


def test_micro_batches_can_be_halved_down_to_the_longest_row() -> None:
    batching = Batching(Task.GENERATION, True, micro_batch_tokens=100, pad_token_id=0)
    assert [batching.halve(40), batching.micro_batch_tokens] == [True, 50]
    assert [batching.halve(40), batching.micro_batch_tokens] == [True, 40]
    assert [batching.halve(40), batching.micro_batch_tokens] == [False, 40]


def _write(folder: Path, rows: list[TokenizedRow], task: Task) -> Rows:
    write_split(folder / "train", rows, task)
    return open_split(folder, "train")
