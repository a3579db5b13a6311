"""Confident learning (Northcutt, Jiang, Chuang 2021, https://arxiv.org/abs/1911.00068): which labels are probably
wrong, from what a classifier that has not seen a row says of it.

A class counts for a row if its probability reaches the class's threshold: the mean probability that rows of this class
are given for it. So a class of which the classifier is never sure is not held to the standard of one that is easy.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Judged(NamedTuple):
    """Of rows, each [rows]. `suggested`: the likeliest class that counts, or the given one where none does (then
    `counts` is False); `margin`: probability of the given class less that of the likeliest other one, -1 to 1; the
    lower, the more suspicious (normalized margin, section 3.2).
    """

    suggested: Numbers
    margin: Floats
    counts: Mask

    def of(self, rows: Mask) -> "Judged":
        return Judged(self.suggested[rows], self.margin[rows], self.counts[rows])


class Thresholds:
    """Mean self-confidence by class (equation 2), added up from any number of parts."""

    def __init__(self, classes: int) -> None:
        self._sums, self._rows = np.zeros(classes), np.zeros(classes, np.int64)

    def add(self, probabilities: Floats, labels: Numbers) -> None:
        """probabilities: out of sample, [rows, classes]; labels: the given classes, [rows]."""
        own = probabilities[np.arange(len(labels)), labels]
        self._sums += np.bincount(labels, own, len(self._sums))
        self._rows += np.bincount(labels, minlength=len(self._sums))

    @property
    def values(self) -> Floats:
        """[classes]; that of a class without rows is infinite, so it is never suggested."""
        with np.errstate(divide="ignore", invalid="ignore"):
            means = self._sums / self._rows
        return np.where(self._rows > 0, means, np.inf).astype(np.float32)


def judge(probabilities: Floats, labels: Numbers, thresholds: Floats) -> Judged:
    """probabilities: out of sample, [rows, classes]; labels: the given classes, [rows]; thresholds: [classes]."""
    every = np.arange(len(labels))
    counting = np.where(probabilities >= thresholds, probabilities, -1)
    likeliest = counting.argmax(axis=1)
    counts = counting[every, likeliest] >= 0
    others = probabilities.copy()
    others[every, labels] = -1
    margin = probabilities[every, labels] - others.max(axis=1)
    return Judged(np.where(counts, likeliest, labels), margin, counts)


def is_suspicious(judged: Judged, labels: Numbers) -> Mask:
    """Rows beside the diagonal of the confident joint whose given class is not the likeliest: [rows]."""
    found: Mask = (judged.suggested != labels) & (judged.margin < 0)
    return found


class ConfidentJoint:
    """Rows by given and probable class (equation 1), added up from any number of parts."""

    def __init__(self, classes: int) -> None:
        self.counts = np.zeros((classes, classes), np.int64)
        """[given, probable]; a row of which no class counts is in none."""
        self._given = np.zeros(classes, np.int64)

    def add(self, labels: Numbers, judged: Judged) -> None:
        classes = len(self._given)
        pairs = labels[judged.counts] * classes + judged.suggested[judged.counts]
        self.counts += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
        self._given += np.bincount(labels, minlength=classes)

    def error_share(self) -> float:
        """Estimated share of wrong labels: what is beside the diagonal once each row of the joint is scaled to the
        number of rows that have its class (equation 3).
        """
        sums = self.counts.sum(axis=1)
        right = np.divide(self.counts.diagonal(), sums, out=np.ones(len(sums)), where=sums > 0)
        total = self._given.sum()
        return float(1 - (right * self._given).sum() / total) if total else 0.0
