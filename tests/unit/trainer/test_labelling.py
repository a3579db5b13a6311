"""Labels of rows: as they stand there, by alias, by rules; which rows contradict each other, and whether there are enough."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finetune_api.dataset import ConflictAction, DataFormat, LabelRule
from finetune_api.plan import PlanDataset, PlanSource
from finetune_api.report import RuleReport
from finetune_trainer.data import label_rules
from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.label_conflicts import find_conflicts
from finetune_trainer.data.label_rules import LabelRules
from finetune_trainer.data.labels import balance, check_minimum
from finetune_trainer.data.ledger import Ledger
from finetune_trainer.data.read import RawRow
from finetune_trainer.data.split import Split
from finetune_trainer.data.work import Batch, BatchWorker, Log, WorkedBatch
from finetune_trainer.errors import UserError
from hypothesis import given
from hypothesis import strategies as st

LABELS = ["negative", "neutral", "positive"]
SOURCE = PlanSource.model_validate({"location": {"uri": "file://a"}, "field": "dataset.sources[0]"})
UP = {"name": "up", "label": "positive", "keywords": ["rises"]}
DOWN = {"name": "down", "label": "negative", "keywords": ["falls"]}


def dataset(*rules: dict, labels: list[str] | None = LABELS, **settings: Any) -> PlanDataset:
    more = {key: settings.pop(key) for key in ("clean", "personalData") if key in settings}
    labelling = {**settings, **({"rules": list(rules)} if rules else {})}
    return PlanDataset.model_validate(
        {"sources": [], "validation": {"fraction": 0.1}, "labels": labels, "labelling": labelling, **more}
    )


def work(settings: PlanDataset, *rows: dict) -> WorkedBatch:
    batch = [RawRow(line, row) for line, row in enumerate(rows, start=1)]
    return BatchWorker(settings).work(Batch(0, SOURCE, DataFormat.LABELLED_TEXT, batch))


def labelled(settings: PlanDataset, *rows: dict) -> list[str | tuple[str, bool]]:
    """What becomes of each row: its label, or why it is left out and whether it is invalid."""
    batch = work(settings, *rows)
    kept = dict(zip(batch.lines, batch.labels or (), strict=True))
    rejected = {row.rejection.line: (row.rejection.reason, row.invalid) for row in batch.rejected}
    return [kept.get(line) or rejected[line] for line in range(1, len(rows) + 1)]


def with_labels(*labels: Any) -> list[dict]:
    return [{"text": "profit", "label": label} for label in labels]


# --- aliases and the closed set


def test_aliases_are_replaced_and_counted():
    settings = dataset(aliases={"pos": "positive", "1": "positive", " neg ": "negative", "unused": "neutral"})
    rows = with_labels("pos", " pos\n", 1, 1.0, "neg", "neutral")
    assert labelled(settings, *rows) == ["positive"] * 4 + ["negative", "neutral"]
    assert work(settings, *rows).log.labelling.aliases == {"pos": 2, "1": 2, "neg": 1, "unused": 0}


def test_the_case_of_labels_and_aliases_counts():
    settings = dataset(aliases={"pos": "positive"})
    assert labelled(settings, *with_labels("Pos", "Positive")) == [("label is unknown", True)] * 2


def test_aliases_need_no_closed_set():
    assert labelled(dataset(labels=None, aliases={"pos": "good"}), *with_labels("pos", "other")) == ["good", "other"]


def test_an_unknown_label_is_not_quoted_but_its_like_in_the_spec_is():
    batch = work(dataset(), *with_labels("POSITIVE", "my secret"))
    assert [(row.rejection.reason, row.rejection.detail) for row in batch.rejected] == [
        ("label is unknown", "dataset.labels has 'positive', in another case"),
        ("label is unknown", "dataset.labels does not list it"),
    ]


def test_a_table_with_a_label_that_is_not_listed_is_refused():
    stars = {"name": "stars", "table": {"5": "positive", "4": "great"}}
    with pytest.raises(UserError, match=r"rules\[0\].table: 'great' is a label that dataset.labels does not list"):
        BatchWorker(dataset(stars))


def test_rows_without_a_label_are_invalid_where_no_rule_can_give_one():
    rows = [*with_labels(None, " ", float("nan")), {"text": "profit"}]
    assert labelled(dataset(), *rows) == [
        ("label is missing", True),
        ("label is empty", True),
        ("label is missing", True),
        ("label is missing", True),
    ]


# --- weak labels


def test_the_label_with_the_most_votes_is_given():
    settings = dataset(UP, {**UP, "name": "up-too", "keywords": ["profit"]}, DOWN)
    rows = [{"text": text} for text in ("profit rises", "profit falls", "profit rises, sales falls", "nothing")]
    assert labelled(settings, *rows) == [
        "positive",
        ("rules disagree", False),
        "positive",
        ("no rule labels it", False),
    ]


def test_a_label_that_a_row_has_stays():
    rows = [{"text": "it rises", "label": "neutral"}, {"text": "it rises", "label": " "}, {"text": "it rises"}]
    batch = work(dataset(UP), *rows)
    assert (batch.labels, list(batch.weak)) == (["neutral", "positive", "positive"], [0, 1, 1])


def test_an_unknown_label_is_not_replaced_by_a_rules():
    assert labelled(dataset(UP), {"text": "it rises", "label": "up"}) == [("label is unknown", True)]


@pytest.mark.parametrize(
    ("keyword", "text", "votes"),
    [
        ("loss", "A LOSS, again", True),
        ("loss", "glossy", False),
        ("loss", "losses", False),
        ("loss", "loss_", False),
        ("loss", "net-loss", True),
        ("profit warning", "Profit \n warning", True),
        ("profit  warning", "a profit\u00a0warning", True),
        ("profit warning", "profit warnings", False),
        ("ärger", "ÄRGER!", True),
        ("ärger", "verärgert", False),
        ("cafe", "café", False),
        ("cafe", "cafe\u0301", False),
        ("C++", "in c++.", True),
        ("a.b", "axb", False),
        ("потеря", "Потеря года", True),
        ("up", "up", True),
    ],
)
def test_keywords_are_whole_words(keyword, text, votes):
    rules = LabelRules([LabelRule(name="r", label="x", keywords=["unheard of", keyword])])
    assert rules.votes(text, {}) == ({0: "x"} if votes else {})


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("5", "positive"),
        (" 5 ", "positive"),
        (5, "positive"),
        (5.0, "positive"),
        (4.5, "neutral"),
        (True, "negative"),
        ("15", None),
        ("A", "neutral"),
        ("a", None),
        (None, None),
        ("", None),
        ([5], None),
        (float("inf"), None),
        ("\ud800", None),
    ],
)
def test_a_table_compares_the_whole_value_of_its_column(value, label):
    table = {"5": "positive", "4.5": "neutral", "true": "negative", "A": "neutral"}
    settings = dataset({"name": "stars", "column": "stars", "table": table})
    assert labelled(settings, {"text": "5", "stars": value}) == [label or ("no rule labels it", False)]


def test_patterns_and_keywords_can_look_at_columns():
    settings = dataset(
        {"name": "section", "label": "negative", "pattern": "^court", "column": "section"},
        {"name": "author", "label": "neutral", "keywords": ["agency"], "column": "author"},
    )
    rows = [
        {"text": "court", "section": "courts"},
        {"text": "court", "section": "Courts"},
        {"text": "x", "author": "News Agency"},
    ]
    assert labelled(settings, *rows) == ["negative", ("no rule labels it", False), "neutral"]


def test_rules_look_at_the_cleaned_text_before_personal_data_is_replaced():
    settings = dataset(
        {"name": "mail", "label": "negative", "pattern": "joe@example[.]com"},
        {"name": "footer", "label": "positive", "keywords": ["unsubscribe"]},
        clean={"dropLines": ["^Unsubscribe"]},
        personalData={"settings": {"action": "Redact"}},
    )
    batch = work(settings, {"text": "Write to joe@example.com\nUnsubscribe here"})
    assert batch.examples.unpack() == [LabelledText("Write to [EMAIL]", "negative")]


def test_the_report_tells_how_rules_vote():
    """Votes of the rules a b c: n for negative, p for positive."""
    rules = [{"name": name, "column": name, "table": {"n": "negative", "p": "positive"}} for name in ("a", "b", "c")]
    rows = [("n", "n", ""), ("n", "p", ""), ("", "p", ""), ("n", "", "", "positive"), ("p", "n", "", "positive")]
    settings = dataset(*rules)
    batch = [
        {"text": "x", "a": a, "b": b, "c": c, **({"label": label[0]} if label else {})} for a, b, c, *label in rows
    ]
    expected = {
        "a": RuleReport(votes=4, overlaps=3, conflicts=2, judged=2, right=1, accuracy=0.5),
        "b": RuleReport(votes=4, overlaps=3, conflicts=2, judged=1, right=0, accuracy=0.0),
        "c": RuleReport(votes=0, overlaps=0, conflicts=0, judged=0, right=0),
    }
    assert work(settings, *batch).log.labelling.rules.report() == expected
    log = Log()
    for row in batch:
        log.merge(work(settings, row).log)
    assert (log.labelling.rules.report(), log.labelling.rules.rows) == (expected, 5)


WORDS = st.sampled_from(["rises", "falls", "profit", "it", "not", "fall", "rise"])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=6), st.lists(WORDS, max_size=8))
def test_looking_for_all_words_at_once_finds_what_each_word_finds(keywords, text):
    rules = [LabelRule(name=f"r{n}", label=str(n), keywords=words) for n, words in enumerate(keywords)]
    expected = {n: str(n) for n, words in enumerate(keywords) if set(words) & set(text)}
    assert LabelRules(rules).votes(" ".join(text), {}) == expected


def test_rules_that_are_too_much_for_one_pass_are_tried_one_by_one(monkeypatch):
    """An RE2 set whose automaton runs out of memory finds nothing, not even the empty pattern."""

    class Exhausted:
        SearchSet = staticmethod(
            lambda options: SimpleNamespace(Add=lambda pattern: 0, Compile=lambda: None, Match=lambda text: [])
        )

    monkeypatch.setattr(label_rules.re2, "Set", Exhausted)
    rules = LabelRules([LabelRule(**UP), LabelRule(**DOWN)])
    assert rules.votes("it falls", {}) == {1: "negative"}


def test_rules_that_are_too_large_together_are_tried_one_by_one(monkeypatch):
    monkeypatch.setattr(label_rules, "AUTOMATON_BYTES", 1 << 20)
    words = [[f"{'abcdefghij'[n]}{m:050}" for m in range(40)] for n in range(10)]
    rules = LabelRules([LabelRule(name=f"r{n}", label=str(n), keywords=some) for n, some in enumerate(words)])
    assert rules.votes(f"{words[3][7]} {words[9][0]}", {}) == {3: "3", 9: "9"}


def test_a_pattern_that_is_too_large_is_named():
    huge = r"(?i)(\pL{1000}|\pN{1000}|[^\pL]{1000}|[^\pN]{1000})"
    with pytest.raises(UserError, match=r"dataset\.labelling\.rules\[1\]: its pattern is too large"):
        BatchWorker(dataset(UP, {"name": "huge", "label": "positive", "pattern": huge * 5}))


def test_as_many_rules_as_there_may_be_are_one_pass():
    words = [f"{'abcdefghij'[n % 10] * 50}{n:04}" for n in range(32 * 128)]
    rules = LabelRules(
        [LabelRule(name=f"r{n}", label=str(n), keywords=words[128 * n : 128 * n + 128]) for n in range(32)]
    )
    assert rules.votes(f"{words[0]} {words[-1].upper()} {words[130]}x", {}) == {0: "0", 31: "31"}


def test_the_ledger_knows_which_rows_rules_have_labelled():
    ledger = Ledger()
    ledger.add(Split.TEST, work(dataset(UP), {"text": "it rises", "label": "neutral"}, {"text": "that rises"}))
    ledger.add(Split.TRAIN, work(dataset(UP), {"text": "this rises"}))
    ledger.close()
    assert ledger.weak_by_split() == {"test": 1, "validation": 0, "train": 1}


# --- conflicts


def conflicts(groups: list[int], labels: list[int], action: ConflictAction) -> list[int]:
    """The rows that are not trained on."""
    found = find_conflicts(np.array(groups, np.int32), np.array(labels, np.int16))
    return np.flatnonzero(found.unwanted(action, np.ones(len(groups), np.bool_))).tolist()


@pytest.mark.parametrize(
    ("action", "left_out"),
    [(ConflictAction.KEEP, []), (ConflictAction.DROP, [0, 1, 3, 4, 5]), (ConflictAction.MAJORITY, [1, 4, 5])],
)
def test_rows_of_a_text_with_several_labels_are_left_out(action, left_out):
    """Text 0 has label 7 twice and 8 once, text 2 one label, text 4 a tie."""
    assert conflicts([0, 0, 2, 0, 4, 4], [7, 8, 7, 7, 7, 8], action) == left_out


def test_a_majority_is_more_than_half():
    assert conflicts([0, 0, 0, 0], [1, 1, 2, 3], ConflictAction.MAJORITY) == [0, 1, 2, 3]


def test_rows_that_are_not_trained_on_stay_and_are_counted():
    found = find_conflicts(np.array([0, 0, 2, 2], np.int32), np.array([0, 1, 0, 1], np.int16))
    training = np.array([True, True, False, False])
    unwanted = found.unwanted(ConflictAction.DROP, training)
    assert unwanted.tolist() == [True, True, False, False]
    report = found.report(~training, int(unwanted.sum()))
    assert (report.groups, report.rows, report.held_out_rows, report.rows_dropped) == (2, 4, 2, 2)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30))
def test_conflicts_are_those_that_counting_finds(rows):
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    votes = {text: Counter(label for other, label in rows if other == text) for text in texts}
    groups = [texts.index(text) for text in texts]
    several = [n for n, (text, _) in enumerate(rows) if len(votes[text]) > 1]
    minority = [n for n in several if 2 * votes[texts[n]][labels[n]] <= votes[texts[n]].total()]
    assert conflicts(groups, labels, ConflictAction.DROP) == several
    assert conflicts(groups, labels, ConflictAction.MAJORITY) == minority


# --- enough of each


def test_labels_with_too_few_rows_are_named_if_the_spec_lists_them():
    rows = {"a": 3, "b": 50, "c": 0, "d": 49, "e": 1, "f": 2}
    with pytest.raises(UserError) as caught:
        check_minimum(rows, [*rows], 50, [*rows])
    assert "'a' has 3, 'c' has 0, 'd' has 49, and 2 more have too few" in caught.value.message
    with pytest.raises(UserError) as caught:
        check_minimum({"secret": 3, "b": 50}, ["secret", "b"], 50, None)
    assert "1 of the 2 labels have less, the rarest 3" in caught.value.message
    assert "secret" not in caught.value.message
    check_minimum(rows, ["b", "d"], 49, None)


def test_the_balance_is_told_and_extremes_are_noted():
    even = balance({"a": 60, "b": 40}, ["a", "b"])
    assert even is not None
    assert (even.majority_share, even.imbalance_ratio, even.note) == (0.6, 1.5, None)
    odd = balance({"a": 990, "b": 9}, ["a", "b"])
    assert odd is not None and odd.note is not None
    assert "110 rows of the commonest label for each of the rarest (9 rows)" in odd.note
    assert "accuracy of 0.991" in odd.note
    assert balance({"a": 5, "b": 0}, ["a", "b"]) is None
