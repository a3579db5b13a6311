"""Scores against cases counted by hand, and against their definitions on wild ones."""

import math

import numpy as np
import pytest
from finetune_api.spec import Metric
from finetune_trainer.evaluate.baselines import majority_class
from finetune_trainer.evaluate.metrics import better, classification, generation
from hypothesis import given
from hypothesis import strategies as st

LABELS = ["a", "b", "c"]
IDS = st.integers(0, 2)
PAIRS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=50)


def score(true: list[int], predicted: list[int]):
    return classification("tuned", np.array(true), np.array(predicted), 0.5, LABELS)


def test_scores_counted_by_hand() -> None:
    result = score([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2])
    assert result.confusion == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert [(c.label, c.precision, c.recall, c.f1, c.support) for c in result.classes] == [
        ("a", 1.0, pytest.approx(2 / 3), pytest.approx(0.8), 3),
        ("b", 0.5, 0.5, 0.5, 2),
        ("c", 0.5, 1.0, pytest.approx(2 / 3), 1),
    ]
    assert result.metrics == pytest.approx(
        {
            "accuracy": 4 / 6,
            "macroF1": (0.8 + 0.5 + 2 / 3) / 3,
            "weightedF1": (3 * 0.8 + 2 * 0.5 + 2 / 3) / 6,
            "loss": 0.5,
        }
    )


def test_a_label_that_never_occurs_counts_as_0_in_macro_f1() -> None:
    result = score([0, 1], [0, 1])
    assert result.metrics["accuracy"] == 1
    assert result.metrics["macroF1"] == pytest.approx(2 / 3)
    assert result.metrics["weightedF1"] == 1


@given(PAIRS)
def test_scores_follow_their_definitions(pairs: list[tuple[int, int]]) -> None:
    true, predicted = [t for t, _ in pairs], [p for _, p in pairs]
    result = score(true, predicted)
    f1 = []
    for label in range(3):
        hits = sum(t == p == label for t, p in pairs)
        misses, alarms = sum(t == label != p for t, p in pairs), sum(p == label != t for t, p in pairs)
        f1.append(2 * hits / (2 * hits + misses + alarms) if hits else 0.0)
    assert [c.f1 for c in result.classes] == pytest.approx(f1)
    assert result.metrics["macroF1"] == pytest.approx(sum(f1) / 3)
    assert result.metrics["accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
    assert result.metrics["weightedF1"] == pytest.approx(sum(f1[t] for t in true) / len(true))


@given(PAIRS, st.permutations(range(3)))
def test_macro_f1_does_not_depend_on_the_order_of_the_labels(pairs: list[tuple[int, int]], order: list[int]) -> None:
    plain = score([t for t, _ in pairs], [p for _, p in pairs]).metrics["macroF1"]
    renamed = score([order[t] for t, _ in pairs], [order[p] for _, p in pairs]).metrics["macroF1"]
    assert renamed == pytest.approx(plain)


def test_the_majority_baseline_knows_the_training_rows_only() -> None:
    train, test = np.array([1, 1, 1, 0]), np.array([0, 0, 1])
    result = majority_class(train, test, ["a", "b"])
    assert result.confusion == [[0, 2], [0, 1]]
    assert result.metrics["accuracy"] == pytest.approx(1 / 3)
    assert result.metrics["macroF1"] == pytest.approx(0.25)
    assert result.metrics["loss"] == pytest.approx(-(2 * math.log(1 / 4) + math.log(3 / 4)) / 3)


def test_a_class_that_training_never_saw_has_a_finite_loss() -> None:
    result = majority_class(np.array([0, 0, 0]), np.array([1]), ["a", "b"])
    assert result.metrics["loss"] == pytest.approx(math.log(4))


def test_perplexity_is_the_exponential_of_the_loss_and_never_overflows() -> None:
    assert generation("tuned", 2.0).metrics == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2))}
    assert math.isfinite(generation("tuned", 1e6).metrics["perplexity"])


def test_better_knows_the_direction_of_each_metric() -> None:
    assert better(Metric.MACRO_F1, 0.6, 0.5)
    assert better(Metric.LOSS, 0.5, 0.6)
    assert not better(Metric.LOSS, 0.5, 0.5)
    assert not better(Metric.ACCURACY, 0.5, 0.5)
