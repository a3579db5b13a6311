"""Rows that say the same, or nearly: found, counted, left out; and never on both sides of a split."""

import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.report import DataReport, Quarantined
from finetune_api.spec import Task
from finetune_trainer.data import groups
from finetune_trainer.data.duplicates import search, signatures
from finetune_trainer.data.duplicates.search import SignatureFiles, Similar, find_similar
from finetune_trainer.data.duplicates.signatures import NUMBERS, band_count, rows_per_band, shingles, sign
from finetune_trainer.data.examples import Conversation, Example, PlainText, Preference, PromptCompletion, Turn
from finetune_trainer.data.groups import flatten, join
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import save_tiny_bert
from tests.plans import make_plan

WORDS = [f"word{number}" for number in range(4000)]


def jaccard(one: Example, other: Example) -> float:
    first, second = set(shingles(one)), set(shingles(other))
    return len(first & second) / len(first | second)


def variants(rng: random.Random, count: int, copies: int = 4, length: int = 120) -> list[Example]:
    """Texts, each followed by copies in which some words are others."""
    texts: list[Example] = []
    for _ in range(count):
        words = rng.choices(WORDS, k=length)
        texts.append(PlainText(" ".join(words)))
        for _ in range(copies):
            copy = list(words)
            for place in rng.sample(range(length), rng.randint(0, length // 8)):
                copy[place] = rng.choice(WORDS)
            texts.append(PlainText(" ".join(copy)))
    return texts


def similar_rows(folder: Path, examples: list[Example], similarity: float, labels: list[int] | None = None) -> Similar:
    with SignatureFiles(folder, similarity) as files:
        for start in range(0, len(examples), 100):
            files.add(sign(examples[start : start + 100], similarity))
        rows = len(examples)
        return find_similar(files, np.array(labels or [-1] * rows, np.int16), np.arange(rows, dtype=np.int32))


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95])
def test_similar_texts_are_found_and_others_are_not(tmp_path, similarity):
    texts = variants(random.Random(1), 60)
    found = similar_rows(tmp_path, texts, similarity)
    pairs = [(a, b) for head in range(0, 300, 5) for a, b in combinations(range(head, head + 5), 2)]
    exact = {pair: jaccard(texts[pair[0]], texts[pair[1]]) for pair in pairs}
    sure = [pair for pair, share in exact.items() if share >= similarity + 0.1]
    joined = {pair for pair in pairs if found.groups[pair[0]] == found.groups[pair[1]]}
    assert len(sure) > 20 or similarity == 0.95
    assert joined.issuperset(sure)
    for head in range(0, 300, 5):
        least = max(share for (a, b), share in exact.items() if a >= head and b < head + 5)
        if least < similarity - 0.12:
            assert list(found.groups[head : head + 5]) == list(range(head, head + 5))
    assert all(found.groups[row] // 5 == row // 5 for row in range(300))


@pytest.mark.parametrize("similarity", np.linspace(0.5, 0.99, 11))
def test_pairs_at_the_threshold_become_candidates(similarity):
    rows, bands = rows_per_band(similarity), band_count(similarity)
    assert rows * bands <= NUMBERS
    assert 1 - (1 - similarity**rows) ** bands >= 0.99


def test_signatures_are_the_same_on_every_machine():
    """They decide which rows are trained on: a library that computes others must not go unseen."""
    signed = sign([PlainText("the profit of the group rose to ten million")], 0.8)
    assert signed.signatures[0, :4].tolist() == [27741, 6746, 20343, 43378]
    assert signed.bands.shape == (21, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Profit  ROSE, to ten million.", "profit rose to ten million"),
        ("営業利益は十億円に増加した", "営業利益は十億円に 増加した。"),
        ("กำไรสุทธิเพิ่มขึ้น", "กำไร สุทธิ เพิ่มขึ้น"),
    ],
)
def test_case_punctuation_and_space_are_not_compared(one, other):
    assert shingles(PlainText(one)) == shingles(PlainText(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Profit changed by -5 % in May", "Profit changed by 5 % in May"),
        ("the sum x + y is known", "the sum x - y is known"),
        ("the value x * y is known", "the value x / y is known"),
        ("Sort a list in C++ please", "Sort a list in C# please"),
        ("Über C++ reden wir heute", "Über C# reden wir heute"),
        ("काम कम हो गया", "किम कम हो गया"),
    ],
)
def test_signs_and_vowel_signs_are_compared(one, other):
    assert jaccard(PlainText(one), PlainText(other)) < 0.8


@given(st.text(st.sampled_from("aB1_ +-*/#%<.,\n"), max_size=40))
def test_ascii_is_parted_like_other_text(text):
    assert signatures.ASCII_WORD.findall(text) == signatures.WORD.findall(text)


def test_what_the_system_says_is_not_compared():
    def chat(question: str) -> Example:
        turns = (Turn("system", "You are an analyst of a bank."), Turn("user", question), Turn("assistant", "It rose."))
        return Conversation(turns)

    assert jaccard(chat("What of the profit?"), chat("And the dividend, please?")) == 0


@given(st.text(max_size=30))
def test_every_text_has_a_signature(text):
    pair = Preference(PromptCompletion(text, "a"), PromptCompletion(text, "b"))
    for example in (PlainText(text), PromptCompletion(text, text), pair):
        assert shingles(example) and sign([example], 0.8).signatures.shape == (1, NUMBERS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90))
def test_rows_that_are_added_leave_what_was_decided(tmp_path_factory, seed, count):
    rng = random.Random(seed)
    texts = variants(rng, 30, copies=2, length=20)
    rng.shuffle(texts)
    labels = [rng.randint(0, 1) for _ in texts]
    folder = tmp_path_factory.mktemp("signatures")
    whole = similar_rows(folder / "all", texts, 0.6, labels)
    part = similar_rows(folder / "part", texts[:count], 0.6, labels[:count])
    assert part.repeats.tolist() == whole.repeats[:count].tolist()
    again = similar_rows(folder / "again", texts, 0.6, labels)
    assert again.groups.tolist() == whole.groups.tolist()


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_groups_are_what_can_be_reached(pairs):
    earlier, later = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    groups = np.arange(20, dtype=np.int32)
    join(groups, earlier, later)
    flatten(groups)
    reached = {row: {row} for row in range(20)}
    for one, other in pairs:
        both = reached[one] | reached[other]
        for row in both:
            reached[row] = both
    assert groups.tolist() == [min(reached[row]) for row in range(20)]


def test_labels_that_differ_make_no_repeat(tmp_path):
    text = PlainText(" ".join(WORDS[:50]))
    found = similar_rows(tmp_path, [text, text, text], 0.8, labels=[0, 1, 0])
    assert found.groups.tolist() == [0, 0, 0]
    assert found.repeats.tolist() == [False, False, True]


def test_parts_of_a_band_find_what_the_whole_finds(tmp_path, monkeypatch):
    texts = variants(random.Random(2), 50)
    whole = similar_rows(tmp_path / "whole", texts, 0.8)
    monkeypatch.setattr(groups, "ROWS_AT_ONCE", 40)
    monkeypatch.setattr(search, "PAIRS_AT_ONCE", 7)
    parts = similar_rows(tmp_path / "parts", texts, 0.8)
    assert parts.groups.tolist() == whole.groups.tolist()
    assert parts.repeats.tolist() == whole.repeats.tolist()


# --- through the whole stage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def prepare(tmp_path, model):
    def prepare(train: list[tuple[str, str]], test: list[tuple[str, str]] | None = None, **duplicates) -> DataReport:
        def source(name: str, rows: list[tuple[str, str]]) -> list[dict]:
            lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
            (tmp_path / name).write_text("".join(lines))
            return [
                {"location": {"uri": f"file://{name}", "path": f"{tmp_path}/{name}"}, "field": "dataset.sources[0]"}
            ]

        plan: Plan = make_plan(
            tmp_path / "workspace",
            Stage.PREPARE,
            task=Task.CLASSIFICATION,
            model={"location": {"uri": "file://m", "path": str(model)}},
            dataset={
                "sources": source("train.jsonl", train),
                **({"test": {"sources": source("test.jsonl", test)}} if test else {}),
                "duplicates": duplicates,
            },
        )
        run(plan, Telemetry(plan.stage, plan.job))
        return DataReport.model_validate_json((tmp_path / "workspace" / "report" / "data.json").read_bytes())

    return prepare


def headlines(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(" ".join(rng.choices(WORDS, k=20)), ["good", "bad"][number % 2]) for number in range(count)]


def test_the_first_of_the_same_is_kept(prepare, tmp_path):
    rows = headlines(100)
    report = prepare([*rows, rows[3], (rows[4][0].replace(" ", "  "), rows[4][1]), (rows[5][0], "good")])
    assert report.rejections == {"duplicate": 2}
    assert report.duplicates.exact_rows == report.duplicates.rows_dropped == report.summary.duplicate_rows == 2
    assert report.duplicates.near_rows is None
    lines = (tmp_path / "workspace" / "report" / "quarantine.jsonl").read_text().splitlines()
    assert [Quarantined.model_validate_json(line).line for line in lines] == [101, 102]


def test_nearly_the_same_is_left_out_if_it_is_asked_for(prepare):
    rows = headlines(100)
    near = [(f"{text} today", label) for text, label in rows[:10]]
    assert prepare([*rows, *near]).rejections == {}
    report = prepare([*rows, *near, rows[50]], similarity=0.8)
    assert report.rejections == {"near duplicate": 10, "duplicate": 1}
    assert (report.duplicates.exact_rows, report.duplicates.near_rows) == (1, 10)
    assert report.duplicates.group_sizes == {"2": 11}
    assert report.duplicates.note is None


def test_what_is_kept_is_only_counted(prepare):
    rows = headlines(100)
    report = prepare([*rows, *rows[:30]], similarity=0.8, action="Keep")
    assert report.summary.rows_kept == 130
    assert (report.duplicates.exact_rows, report.duplicates.rows_dropped) == (30, 0)


def test_rows_like_those_of_a_test_source_are_not_learned(prepare):
    rows = headlines(100)
    test = [*((f"{text} today", label) for text, label in rows[:7]), *headlines(20, seed=5)]
    assert prepare(rows, test).rejections == {}
    report = prepare(rows, [*test, test[-1]], similarity=0.8)
    assert report.rejections == {"held-out duplicate": 7}
    assert report.duplicates.held_out_rows == 7
    assert report.summary.test_rows == len(test) + 1, "rows of a test source stay, whatever they repeat"


def test_similar_rows_are_in_one_split(prepare):
    """With their labels changed they are no duplicates, and yet would give the answer away."""
    rows = headlines(300)
    twins = [(f"{text} today", "bad" if label == "good" else "good") for text, label in rows]
    report = prepare([*rows, *twins], similarity=0.8)
    assert report.summary.rows_kept == 600
    assert report.summary.validation_rows % 2 == 0


def test_one_large_group_is_remarked(prepare):
    instruction = " ".join(WORDS[:200])
    rows = [(f"{instruction} {text.split()[0]} {number}", label) for number, (text, label) in enumerate(headlines(60))]
    report = prepare([*rows, *headlines(100)], similarity=0.8)
    assert report.duplicates.largest_group == 60
    assert "38%" in report.duplicates.note and "similarity" in report.duplicates.note
