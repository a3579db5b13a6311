"""Prepare as `finetune validate` asks for it: a sample of the rows, the model's settings, no weights."""

import json
from pathlib import Path

import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome
from finetune_api.report import DataReport, Level, Remark
from finetune_api.spec import Task
from finetune_trainer.errors import UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry

from tests.models import save_tiny_bert
from tests.plans import make_plan

LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def rows(count: int, start: int = 0, sorted_by_label: bool = False) -> list[dict]:
    labels = [LABELS[3 * n // count] if sorted_by_label else LABELS[n % 3] for n in range(count)]
    return [{"text": f"profit {start + n} rises", "label": label} for n, label in enumerate(labels)]


@pytest.fixture
def judge(tmp_path, model):
    """Writes files, runs the stage on a sample of them, and returns its report."""

    def judge(files: dict[str, list], sample: dict, location: dict | None = None, **dataset) -> DataReport:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in content))
        source = {"location": {"uri": "file://data", "path": str(folder)}, "field": "dataset.sources[0]"}
        location = location or {"uri": "file://bert", "path": str(model)}
        plan = make_plan(
            tmp_path / "workspace",
            Stage.PREPARE,
            task=Task.CLASSIFICATION,
            model={"location": location},
            dataset={"sources": [source], **dataset},
            sample=sample,
        )
        try:
            result = run(plan, Telemetry(plan.stage, plan.job))
            assert (result.outcome, result.prepare) == (Outcome.SUCCEEDED, None)
        except UserError as error:
            judge.error = error
        return read_report(plan)

    judge.error = None
    return judge


def read_report(plan: Plan) -> DataReport:
    return DataReport.model_validate_json((Path(plan.workspace) / "report" / "data.json").read_bytes())


def told(report: DataReport) -> list[tuple]:
    return [(found.level, found.reason, found.field) for found in report.findings]


def test_the_beginning_of_every_file_is_read(judge):
    files = {"a.jsonl": rows(500), "b.jsonl": rows(500, 500), "c.jsonl": rows(5, 1000)}
    report = judge(files, {"rows": 100})
    assert {source.uri[-7:]: source.rows_read for source in report.sources} == {
        "a.jsonl": 34,
        "b.jsonl": 34,
        "c.jsonl": 5,
    }
    assert report.sample.rows_per_source == 100
    assert not report.sample.complete
    assert report.findings == []
    assert report.lengths.mean > 3


def test_a_source_smaller_than_the_sample_is_read_whole(judge):
    report = judge({"a.jsonl": rows(120)}, {"rows": 120})
    assert (report.summary.rows_read, report.sample.complete) == (120, True)


def test_all_rows_can_be_asked_for(judge):
    report = judge({"a.jsonl": rows(1500)}, {})
    assert report.summary.rows_read == 1500
    assert (report.sample.rows_per_source, report.sample.complete) == (None, True)


def test_no_weights_are_fetched(judge, tmp_path):
    judge({"a.jsonl": rows(50)}, {"rows": 20})
    fetched = {path.name for path in (tmp_path / "workspace" / "model").iterdir()}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not [name for name in fetched if "safetensors" in name or name.endswith(".bin")]


def test_a_model_without_weights_is_refused_all_the_same(judge, tmp_path, model):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    report = judge({"a.jsonl": rows(50)}, {"rows": 20}, {"uri": "file://bare", "path": str(bare)})
    assert told(report) == [(Level.ERROR, Reason.MODEL_INVALID, "model.uri")]
    assert "holds no weights" in report.findings[0].message


def test_a_split_or_label_that_only_the_sample_lacks_is_no_error(judge):
    """Sorted by label: its beginning has one label, and three rows give no validation."""
    report = judge({"a.jsonl": rows(300, sorted_by_label=True)}, {"rows": 3}, test={"fraction": 0.1})
    assert told(report) == [(Level.WARNING, Remark.SAMPLE_TOO_SMALL, "dataset.sources")]
    assert report.findings[0].message == "in the sample: 1 label found; a classification needs at least 2"
    assert report.summary.rows_kept == 3
    assert judge.error is None


def test_listed_labels_need_not_be_in_the_sample(judge):
    report = judge({"a.jsonl": rows(300, sorted_by_label=True)}, {"rows": 30}, labels=LABELS)
    assert told(report) == [(Level.WARNING, Remark.SAMPLE_TOO_SMALL, "dataset.sources")]
    assert list(report.labels["train"]) == LABELS


def test_what_the_whole_data_lacks_is_an_error(judge):
    report = judge({"a.jsonl": rows(3)}, {"rows": 1000})
    assert Level.ERROR in {found.level for found in report.findings}
    assert judge.error.reason is Reason.DATA_INVALID


def test_all_that_is_wrong_is_told_at_once(judge):
    bad = [{"text": "none"}, "{broken"]
    report = judge({"a.jsonl": [*rows(40), *bad]}, {}, labels=[*LABELS, "mixed"], max_rejected=0.01)
    assert [found.level for found in report.findings] == [Level.ERROR, Level.ERROR]
    first, second = report.findings
    assert (first.field, first.rows) == ("dataset.sources[0]", 2)
    assert "Invalid: 2 of 42 rows; dataset.maxRejected is 0.01" in first.message
    assert "no training row has the label 'mixed'" in second.message
    assert judge.error.message == f"dataset.sources[0]: {first.message}"  # the job's own reason


def test_a_share_of_bad_rows_that_is_allowed_is_a_warning(judge):
    report = judge({"a.jsonl": [{"text": "none"}, *rows(99)]}, {}, max_rejected=0.01)
    (found,) = report.findings
    assert (found.level, found.reason, found.field, found.rows) == (
        Level.WARNING, Remark.ROWS_REJECTED, "dataset.maxRejected", 1,
    )  # fmt: skip
    assert found.message.startswith("1 of 100 rows cannot be used")


def test_rows_that_are_cut_and_guessed_encodings_and_kept_personal_data_are_warnings(judge, tmp_path):
    long = [
        {"text": f"{n} " + "profit rises " * 60 + "mail me at joe@example.org", "label": LABELS[n % 3]}
        for n in range(60)
    ]
    report = judge({"a.jsonl": long}, {}, personal_data={"settings": {"action": "Keep"}})
    assert [(found.reason, found.field, found.rows) for found in report.findings] == [
        (Remark.ROWS_TRUNCATED, "training.maxLength", report.summary.train_rows),
        (Remark.PERSONAL_DATA_KEPT, "dataset.personalData.action", 60),
    ]
    text = "".join(f"größer und schöner für alle {n};{LABELS[n % 3]}\n" for n in range(90))
    (tmp_path / "data" / "a.jsonl").unlink()
    (tmp_path / "data" / "b.csv").write_bytes(("text;label\n" + text).encode("cp1252"))
    report = judge({}, {})
    assert [(found.reason, found.field) for found in report.findings] == [
        (Remark.ENCODING_GUESSED, "dataset.sources[0]")
    ]
    assert report.findings[0].message.startswith("b.csv is read as cp1252, which is a guess")


def test_a_model_out_of_reach_leaves_the_data_to_be_judged(judge):
    report = judge({"a.jsonl": rows(50)}, {"rows": 20}, {"uri": "https://127.0.0.1:9/bert"})
    assert told(report) == [(Level.WARNING, Remark.MODEL_UNREACHABLE, "model.uri")]
    message = report.findings[0].message
    assert message.startswith("https://127.0.0.1:9/bert could not be reached (")
    assert message.endswith("): its tokens are not counted, and it is not known whether it fits the job")
    assert (report.summary.rows_kept, report.lengths) == (20, None)


def test_without_tokens_no_model_is_asked_for(judge, monkeypatch):
    monkeypatch.setattr("finetune_trainer.prepare.fetch_model", None)
    report = judge({"a.jsonl": rows(50)}, {"rows": 20, "tokenize": False})
    assert (report.summary.rows_kept, report.findings) == (20, [])


def test_a_source_that_is_not_there_is_an_error_with_its_field(judge):
    report = judge({}, {"rows": 20})
    assert told(report) == [(Level.ERROR, Reason.DATA_NOT_FOUND, "dataset.sources[0]")]


def test_the_page_is_written_whether_or_not_the_data_is_refused(judge, tmp_path):
    page = tmp_path / "workspace" / "report" / "data.html"
    judge({"a.jsonl": rows(50)}, {})
    assert "Ready" in page.read_text()
    judge({"a.jsonl": [*rows(50), "{broken"]}, {})
    assert "Refused" in page.read_text()
    assert "Invalid: 1 of 51 rows" in page.read_text()
