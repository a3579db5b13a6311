"""dataset.labelling in the whole stage: from files to class ids, to the report, or to an error that says what to do."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.report import BalanceReport, ConflictReport, DataReport, Quarantined, RuleReport
from finetune_api.status import DataStatus
from finetune_trainer.data import pipeline
from finetune_trainer.data.store import open_split, read_manifest
from finetune_trainer.errors import UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry

from tests.models import save_tiny_bert
from tests.plans import make_plan

UP = {"name": "up", "label": "good", "keywords": ["profit rises", "sales rise"]}
DOWN = {"name": "down", "label": "bad", "pattern": r"\bfalls?\b"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


class Job:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def write(self, name: str, *rows: dict | str) -> Path:
        path = self.folder / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def source(self, path: Path, field: str = "dataset.sources[0]", **more) -> dict:
        return {"location": {"uri": f"file://{path.name}", "path": str(path)}, "field": field, **more}

    def prepare(self, path: Path, columns: dict | None = None, **dataset) -> DataStatus:
        plan = make_plan(
            self.folder / "workspace",
            Stage.PREPARE,
            model={"location": {"uri": "file://m", "path": str(self.model)}},
            dataset={"sources": [self.source(path, columns=columns or {})], **dataset},
        )
        result = run(plan, Telemetry(plan.stage, plan.job))
        assert result.prepare is not None
        assert DataReport.model_validate_json(self.report().to_json()) == self.report()
        return result.prepare.data

    def refused(self, path: Path, **dataset) -> str:
        with pytest.raises(UserError) as caught:
            self.prepare(path, **dataset)
        assert caught.value.reason is Reason.DATA_INVALID
        return caught.value.message

    def report(self) -> DataReport:
        return DataReport.model_validate_json((self.folder / "workspace" / "report" / "data.json").read_bytes())

    def quarantine(self) -> list[tuple[int, str, str]]:
        lines = (self.folder / "workspace" / "report" / "quarantine.jsonl").read_text().splitlines()
        found = [Quarantined.model_validate_json(line) for line in lines]
        return [(row.line, row.reason, row.detail) for row in found]

    def classes(self, split: str) -> list[str]:
        """The labels of a split's rows, as training sees them."""
        data = self.folder / "workspace" / "data"
        rows, labels = open_split(data, split), read_manifest(data).labels or []
        return [labels[rows.label(number)] for number in range(len(rows))]


@pytest.fixture
def job(tmp_path, model):
    return Job(tmp_path, model)


def news(count: int, start: int = 0) -> list[dict]:
    return [{"text": f"report {n} of the year", "label": ("good", "bad")[n % 2]} for n in range(start, start + count)]


def test_aliases_become_classes(job):
    rows = [*news(60), *({"text": f"sales {n} rise", "label": n % 2} for n in range(40))]
    data = job.prepare(job.write("a.jsonl", *rows), labelling={"aliases": {"0": "bad", "1": "good", "fine": "good"}})
    assert (data.rows_kept, data.labels, data.weak_rows) == (100, ["bad", "good"], None)
    found = job.report()
    assert sum(counts["good"] for counts in found.labels.values()) == 50
    assert found.labelling.aliases == {"0": 20, "1": 20, "fine": 0}
    assert found.labelling.by_rule is None


def test_reasons_are_told_with_their_counts_and_without_the_texts(job):
    rows = [*news(60), *[{"text": "x", "label": "my secret"}] * 3, *[{"text": "x", "label": None}] * 2]
    long = [{"text": "x" * 99, "label": "good"}] * 9  # dropped, and sound
    path = job.write("a.jsonl", *rows, *long)
    message = job.refused(path, labels=["good", "bad"], clean={"max_characters": 90})
    assert "line 61: label is unknown (dataset.labels does not list it)" in message
    assert "Invalid: 5 of 74 rows" in message
    assert "By reason: label is unknown 3, label is missing 2." in message
    assert "secret" not in message
    assert "secret" not in (job.folder / "workspace" / "report" / "quarantine.jsonl").read_text()


def test_a_text_file_is_labelled_by_rules(job):
    lines = [
        f"{name} {n}: {what}" for n in range(40) for name, what in (("Acme", "profit rises"), ("Bolt", "sales fall"))
    ]
    file = job.write("headlines.txt", *lines, "Nothing to see", "Sales rise as profit falls")
    data = job.prepare(file, labels=["bad", "good"], labelling={"rules": [UP, DOWN]})
    assert (data.rows_read, data.rows_kept, data.weak_rows) == (82, 80, 80)
    assert job.quarantine() == [
        (81, "no rule labels it", ""),
        (82, "rules disagree", "1 of 2 votes each for several labels"),
    ]
    found = job.report()
    assert found.sources[0].format == "LabelledText"
    assert found.labels["train"] == {label: job.classes("train").count(label) for label in ("bad", "good")}
    assert sum(found.labels[split]["good"] for split in found.labels) == 40
    assert sum(found.labelling.weak_rows.values()) == 80
    assert found.labelling.rule_rows == 82
    assert found.labelling.by_rule == {
        "up": RuleReport(votes=41, overlaps=1, conflicts=1, judged=0, right=0),
        "down": RuleReport(votes=41, overlaps=1, conflicts=1, judged=0, right=0),
    }


def test_rules_that_never_vote_are_told_of_in_the_report(job):
    message = job.refused(job.write("a.txt", *(f"line {n}" for n in range(9))), labelling={"rules": [UP, DOWN]})
    assert message == "the split train has no rows. Left out: no rule labels it 9"
    assert (job.report().rejections, job.report().labelling.rule_rows) == ({"no rule labels it": 9}, 9)
    assert job.report().labelling.by_rule["up"].votes == 0


def test_rules_are_judged_by_labelled_rows(job):
    train = job.write(
        "train.csv", "text", *[f"{n} profit rises" for n in range(30)], *[f"{n} falls" for n in range(30)]
    )
    rows = [{"text": f"{n} falls back", "label": ("bad", "good", "bad", "bad")[n % 4]} for n in range(20)]
    test = job.source(job.write("test.jsonl", *rows, {"text": "it falls"}), "dataset.test.sources[0]")
    job.prepare(train, test={"sources": [test]}, labelling={"rules": [UP, DOWN]})
    found = job.report().labelling
    assert found.by_rule["down"] == RuleReport(votes=51, overlaps=0, conflicts=0, judged=20, right=15, accuracy=0.75)
    assert found.weak_rows["test"] == 1


def test_columns_of_parquet_files_that_only_rules_look_at_are_read(job):
    rows = [{"text": f"report {n}", "stars": n % 2 * 4 + 1, "other": "x"} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), job.folder / "a.parquet")
    rule = {"name": "stars", "column": "stars", "table": {"1": "bad", "5": "good"}}
    assert job.prepare(job.folder / "a.parquet", labelling={"rules": [rule]}).rows_kept == 60


def test_a_rules_column_that_no_row_has_is_a_mistake(job):
    rule = {"name": "stars", "column": "stars", "table": {"1": "bad"}}
    message = job.refused(job.write("a.jsonl", *news(60)), labelling={"rules": [UP, rule]})
    assert message == "dataset.labelling.rules[1].column: no row of the sources has a column 'stars'"


def test_a_label_column_that_the_spec_names_must_be_there(job):
    file = job.write("a.csv", "text,mood", "profit rises,good")
    message = job.refused(file, columns={"label": "modo"}, labelling={"rules": [UP, DOWN]})
    assert "a column for label (modo)" in message


def contradictions() -> list[dict]:
    """100 sound rows, a text with two labels to one, and one with a tie."""
    odd = [("odd one", "good"), ("odd  one", "good"), ("odd one", "bad"), ("tie", "good"), ("tie", "bad")]
    return [*news(100), *({"text": text, "label": label} for text, label in odd)]


@pytest.mark.parametrize(
    ("action", "left_out"), [("Keep", []), ("Drop", [101, 102, 103, 104, 105]), ("Majority", [103, 104, 105])]
)
def test_the_same_text_with_several_labels(job, action, left_out):
    held_out = [*news(20, start=200), {"text": "calm", "label": "good"}, {"text": "calm", "label": "bad"}]
    validation = job.source(job.write("held_out.jsonl", *held_out), "dataset.validation.sources[0]")
    file = job.write("a.jsonl", *contradictions())
    data = job.prepare(file, validation={"sources": [validation], "fraction": None}, labelling={"conflicts": action})
    assert [line for line, reason, _ in job.quarantine() if reason == "conflicting labels"] == left_out
    assert (data.conflicting_rows, data.train_rows, data.validation_rows) == (7, 105 - len(left_out), 22)
    assert job.report().labelling.conflicts == ConflictReport(
        groups=3, rows=7, held_out_rows=2, rows_dropped=len(left_out)
    )


def test_conflicts_are_counted_without_being_asked_for(job):
    data = job.prepare(job.write("a.jsonl", *contradictions()))
    assert (data.rows_kept, data.conflicting_rows, job.report().labelling.conflicts.groups) == (105, 5, 2)


def test_each_label_needs_enough_training_rows_when_all_is_decided(job):
    rows = [*news(100), *({"text": f"rare {n % 5}", "label": ("rare", "good")[n // 5]} for n in range(10))]
    settings = {"validation": {"fraction": 0.01}, "labels": ["good", "bad", "rare"]}
    file = job.write("a.jsonl", *rows, *({"text": f"rarer {n}", "label": "rare"} for n in range(5)))
    assert job.prepare(file, **settings, labelling={"minimumRows": 9}).train_rows > 100
    message = job.refused(file, **settings, labelling={"minimumRows": 9, "conflicts": "Drop"})
    assert message == (
        "dataset.labelling.minimumRows: each label needs 9 training rows; 'rare' has 5: add such rows or lower it"
    )
    assert job.report().labels["train"]["rare"] == 5
    message = job.refused(file, validation={"fraction": 0.01}, labelling={"minimumRows": 9, "conflicts": "Drop"})
    assert "1 of the 3 labels have less, the rarest 5" in message


def test_the_balance_of_the_training_rows_is_told(job):
    job.prepare(
        job.write("a.jsonl", *news(60)),
        validation={
            "sources": [job.source(job.write("v.jsonl", *news(4, 100)), "dataset.validation.sources[0]")],
            "fraction": None,
        },
    )
    assert job.report().labelling.balance == BalanceReport(majority_share=0.5, imbalance_ratio=1.0)


def test_the_outcome_does_not_depend_on_how_rows_are_batched_or_by_whom_they_are_worked_on(job, monkeypatch):
    kinds = (("A", "profit rises"), ("B", "it falls"), ("C", ""))
    file = job.write("a.txt", *(f"{name} {n}: {what}" for n in range(100) for name, what in kinds))
    settings = {"labelling": {"rules": [UP, DOWN], "conflicts": "Drop"}}
    data, report = job.prepare(file, **settings), job.report()
    assert data.rows_kept == 200
    monkeypatch.setattr(pipeline, "BATCH_ROWS", 7)
    monkeypatch.setattr(pipeline, "process_count", lambda size: 2)
    assert (job.prepare(file, **settings), job.report()) == (data, report)


def test_generation_has_no_report_on_labels(job, tmp_path):
    from tests.models import save_tiny_llama

    model = save_tiny_llama(tmp_path / "llama")
    plan = make_plan(
        tmp_path / "workspace",
        Stage.PREPARE,
        task="Generation",
        model={"location": {"uri": "file://m", "path": str(model)}},
        dataset={"sources": [job.source(job.write("a.txt", *(f"line {n}" for n in range(60))))]},
    )
    result = run(plan, Telemetry(plan.stage, plan.job))
    assert result.prepare.data.conflicting_rows is None
    assert job.report().labelling is None
