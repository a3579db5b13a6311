"""The example's data: enough of it, balanced, valid, and nothing of validation or test seen in training."""

import json
import re
from collections import Counter
from collections.abc import Set
from itertools import combinations
from pathlib import Path

import pytest
from finetune_operator.manifest_file import read_job

EXAMPLE = Path(__file__).parents[3] / "examples" / "financial-sentiment"
SPLITS = ("train", "validation", "test")
LABELS = ["negative", "neutral", "positive"]

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    files = {split: EXAMPLE / "data" / f"{split}.jsonl" for split in SPLITS}
    return {split: [json.loads(line) for line in file.read_text().splitlines()] for split, file in files.items()}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def grams(text: str, length: int) -> set[tuple[str, ...]]:
    """Runs of so many words."""
    tokens = words(text)
    return {tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)}


def overlap(one: Set[object], other: Set[object]) -> float:
    """Jaccard index."""
    return len(one & other) / max(1, len(one | other))


def test_there_are_at_least_a_thousand_rows(rows):
    assert sum(map(len, rows.values())) >= 1000
    assert len(rows["test"]) >= 200
    assert len(rows["validation"]) >= 200


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_a_labelled_headline(rows, split):
    for row in rows[split]:
        assert set(row) == {"text", "label"}
        assert row["label"] in LABELS
        assert row["text"] == row["text"].strip()
        assert row["text"].isprintable()
        assert 4 <= len(row["text"].split()) <= 30, row["text"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_labels_are_balanced(rows, split):
    counts = Counter(row["label"] for row in rows[split])
    assert set(counts) == set(LABELS)
    assert max(counts.values()) <= 1.2 * min(counts.values())


def test_no_two_rows_say_nearly_the_same(rows):
    """Least of all across splits, where such a pair would make the scores too good."""
    splits, texts = zip(*((split, row["text"]) for split in SPLITS for row in rows[split]), strict=True)
    with_pair_of_words: dict[tuple[str, ...], list[int]] = {}
    for number, text in enumerate(texts):
        for pair in grams(text, 2):
            with_pair_of_words.setdefault(pair, []).append(number)
    alike = {pair for numbers in with_pair_of_words.values() for pair in combinations(numbers, 2)}
    near = []
    for one, other in alike:
        most_trigrams, most_words = (0.5, 0.6) if splits[one] == splits[other] else (0.2, 0.4)
        trigrams = overlap(grams(texts[one], 3), grams(texts[other], 3))
        if trigrams >= most_trigrams or overlap({*words(texts[one])}, {*words(texts[other])}) >= most_words:
            near.append((texts[one], texts[other]))
    assert near == []


def test_the_manifest_is_valid_and_uses_them():
    spec = read_job(EXAMPLE / "finetunejob.yaml").spec
    assert spec.dataset.labels == LABELS
    sources = [spec.dataset.sources, spec.dataset.validation.sources, spec.dataset.test.sources]
    assert [source.uri for (source,) in sources] == [f"file://data/{split}.jsonl" for split in SPLITS]
    gate = spec.evaluation.gate
    assert (gate.metric, gate.minimum, gate.minimum_gain) == ("macroF1", 0.80, 0.35)
