"""evaluation.gate: its decisions at the border, and what its message tells."""

import math

import pytest
from finetune_api.report import Evaluation
from finetune_api.spec import Gate
from finetune_trainer.evaluate.gate import judge


def scores(name: str, value: float, metric: str) -> Evaluation:
    return Evaluation(name=name, metrics={metric: value})


@pytest.mark.parametrize(
    ("metric", "gate", "tuned", "baseline", "passed"),
    [
        ("macroF1", {"minimum": 0.8}, 0.8, 0.3, True),
        ("macroF1", {"minimum": 0.8}, 0.7999, 0.3, False),
        ("loss", {"maximum": 1.0}, 1.0, 3.0, True),
        ("loss", {"maximum": 1.0}, 1.0001, 3.0, False),
        ("accuracy", {"minimum_gain": 0.25}, 0.75, 0.5, True),
        ("accuracy", {"minimum_gain": 0.25}, 0.74, 0.5, False),
        ("perplexity", {"minimum_gain": 2}, 3.0, 5.0, True),
        ("perplexity", {"minimum_gain": 2}, 5.0, 3.0, False),
        ("macroF1", {"minimum": 0.8, "minimum_gain": 0.5}, 0.9, 0.5, False),
        ("macroF1", {"minimum": 0.95, "minimum_gain": 0.3}, 0.9, 0.5, False),
        ("macroF1", {"minimum": 0.9, "minimum_gain": 0.3}, 0.9, 0.5, True),
        ("accuracy", {"minimum": 0}, math.nan, 0.5, False),
        ("accuracy", {"minimum_gain": 0}, 0.5, math.nan, False),
    ],
)
def test_every_bound_must_hold(
    metric: str, gate: dict[str, float], tuned: float, baseline: float, passed: bool
) -> None:
    result = judge(
        Gate(metric=metric, **gate), scores("tuned", tuned, metric), scores("majority class", baseline, metric)
    )
    assert result.passed is passed


def test_the_message_holds_the_numbers_of_the_comparison() -> None:
    gate = Gate(metric="macroF1", minimum=0.8, minimum_gain=0.35)
    result = judge(gate, scores("tuned", 0.78123, "macroF1"), scores("majority class", 0.2, "macroF1"))
    assert result.message == (
        "macroF1 is 0.7812, at least 0.8 is required: not reached; "
        "gains 0.5812 over the majority class (0.7812 against 0.2), at least 0.35 is required: passed"
    )
