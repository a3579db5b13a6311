"""What is written to data/ is what training maps, byte for byte the same every time."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from finetune_api.spec import Task
from finetune_trainer.data.store import (
    DataManifest,
    SplitWriter,
    TokenizedRow,
    open_split,
    read_manifest,
    write_manifest,
    write_split,
)
from finetune_trainer.errors import StageError
from hypothesis import given, settings
from hypothesis import strategies as st

ROW = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6)


@settings(max_examples=25)
@given(rows=st.lists(ROW, max_size=30), per_shard=st.integers(1, 12))
def test_rows_come_back_as_they_were_in_any_sharding(tmp_path_factory, rows, per_shard):
    data = tmp_path_factory.mktemp("data")
    written = [TokenizedRow([i for i, _ in row], [m for _, m in row]) for row in rows]
    manifest = write_split(data / "train", written, Task.GENERATION, per_shard)
    found = open_split(data, "train")
    assert len(found) == len(rows) == manifest.rows
    assert found.lengths.tolist() == [len(row) for row in rows]
    for number, row in enumerate(written):
        assert found.input_ids(number).tolist() == list(row.input_ids)
        assert found.loss_mask(number).tolist() == list(row.loss_mask)
        assert found.input_ids(number).dtype == np.int64
        assert found.loss_mask(number).dtype == np.bool_
    assert manifest.tokens == sum(map(len, rows))
    assert manifest.supervised_tokens == sum(m for row in rows for _, m in row)


def test_labels_come_back_and_rows_are_counted(tmp_path):
    rows = [TokenizedRow([1, 2, 3], label=n % 3, truncated=n == 0) for n in range(2500)]
    manifest = write_split(tmp_path / "train", rows, Task.CLASSIFICATION)
    found = open_split(tmp_path, "train")
    assert [found.label(n) for n in (0, 1, 999, 1000, 2499)] == [0, 1, 0, 1, 0]
    assert (manifest.rows, manifest.supervised_tokens, manifest.truncated_rows) == (2500, 2500, 1)
    for outside in (-1, 2500):
        with pytest.raises(IndexError):
            found.label(outside)


def test_a_pair_is_two_documents_and_counts_as_one_row(tmp_path):
    pairs = [
        TokenizedRow([1, n, 3], [False, True, True], rejected=TokenizedRow([1, n], [False, True], truncated=True))
        for n in range(5)
    ]
    manifest = write_split(tmp_path / "train", pairs, Task.GENERATION, rows_per_shard=3)
    assert (manifest.rows, manifest.tokens, manifest.supervised_tokens, manifest.truncated_rows) == (5, 25, 15, 5)
    found = open_split(tmp_path, "train")
    assert found.lengths.tolist() == [3, 2] * 5
    assert [found.input_ids(n).tolist() for n in (8, 9)] == [[1, 4, 3], [1, 4]]


def test_generation_rows_have_no_label(tmp_path):
    write_split(tmp_path / "train", [TokenizedRow([1], [True])], Task.GENERATION)
    with pytest.raises(TypeError, match="no labels"):
        open_split(tmp_path, "train").label(0)


def test_the_same_rows_make_the_same_bytes(tmp_path):
    rows = [TokenizedRow([n, n + 1], label=0) for n in range(30)]
    for name in ("one", "two"):
        write_split(tmp_path / name, rows, Task.CLASSIFICATION, rows_per_shard=10)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert len(one) == 3
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_long_rows_do_not_wait_for_a_thousand_others(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_trainer.data.store.TOKENS_PER_BATCH", 100)
    rows = [TokenizedRow([n] * 30, label=n) for n in range(10)]
    write_split(tmp_path / "train", rows, Task.CLASSIFICATION)
    reader = pa.ipc.open_file(pa.memory_map(str(tmp_path / "train" / "00000.arrow")))
    assert [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)] == [4, 4, 2]
    found = open_split(tmp_path, "train")
    assert [(found.label(n), found.input_ids(n).tolist()) for n in range(10)] == [(n, [n] * 30) for n in range(10)]


def test_rows_that_wait_take_little_memory(tmp_path):
    tokens = 900 * 1000
    tracemalloc.start()
    try:
        with SplitWriter(tmp_path / "train", Task.GENERATION) as writer:
            for _ in range(900):
                writer.write(TokenizedRow(list(range(1000, 2000)), [True] * 1000))
            assert tracemalloc.get_traced_memory()[0] < 10 * tokens
    finally:
        tracemalloc.stop()


def test_an_empty_split_can_be_opened(tmp_path):
    with SplitWriter(tmp_path / "test", Task.CLASSIFICATION) as writer:
        pass
    assert writer.manifest.rows == len(open_split(tmp_path, "test")) == 0


def test_a_missing_or_damaged_split_is_named(tmp_path):
    with pytest.raises(StageError, match="no split 'test'"):
        open_split(tmp_path, "test")
    write_split(tmp_path / "train", [TokenizedRow([1], label=0)] * 100, Task.CLASSIFICATION)
    shard = tmp_path / "train" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(StageError, match=r"damaged \(train/00000\.arrow\)"):
        open_split(tmp_path, "train")


def test_the_manifest_comes_back_and_its_absence_is_told(tmp_path):
    with pytest.raises(StageError, match="run prepare first"):
        read_manifest(tmp_path)
    manifest = DataManifest(task=Task.GENERATION, max_length=8, fingerprint="f", splits={})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(StageError, match="run prepare first"):
        read_manifest(tmp_path)
