"""Scores from predictions: plain numpy, defined as in scikit-learn with zero_division=0."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from finetune_api.report import ClassScores, Evaluation
from finetune_api.spec import Metric

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class PerClass(NamedTuple):
    """Each float64 [classes]; `support` int64: rows that truly are of the class."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Integers


def confusion_matrix(true: Integers, predicted: Integers, classes: int) -> Integers:
    """Rows by true (first axis) and predicted class: int64 [classes, classes]."""
    counts = np.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def per_class(confusion: Integers) -> PerClass:
    """Precision, recall and F1 of every class; 0 where a class is never predicted or does not occur."""
    hits = np.diag(confusion).astype(np.float64)
    predicted, support = confusion.sum(axis=0), confusion.sum(axis=1)
    return PerClass(
        precision=hits / np.maximum(predicted, 1),
        recall=hits / np.maximum(support, 1),
        f1=2 * hits / np.maximum(predicted + support, 1),
        support=support,
    )


def classification(name: str, true: Integers, predicted: Integers, loss: float, labels: Sequence[str]) -> Evaluation:
    """All metrics of task Classification. `true` and `predicted` are class ids [rows], at least one row.

    Macro-F1 is the mean over all labels of the closed set, so a label that is missed altogether counts as 0.
    """
    confusion = confusion_matrix(true, predicted, len(labels))
    scores = per_class(confusion)
    rows = int(scores.support.sum())
    return Evaluation(
        name=name,
        metrics={
            Metric.ACCURACY: float(np.trace(confusion) / rows),
            Metric.MACRO_F1: float(scores.f1.mean()),
            Metric.WEIGHTED_F1: float(scores.f1 @ scores.support / rows),
            Metric.LOSS: loss,
        },
        classes=[
            ClassScores(label=label, precision=float(p), recall=float(r), f1=float(f1), support=int(support))
            for label, p, r, f1, support in zip(labels, *scores, strict=True)
        ],
        confusion=confusion.tolist(),
    )


def generation(name: str, loss: float) -> Evaluation:
    """All metrics of task Generation from the mean loss per supervised token, in nats."""
    perplexity = math.exp(min(loss, 700))  # the largest that a float holds
    return Evaluation(name=name, metrics={Metric.LOSS: loss, Metric.PERPLEXITY: perplexity})


def preference(name: str, margins: Floats) -> Evaluation:
    """All metrics of preference tuning. `margins`: by how much the better answer of each pair is ahead, at least one.

    A pair that is no more preferred one way than the other counts half, so a model that learned nothing has 0.5.
    """
    return Evaluation(
        name=name,
        metrics={
            Metric.LOSS: float(np.logaddexp(0, -margins).mean()),
            Metric.REWARD_ACCURACY: float(((margins > 0) + 0.5 * (margins == 0)).mean()),
            Metric.REWARD_MARGIN: float(margins.mean()),
        },
    )


def better(metric: Metric, score: float, than: float) -> bool:
    """Whether `score` is a strict improvement."""
    return score < than if metric.lower_is_better else score > than
