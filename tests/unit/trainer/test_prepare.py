"""The stage as a whole: from files to what training maps, or to an error that says where to look."""

import csv
import gzip
import hashlib
from pathlib import Path

import pytest
from finetune_api.constants import Reason
from finetune_api.plan import Plan, PlanDpo
from finetune_api.report import FileReport
from finetune_api.spec import Task
from finetune_trainer.data.pipeline import CHECK_ROWS
from finetune_trainer.data.read import json_rows
from finetune_trainer.data.store import open_split, read_manifest
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry
from transformers import AutoTokenizer

from tests.unit.trainer.prepare_runs import (
    LABELS,
    hashes,
    prepare,
    quarantine,
    report,
    sentiment,
    source,
    write_jsonl,
)


def test_a_classification_is_ready_to_train(tmp_path, plan):
    file = write_jsonl(tmp_path / "train.jsonl", sentiment(300))
    this = plan(file, test={"fraction": 0.2})
    data = prepare(this).data
    workspace = Path(this.workspace)
    assert data.rows_read == data.rows_kept == 300
    assert data.train_rows + data.validation_rows + data.test_rows == 300
    assert data.labels == LABELS
    manifest = read_manifest(workspace / "data")
    assert manifest.labels == LABELS
    assert manifest.fingerprint == data.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    known = {row["headline"]: row["sentiment"] for row in sentiment(300)}
    seen = []
    for split in ("train", "validation", "test"):
        rows = open_split(workspace / "data", split)
        assert len(rows) == manifest.splits[split].rows > 0
        for number in range(len(rows)):
            text = tokenizer.decode(rows.input_ids(number), skip_special_tokens=True)
            assert known[text] == LABELS[rows.label(number)]
            seen.append(text)
    assert sorted(seen) == sorted(known)


def test_pairs_are_ready_to_train_and_bad_ones_are_named(tmp_path, plan):
    good = [{"prompt": f"is {n} good?", "chosen": f"{n} is fine", "rejected": "no"} for n in range(60)]
    bad = [{"prompt": "same?", "chosen": "a", "rejected": "a"}, {"prompt": "none?", "chosen": "a", "rejected": " "}]
    this = plan(write_jsonl(tmp_path / "train.jsonl", [*good, *bad]), task=Task.GENERATION, max_rejected=0.1)
    data = prepare(this.model_copy(update={"dpo": PlanDpo(beta=0.1)})).data
    assert (data.rows_read, data.rows_kept, data.rows_rejected) == (62, 60, 2)
    assert [(line.line, line.reason) for line in quarantine(this)] == [
        (61, "chosen and rejected are the same"),
        (62, "rejected is empty"),
    ]
    rows = open_split(Path(this.workspace) / "data", "train")
    assert (len(rows), rows.lengths.sum()) == (2 * data.train_rows, data.tokens)
    tokenizer = AutoTokenizer.from_pretrained(Path(this.workspace) / "model")
    assert [tokenizer.decode(rows.input_ids(n)) for n in (0, 1)] == [
        f"<|user|>\nis 0 good?\n<|assistant|>\n{answer}</s>\n" for answer in ("0 is fine", "no")
    ]
    with pytest.raises(UserError, match=r"train\.jsonl line 1: pairs of a chosen .* method\.dpo: set it"):
        prepare(this)


def test_the_report_tells_what_was_found(tmp_path, plan):
    file = write_jsonl(tmp_path / "train.jsonl", sentiment(200))
    this = plan(file)
    prepared = prepare(this)
    found = report(this)
    assert found.summary == prepared.data
    assert found.model == prepared.model
    assert found.sources[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (found.sources[0].format, found.sources[0].rows_read) == ("LabelledText", 200)
    assert sum(sum(labels.values()) for labels in found.labels.values()) == 200
    assert found.lengths.longest >= found.lengths.p50 > 3
    assert (found.rejections, quarantine(this)) == ({}, [])
    assert prepared.model.architecture == "BertModel"
    assert prepared.model.layers == 2
    assert prepared.model.context_length == 128
    assert prepared.data.max_length == 64
    lengths = open_split(Path(this.workspace) / "data", "train").lengths
    assert prepared.data.lengths.longest == lengths.max()
    assert prepared.data.lengths.p50 <= prepared.data.lengths.p95 <= prepared.data.lengths.p99 <= lengths.max()
    assert prepared.model.intermediate_size == 64
    assert prepared.model.trainable_parameters and prepared.model.activations


def test_the_report_tells_how_files_were_read(tmp_path, plan):
    folder = tmp_path / "data"
    write_jsonl(folder / "b.jsonl", sentiment(40))
    (folder / "a.csv.gz").write_bytes(gzip.compress("headline;label\nprofit äh;neutral\n".encode("utf-16")))
    (folder / "c.jsonl").touch()
    for name in ("README.md", ".b.jsonl.swp", "_SUCCESS", "dataset_info.json"):
        (folder / name).write_text("{}")
    this = plan(folder)
    assert prepare(this).data.rows_kept == 41
    found = report(this)
    assert [(s.uri, s.file, s.rows_read) for s in found.sources] == [
        ("file://data/a.csv.gz", FileReport(kind="CSV", compression="gzip", encoding="utf-16", delimiter=";"), 1),
        ("file://data/b.jsonl", FileReport(kind="JSONL", encoding="utf-8"), 40),
        ("file://data/c.jsonl", FileReport(kind="JSONL", encoding="utf-8"), 0),
    ]
    assert found.ignored_files == [
        f"file://data/{name}" for name in (".b.jsonl.swp", "README.md", "_SUCCESS", "dataset_info.json")
    ]


def test_an_empty_part_does_not_hide_the_format_of_the_others(tmp_path, plan):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-0.jsonl").touch()
    write_jsonl(tmp_path / "data" / "part-1.jsonl", sentiment(60))
    assert prepare(plan(tmp_path / "data")).data.rows_kept == 60


def test_the_three_commonest_reasons_are_named(tmp_path, plan):
    bad = [
        *["{oops"] * 4,
        *[{"sentiment": "neutral"}] * 3,
        *[{"headline": "", "sentiment": "neutral"}] * 2,
        {"headline": "x"},
        "7",
    ]
    with pytest.raises(UserError) as caught:
        prepare(plan(write_jsonl(tmp_path / "a.jsonl", [*sentiment(60), *bad])))
    assert "By reason: invalid JSON 5, text is missing 3, text is empty 2, 1 other reason." in caught.value.message


def test_a_generation_is_ready_to_train(tmp_path, plan):
    rows = [
        *(
            {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]}
            for n in range(60)
        ),
    ]
    this = plan(
        write_jsonl(tmp_path / "chat.jsonl", rows),
        write_jsonl(tmp_path / "text.jsonl", [{"text": f"sales {n} grow"} for n in range(60)]),
        task=Task.GENERATION,
    )
    prepared = prepare(this)
    workspace = Path(this.workspace)
    assert prepared.data.labels is None
    assert prepared.model.architecture == "LlamaForCausalLM"
    train = open_split(workspace / "data", "train")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    answers = {tokenizer.decode(train.input_ids(n)[train.loss_mask(n)]) for n in range(len(train))}
    assert any(answer.startswith("a ") and answer.endswith("</s>") for answer in answers)
    assert sum(int(train.loss_mask(n).sum()) for n in range(len(train))) == prepared.data.supervised_tokens
    assert [s.format for s in report(this).sources] == ["Messages", "Text"]


def test_the_same_input_gives_the_same_bytes_again_and_elsewhere(tmp_path, plan):
    file = write_jsonl(tmp_path / "train.jsonl", sentiment(150))
    this = plan(file)
    first = prepare(this)
    before = hashes(Path(this.workspace))
    assert prepare(this) == first
    assert hashes(Path(this.workspace)) == before
    elsewhere = this.model_copy(update={"workspace": str(tmp_path / "elsewhere")})
    assert prepare(elsewhere) == first
    assert hashes(tmp_path / "elsewhere" / "data") == hashes(Path(this.workspace) / "data")


def test_the_fingerprint_changes_with_rows_and_settings(tmp_path, plan):
    file = write_jsonl(tmp_path / "train.jsonl", sentiment(150))
    prints = {prepare(plan(file)).data.fingerprint}
    prints.add(prepare(plan(file, training={"max_length": 32})).data.fingerprint)
    prints.add(prepare(plan(file, labels=LABELS[::-1])).data.fingerprint)
    write_jsonl(file, [*sentiment(149), {"headline": "one more", "sentiment": "neutral"}])
    prints.add(prepare(plan(file)).data.fingerprint)
    assert len(prints) == 4


def test_bad_rows_fail_with_file_and_line_and_are_in_quarantine(tmp_path, plan):
    rows = [*sentiment(100), {"headline": "secret text"}, "{oops", {"headline": "", "sentiment": "neutral"}, {"x": 1}]
    this = plan(write_jsonl(tmp_path / "train.jsonl", rows))
    with pytest.raises(UserError) as caught:
        prepare(this)
    error = caught.value
    assert error.reason is Reason.DATA_INVALID
    assert error.message.startswith("dataset.sources[0]: train.jsonl line 101: label is missing; ")
    assert "line 102: invalid JSON (at character 2)" in error.message
    assert "line 103: text is empty and 1 more" in error.message
    assert "Invalid: 4 of 104 rows; dataset.maxRejected is 0." in error.message
    assert "secret" not in error.message
    assert [(q.line, q.reason) for q in quarantine(this)] == [
        (101, "label is missing"),
        (102, "invalid JSON"),
        (103, "text is empty"),
        (104, "text is missing"),
    ]
    found = report(this)
    assert (found.summary.rows_read, found.summary.rows_rejected, found.sources[0].rows_rejected) == (104, 4, 4)
    assert found.model is None
    assert "secret" not in (Path(this.workspace) / "report" / "quarantine.jsonl").read_text()
    assert not (Path(this.workspace) / "data").exists()
    assert not (Path(this.workspace) / "model").exists()


def test_a_share_of_bad_rows_may_be_allowed(tmp_path, plan):
    file = write_jsonl(tmp_path / "train.jsonl", [*sentiment(97), "{oops", "{oops", "{oops"])
    data = prepare(plan(file, max_rejected=0.03)).data
    assert (data.rows_read, data.rows_kept, data.rows_rejected) == (100, 97, 3)
    with pytest.raises(UserError, match=r"Invalid: 3 of 100 rows; dataset.maxRejected is 0\.029"):
        prepare(plan(file, max_rejected=0.029))


def test_exactly_the_allowed_share_is_allowed(tmp_path, plan):
    """0.29 * 100 is less than 29 in floating point."""
    file = write_jsonl(tmp_path / "train.jsonl", [*sentiment(71), *["{oops"] * 29])
    assert prepare(plan(file, max_rejected=0.29)).data.rows_rejected == 29


def test_long_documents_are_prepared_in_small_batches(tmp_path, plan, monkeypatch):
    file = write_jsonl(tmp_path / "train.jsonl", sentiment(60))
    one = prepare(plan(file)).data
    monkeypatch.setattr("finetune_trainer.data.pipeline.BATCH_CHARACTERS", 40)
    assert prepare(plan(file)).data == one


def test_labels_outside_the_closed_set_are_rejected(tmp_path, plan):
    rows = [*sentiment(60), {"headline": "x", "sentiment": "my secret"}]
    with pytest.raises(UserError, match="line 61: label is unknown") as caught:
        prepare(plan(write_jsonl(tmp_path / "a.jsonl", rows), labels=LABELS))
    assert "my secret" not in caught.value.message


def test_rows_with_nothing_to_learn_are_rejected_after_all(tmp_path, plan):
    rows = [{"prompt": f"q {n}", "completion": "a"} for n in range(50)]
    rows.append({"prompt": "profit " * 200, "completion": "a"})
    with pytest.raises(UserError, match="line 51: nothing left to learn"):
        prepare(plan(write_jsonl(tmp_path / "a.jsonl", rows), task=Task.GENERATION))


def test_long_rows_are_cut_and_counted(tmp_path, plan):
    rows = [*sentiment(50), *({"headline": f"profit {n} " * 60, "sentiment": "neutral"} for n in range(5))]
    this = plan(write_jsonl(tmp_path / "a.jsonl", rows))
    data = prepare(this).data
    longest = max(open_split(Path(this.workspace) / "data", "train").lengths)
    assert longest == data.max_length == 64
    assert 0 < data.truncated_rows <= 5
    assert report(this).lengths.longest > 64


def test_splits_of_their_own_files_stay_unseen_in_training(tmp_path, plan):
    train, judged, tested = sentiment(100), sentiment(20, start=90), sentiment(15, start=105)
    this = plan(
        write_jsonl(tmp_path / "train.jsonl", train),
        validation={
            "sources": [source(write_jsonl(tmp_path / "val.jsonl", judged), "dataset.validation.sources[0]")],
            "fraction": None,
        },
        test={"sources": [source(write_jsonl(tmp_path / "test.jsonl", tested), "dataset.test.sources[0]")]},
    )
    data = prepare(this).data
    assert (data.train_rows, data.validation_rows, data.test_rows) == (90, 15, 15)
    assert (data.rows_read, data.rows_kept, data.rows_rejected) == (135, 120, 15)
    assert report(this).rejections == {"held-out duplicate": 15}
    assert {(q.uri, q.reason) for q in quarantine(this)} == {
        ("file://train.jsonl", "held-out duplicate"),
        ("file://val.jsonl", "held-out duplicate"),
    }


def test_rows_keep_their_split_when_data_is_added(tmp_path, plan):
    def texts(this: Plan, split: str) -> set[str]:
        rows = open_split(Path(this.workspace) / "data", split)
        tokenizer = AutoTokenizer.from_pretrained(Path(this.workspace) / "model")
        return {tokenizer.decode(rows.input_ids(n)) for n in range(len(rows))}

    file = write_jsonl(tmp_path / "a.jsonl", sentiment(200))
    this = plan(file)
    prepare(this)
    before = {split: texts(this, split) for split in ("train", "validation")}
    write_jsonl(file, [*sentiment(100, start=900), *sentiment(200)])
    prepare(this)
    assert all(rows <= texts(this, split) for split, rows in before.items())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (sentiment(2), "dataset.validation.fraction"),
        ([{"headline": f"t {n}", "sentiment": "same"} for n in range(60)], "1 label found"),
        ([{"headline": f"t {n}", "sentiment": f"l{n}"} for n in range(600)], "more than 512 different labels"),
    ],
)
def test_data_that_cannot_teach_is_refused(tmp_path, plan, rows, words):
    this = plan(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match=words) as caught:
        prepare(this)
    assert caught.value.reason is Reason.DATA_INVALID
    assert report(this).summary.fingerprint == ""


def test_all_kinds_of_files_can_be_mixed(tmp_path, plan):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(sentiment(30)), tmp_path / "c.parquet")
    with (tmp_path / "b.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["headline", "sentiment"])
        writer.writeheader()
        writer.writerows(sentiment(30, start=30))
    data = prepare(
        plan(write_jsonl(tmp_path / "a.jsonl", sentiment(30, start=60)), tmp_path / "b.csv", tmp_path / "c.parquet")
    ).data
    assert data.rows_kept == 90


# --- ends before the end


@pytest.mark.parametrize(
    "activity", ["Fetching data", "Reading data", "Fetching the model", "Opening the model", "Tokenizing"]
)
def test_a_stop_leaves_nothing_half_done(tmp_path, plan, activity):
    class Stopping(Telemetry):
        def update(self, **fields):
            super().update(**fields)
            if fields.get("activity") == activity:
                self.stop_requested.set()

    this = plan(write_jsonl(tmp_path / "train.jsonl", sentiment(100)))
    with pytest.raises(Interrupted, match=activity[0].lower() + activity[1:]):
        run(this, Stopping(this.stage, this.job))
    workspace = Path(this.workspace)
    assert not (workspace / "data").exists()
    assert not list((workspace / "report").iterdir())
    assert {p.name for p in workspace.iterdir()} <= {"report", "model", ".model-download"}
    assert prepare(this).data.rows_kept == 100


@pytest.mark.parametrize("activity", ["Fetching data", "Reading data"])
def test_a_stop_need_not_wait_for_the_end_of_rejected_rows(tmp_path, plan, monkeypatch, activity):
    """A file without a good row is read to its end to find its format; a run of bad rows is read too."""
    rows = ["{oops"] * 5000 if activity == "Fetching data" else [*sentiment(100), *["{oops"] * 5000]
    this = plan(write_jsonl(tmp_path / "train.jsonl", rows), max_rejected=1.0)
    telemetry, decoded = Telemetry(this.stage, this.job), 0
    original = json_rows.json_row

    def count(*line):
        nonlocal decoded
        if telemetry.progress.activity == activity:
            decoded += 1
            if decoded == 150:
                telemetry.stop_requested.set()
        return original(*line)

    monkeypatch.setattr(json_rows, "json_row", count)
    with pytest.raises(Interrupted):
        run(this, telemetry)
    assert 150 <= decoded <= 150 + CHECK_ROWS


def test_refused_data_leaves_what_was_prepared_before(tmp_path, plan):
    file = write_jsonl(tmp_path / "train.jsonl", sentiment(100))
    this = plan(file)
    prepare(this)
    before = hashes(Path(this.workspace) / "data")
    write_jsonl(file, [*sentiment(100), "{oops"])
    with pytest.raises(StageError):
        prepare(this)
    assert hashes(Path(this.workspace) / "data") == before


def test_progress_goes_from_nothing_to_all(tmp_path, plan, monkeypatch):
    monkeypatch.setattr("finetune_trainer.telemetry.watch.UPDATE_SECONDS", 0)
    seen = []

    class Recording(Telemetry):
        def update(self, **fields):
            super().update(**fields)
            seen.append((fields["activity"], fields["fraction"]))

    this = plan(write_jsonl(tmp_path / "train.jsonl", sentiment(2500)))
    run(this, Recording(this.stage, this.job))
    activities = list(dict.fromkeys(activity for activity, _ in seen))
    assert activities == ["Fetching data", "Reading data", "Fetching the model", "Opening the model", "Tokenizing"]
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_nothing_of_the_data_is_logged(tmp_path, plan, caplog):
    caplog.set_level("DEBUG")
    rows = [*sentiment(100), *({"headline": "classified"} for _ in range(3))]
    with pytest.raises(UserError):
        prepare(plan(write_jsonl(tmp_path / "train.jsonl", rows)))
    prepare(plan(write_jsonl(tmp_path / "train.jsonl", rows), max_rejected=0.1))
    assert caplog.records
    assert "classified" not in caplog.text
    assert "profit" not in caplog.text
