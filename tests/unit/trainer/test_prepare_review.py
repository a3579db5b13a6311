"""dataset.review in the stage as a whole: wrong labels are found, shown, decided on by people, and taken in."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from finetune_api.constants import Stage
from finetune_api.plan import Plan, PlanSample
from finetune_api.report import DataReport, Quarantined, ReviewRow
from finetune_api.spec import Task
from finetune_trainer.data import pipeline
from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.split import input_key, row_hash
from finetune_trainer.data.store import open_split, read_manifest
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry

from tests.models import save_tiny_bert
from tests.plans import make_plan

WORDS = {
    "negative": ["loss", "falls", "warning", "default", "slump", "fined", "strike", "cuts", "lawsuit", "recall"],
    "neutral": [
        "appoints",
        "meeting",
        "agenda",
        "moves",
        "office",
        "calendar",
        "publishes",
        "schedule",
        "table",
        "minutes",
    ],
    "positive": ["profit", "rises", "record", "beats", "wins", "growth", "upgrade", "dividend", "jumps", "surges"],
}
LABELS = list(WORDS)


def headlines(count: int, seed: int = 0) -> list[dict]:
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        label = LABELS[number % 3]
        words = chance.choices(WORDS[label], k=6) + chance.choices(WORDS[chance.choice(LABELS)], k=1)
        rows.append({"text": f"Firm {number} {' '.join(words)}", "label": label})
    return rows


def spoil(rows: list[dict], share: float = 0.08) -> tuple[list[dict], dict[str, str]]:
    """The rows with wrong labels, and the right ones of those: text -> label."""
    chance, right = random.Random(1), {}
    spoiled = []
    for row in rows:
        wrong = chance.random() < share
        label = chance.choice([label for label in LABELS if label != row["label"]]) if wrong else row["label"]
        right |= {row["text"]: row["label"]} if wrong else {}
        spoiled.append(row | {"label": label})
    return spoiled, right


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


class Desk:
    """A job's files, and its plan with dataset.review."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model

    def write(self, name: str, rows: list[dict]) -> Path:
        path = self.root / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def plan(self, *, decisions: tuple[str, ...] = (), job: str = "job", review=None, **dataset) -> Plan:
        files = [self.source(name, f"dataset.review.decisions[{n}]") for n, name in enumerate(decisions)]
        return make_plan(
            self.root / job,
            Stage.PREPARE,
            task=Task.CLASSIFICATION,
            model={"location": {"uri": "file://m", "path": str(self.model)}},
            dataset={
                "sources": [self.source("train.jsonl", "dataset.sources[0]")],
                "review": {"max_rows": 1000, "decisions": files, **(review or {})},
                **dataset,
            },
        )

    def source(self, name: str, field: str) -> dict:
        return {"location": {"uri": f"file://{name}", "path": str(self.root / name)}, "field": field}

    def prepare(self, **changes) -> DataReport:
        plan = self.plan(**changes)
        run(plan, Telemetry(plan.stage, plan.job))
        return DataReport.model_validate_json((self.report(plan.workspace) / "data.json").read_bytes())

    def report(self, workspace: str | Path = "") -> Path:
        return Path(workspace or self.root / "job") / "report"

    def queue(self) -> list[ReviewRow]:
        return [ReviewRow.model_validate_json(line) for line in (self.report() / "review.jsonl").open()]


@pytest.fixture
def desk(tmp_path, model):
    return Desk(tmp_path, model)


def test_wrong_labels_are_found_decided_and_corrected(desk):
    rows, right = spoil(headlines(900))
    desk.write("train.jsonl", rows)
    first = desk.prepare(review={"suspect_weight": 0.25})
    training = {row["text"]: row["label"] for row in rows if split_of(desk, row["text"]) == "train"}
    wrong = {text: label for text, label in right.items() if text in training}

    queue = desk.queue()
    shown = {row.text for row in queue}
    assert len(shown & wrong.keys()) >= 0.9 * len(wrong)
    assert len(shown & wrong.keys()) >= 0.8 * len(shown)
    assert shown <= training.keys(), "only training rows are judged"
    half = queue[: len(queue) // 2]
    assert sum(row.text in wrong for row in half) >= 0.9 * len(half), "the most suspicious come first"
    assert all(row.suggested == wrong.get(row.text, row.suggested) for row in half)
    for row in queue:
        assert row.label == training[row.text] and row.decision == "" and row.reasons == ["LikelyWrong"]
        assert rows[row.line - 1]["text"] == row.text and row.uri == "file://train.jsonl"
    assert (first.review.suspicious_rows, first.review.exported_rows) == (len(queue), len(queue))
    assert first.summary.suspicious_rows == len(queue)
    assert [(f.level, f.reason, f.field, f.rows) for f in first.findings] == [
        ("Warning", "LabelsDoubtful", "dataset.review", len(queue))
    ]
    page = (desk.report() / "data.html").read_text()
    assert "Judged rows" in page and not any(row.text in page for row in queue), "no text of the dataset"
    assert first.review.judged_rows == first.summary.train_rows
    assert sum(pair.rows for pair in first.review.pairs) == len(queue)
    assert first.review.accuracy > 0.8
    assert 0.04 < first.review.estimated_error_share < 0.16

    weights = stored(desk).weights
    assert sorted(set(weights.tolist())) == [0.25, 1.0]
    assert np.count_nonzero(weights == 0.25) == len(queue)

    # a person corrects the labels, drops one row and confirms the rest
    decisions = [json.loads(line) for line in (desk.report() / "review.jsonl").read_text().splitlines()]
    dropped = decisions[0]["text"]
    for row in decisions:
        row["decision"] = "drop" if row["text"] == dropped else wrong.get(row["text"], "keep")
    desk.write("reviewed.jsonl", decisions)
    second = desk.prepare(decisions=("reviewed.jsonl",), review={"suspect_weight": 0.25})
    found = second.review.decisions
    corrected = shown & wrong.keys() - {dropped}
    assert (found.corrected, found.dropped, found.confirmed) == (len(corrected), 1, len(shown) - len(corrected) - 1)
    assert (found.unknown, found.undecided, found.held_out) == (0, 0, 0)
    assert list(found.files) == ["file://reviewed.jsonl"]
    assert second.review.suspicious_rows < len(queue) / 4
    assert not shown & {row.text for row in desk.queue()}, "nobody is asked twice"
    assert second.review.accuracy > first.review.accuracy
    assert second.review.judged_rows == first.review.judged_rows - len(shown)
    assert second.rejections == {"dropped in review": 1}
    lines = [Quarantined.model_validate_json(line) for line in (desk.report() / "quarantine.jsonl").open()]
    assert [(line.uri, rows[line.line - 1]["text"]) for line in lines] == [("file://train.jsonl", dropped)]
    counts = dict.fromkeys(LABELS, 0)
    for text, label in training.items():
        if text != dropped:
            counts[wrong[text] if text in corrected else label] += 1
    assert second.labels["train"] == counts
    assert second.summary.fingerprint != first.summary.fingerprint


def split_of(desk: Desk, text: str) -> str:
    return "validation" if input_key(LabelledText(text, "")) / 2**64 < 0.1 else "train"


def stored(desk: Desk):
    return open_split(desk.root / "job" / "data", "train")


def test_rows_are_only_flagged_unless_a_weight_is_given(desk):
    rows, _ = spoil(headlines(300))
    desk.write("train.jsonl", rows)
    flagged = desk.prepare()
    assert flagged.review.suspicious_rows > 0
    assert stored(desk).weights is None
    data = [path.read_bytes() for path in sorted((desk.root / "job" / "data").rglob("*.arrow"))]
    assert desk.prepare(review={"suspect_weight": 1}).summary == flagged.summary
    assert [path.read_bytes() for path in sorted((desk.root / "job" / "data").rglob("*.arrow"))] == data
    weighted = desk.prepare(review={"suspect_weight": 0})
    assert weighted.summary.fingerprint != flagged.summary.fingerprint
    assert weighted.summary.train_rows == flagged.summary.train_rows, "nothing is left out"
    assert read_manifest(desk.root / "job" / "data").splits["train"].rows == flagged.summary.train_rows


def test_held_out_rows_neither_teach_nor_are_judged(desk):
    rows, _ = spoil(headlines(300))
    desk.write("train.jsonl", rows)
    desk.write("held-out.jsonl", headlines(60, seed=5))
    split = {"sources": [desk.source("held-out.jsonl", "dataset.test.sources[0]")]}
    first = desk.prepare(test=split)
    before = desk.queue()
    desk.write("held-out.jsonl", [row | {"label": "negative"} for row in headlines(60, seed=5)])
    assert desk.prepare(test=split).review == first.review
    assert desk.queue() == before


def test_the_outcome_does_not_depend_on_the_number_of_processes(desk, monkeypatch):
    rows, right = spoil(headlines(300))
    desk.write("train.jsonl", rows)
    desk.prepare()
    decisions = [{"rowHash": row.row_hash, "decision": right.get(row.text, "keep")} for row in desk.queue()[:10]]
    desk.write("reviewed.jsonl", decisions)
    one = desk.prepare(decisions=("reviewed.jsonl",))
    queue = (desk.report() / "review.jsonl").read_bytes()
    monkeypatch.setattr(pipeline, "process_count", lambda _: 2)
    monkeypatch.setattr(pipeline, "BATCH_ROWS", 40)
    assert desk.prepare(decisions=("reviewed.jsonl",)) == one
    assert (desk.report() / "review.jsonl").read_bytes() == queue


def test_a_hash_holds_for_cleaned_text_and_whatever_stands_beside_it(desk):
    rows, _ = spoil(headlines(300))
    desk.write("train.jsonl", [row | {"text": f"  {row['text']}\u200b, call +49 30 901820"} for row in rows])
    settings = {
        "clean": {"removeControlCharacters": True, "normalizeWhitespace": True},
        "personal_data": {"settings": {"action": "Redact"}},
    }
    desk.prepare(**settings)
    queue = desk.queue()
    assert all("[PHONE]" in row.text and "901820" not in row.text and "\u200b" not in row.text for row in queue)
    desk.write("reviewed.jsonl", [{"rowHash": row.row_hash, "decision": "keep"} for row in queue])
    more = headlines(30, seed=3) + [row | {"text": f"{row['text']} , call +49 30 901820"} for row in reversed(rows)]
    desk.write("train.jsonl", more)
    again = desk.prepare(decisions=("reviewed.jsonl",), **settings)
    assert again.review.decisions.unknown == len(queue), "a space before the comma is another text"
    more = headlines(30, seed=3) + [row | {"text": f"{row['text']},  call +49 30 90 18 20"} for row in reversed(rows)]
    desk.write("train.jsonl", more)
    again = desk.prepare(decisions=("reviewed.jsonl",), **settings)
    assert (again.review.decisions.unknown, again.review.decisions.confirmed) == (0, len(queue))


def test_the_same_text_with_two_labels_is_shown_once(desk):
    rows = headlines(300)
    text = next(row["text"] for row in rows if split_of(desk, row["text"]) == "train" and row["label"] == "neutral")
    desk.write("train.jsonl", [*rows, {"text": text, "label": "positive"}])
    report = desk.prepare()
    shown = [row for row in desk.queue() if row.text == text]
    assert len(shown) == 1
    assert shown[0].reasons == ["LikelyWrong", "ConflictingLabels"]
    assert (shown[0].label, shown[0].suggested) == ("positive", "neutral")
    assert report.labelling.conflicts.groups == 1
    desk.write("reviewed.jsonl", [{"rowHash": shown[0].row_hash, "decision": "neutral"}])
    report = desk.prepare(decisions=("reviewed.jsonl",))
    assert report.labelling.conflicts.groups == 0
    assert (report.review.decisions.corrected, report.review.decisions.confirmed) == (1, 1)


def test_near_duplicates_do_not_speak_for_each_other(desk):
    """Thirty copies of a wrong label, each a little different: the other rows are believed, not they."""
    rows, _ = spoil(headlines(300))
    text = f"Firm X {' '.join(WORDS['positive'])} in the second edition, part"
    copies = [{"text": f"{text} {number}", "label": "negative"} for number in range(30)]
    desk.write("train.jsonl", rows + copies)
    desk.prepare()
    assert sum("edition" in row.text for row in desk.queue()) < 15, "as copies of each other they look right"
    for action in ("Keep", "Drop"):
        report = desk.prepare(duplicates={"similarity": 0.7, "action": action})
        shown = [row for row in desk.queue() if "edition" in row.text]
        assert {(row.label, row.suggested) for row in shown} == {("negative", "positive")}
        assert len(shown) == (30 if action == "Keep" else 1)
        assert report.review.judged_rows == report.summary.train_rows


def test_the_queue_is_no_longer_than_asked_for_and_a_decision_holds_in_every_split(desk):
    rows, _ = spoil(headlines(300))
    desk.write("train.jsonl", rows)
    full = desk.prepare()
    whole = desk.queue()
    short = desk.prepare(review={"max_rows": 3})
    assert desk.queue() == whole[:3]
    assert short.review == full.review.model_copy(update={"exported_rows": 3})
    held_out = next(row for row in rows if split_of(desk, row["text"]) == "validation" and row["label"] == "neutral")
    desk.write("reviewed.jsonl", [{"rowHash": row_hash(held_out["text"]).hex(), "decision": "positive"}])
    again = desk.prepare(decisions=("reviewed.jsonl",))
    assert (again.review.decisions.corrected, again.review.decisions.held_out) == (1, 1)
    assert again.labels["validation"]["positive"] == full.labels["validation"]["positive"] + 1
    assert again.labels["train"] == full.labels["train"]


def test_too_little_to_judge_by_is_said_and_nothing_is_suspicious(desk):
    desk.write("train.jsonl", headlines(12))
    report = desk.prepare(validation={"fraction": 0.2})
    assert (report.review.judged_rows, report.review.suspicious_rows) == (0, 0)
    assert report.review.accuracy is None and report.review.estimated_error_share is None
    assert desk.queue() == []


def test_a_rare_label_is_not_suspicious_for_being_rare(desk):
    rows = [*headlines(300), *({"text": f"zebra {n}", "label": "rare"} for n in range(4))]
    desk.write("train.jsonl", rows)
    desk.prepare()
    assert not [row for row in desk.queue() if row.label == "rare"]


@pytest.mark.parametrize("label", ["keep", "drop"])
def test_a_label_that_would_be_taken_for_a_decision_is_refused(desk, label):
    rows = [row | {"label": label if row["label"] == "neutral" else row["label"]} for row in headlines(90)]
    desk.write("train.jsonl", rows)
    with pytest.raises(UserError, match=f"a label is '{label}', which is a decision in dataset.review"):
        desk.prepare()
    assert not (desk.report() / "review.jsonl").exists()
    assert desk.prepare(labelling={"aliases": {label: "neutral"}}).review.judged_rows > 60


def test_a_stop_is_answered(desk, monkeypatch):
    desk.write("train.jsonl", headlines(300))
    plan = desk.plan()
    telemetry = Telemetry(plan.stage, plan.job)
    update = telemetry.update

    def watch(**fields):
        update(**fields)
        if fields.get("activity") == "Looking for wrong labels":
            telemetry.stop_requested.set()

    monkeypatch.setattr(telemetry, "update", watch)
    with pytest.raises(Interrupted, match="stopped while looking for wrong labels"):
        run(plan, telemetry)
    assert not (desk.report() / "review.jsonl").exists()


HASH = "0123456789abcdef0123456789abcdef"
AT = r"dataset\.review\.decisions\[0\]: reviewed\.jsonl line "


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"rowHash": HASH, "decision": "good"}],
            AT + "1: the decision is neither a label of the data nor 'keep' nor 'drop'",
        ),
        ([{"rowHash": HASH, "decision": "Keep"}], AT + "1: the decision is neither a label"),
        ([{"rowHash": HASH, "decision": ["keep"]}], AT + "1: the decision is neither a label"),
        (
            [{"rowHash": HASH, "decision": "keep"}, {"rowHash": HASH, "decision": "drop"}],
            AT + "2: the decision contradicts that in " + AT + "1 on the same rowHash",
        ),
        (
            [{"rowHash": HASH, "decision": ""}, {"rowHash": HASH, "decision": " "}],
            AT + "1: the decision is empty, and so are all",
        ),
        ([{"rowHash": HASH, "decision": None}], AT + "1: the decision is empty"),
        ([{"rowHash": "1.23457E+31", "decision": "keep"}], AT + "1: rowHash is none: 32 digits"),
        ([{"rowHash": 7, "decision": "keep"}], AT + "1: rowHash is none: 32 digits"),
        ([{"decision": "keep"}], AT + "1: rowHash is missing"),
        ([{"rowHash": HASH}], AT + "1: decision is missing"),
        (['{"rowHash": }', {"rowHash": HASH, "decision": "keep"}], AT + "1: invalid JSON"),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_decision_that_cannot_be_carried_out_is_named(desk, rows, words, listed):
    desk.write("train.jsonl", headlines(30))
    (desk.root / "reviewed.jsonl").write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    with pytest.raises(UserError, match=words) as error:
        desk.prepare(decisions=("reviewed.jsonl",), **({"labels": LABELS} if listed else {}))
    assert error.value.exit_code == 64
    assert "good" not in str(error.value)


def test_empty_and_unknown_decisions_are_counted(desk):
    rows = headlines(30)
    desk.write("train.jsonl", rows)
    (desk.root / "a.csv").write_text(f"rowHash,text,decision\n{HASH},x,positive\n{HASH[::-1]},y,\n")
    desk.write("b.jsonl", [{"rowHash": HASH, "decision": "pos"}, {"rowHash": HASH, "decision": ""}])
    aliases = {"labels": LABELS, "labelling": {"aliases": {"pos": "positive"}}}
    found = desk.prepare(decisions=("a.csv", "b.jsonl"), **aliases).review.decisions
    assert (found.unknown, found.undecided, found.corrected, found.confirmed, found.dropped) == (1, 2, 0, 0, 0)


def test_of_a_sample_no_label_is_missed(desk):
    desk.write("train.jsonl", sorted(headlines(90), key=lambda row: row["label"]))
    desk.write("reviewed.jsonl", [{"rowHash": HASH, "decision": "positive"}])
    plan = desk.plan(decisions=("reviewed.jsonl",)).model_copy(update={"sample": PlanSample(rows=40, tokenize=False)})
    run(plan, Telemetry(plan.stage, plan.job))
    report = DataReport.model_validate_json((desk.report() / "data.json").read_bytes())
    told = [finding.message for finding in report.findings if finding.reason == "SampleTooSmall"]
    assert told == [
        "in the sample: reviewed.jsonl line 1: the decision is neither a label of the data nor 'keep' nor 'drop': correct it"
    ]
    plan = plan.model_copy(update={"sample": PlanSample(rows=20, tokenize=False)})
    run(plan, Telemetry(plan.stage, plan.job))  # one label is all that it has


def test_class_numbers_are_labels_as_elsewhere(desk):
    rows = [row | {"label": LABELS.index(row["label"])} for row in headlines(60)]
    desk.write("train.jsonl", rows)
    desk.write("reviewed.jsonl", [{"rowHash": row_hash(rows[0]["text"]).hex(), "decision": 2.0}])
    found = desk.prepare(decisions=("reviewed.jsonl",))
    assert found.review.decisions.corrected == 1
    assert sum(split["2"] for split in found.labels.values()) == 21


def test_prepared_data_is_used_again_only_with_the_same_decisions(desk):
    rows, _ = spoil(headlines(300))
    desk.write("train.jsonl", rows)

    def prepare(job: str, decisions: tuple[str, ...] = (), **review) -> DataReport:
        plan = desk.plan(job=job, decisions=decisions, review=review)
        plan = plan.model_copy(update={"cache": str(desk.root / "cache")})
        run(plan, Telemetry(plan.stage, plan.job))
        return DataReport.model_validate_json((desk.report(plan.workspace) / "data.json").read_bytes())

    first = prepare("one")
    assert prepare("two").reused
    queues = [(desk.report(desk.root / job) / "review.jsonl").read_bytes() for job in ("one", "two")]
    assert queues[0] == queues[1]
    decided = json.loads(queues[0].splitlines()[0])
    desk.write("reviewed.jsonl", [decided | {"decision": "keep"}])
    kept = prepare("three", ("reviewed.jsonl",))
    assert not kept.reused
    desk.write("reviewed.jsonl", [decided | {"decision": "drop"}])
    dropped = prepare("four", ("reviewed.jsonl",))
    assert not dropped.reused
    assert dropped.summary.rows_kept == kept.summary.rows_kept - 1 == first.summary.rows_kept - 1
    assert not prepare("five", suspect_weight=0.5).reused
