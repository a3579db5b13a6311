"""What a classifier says of rows that it has not learned from: linear, over hashed words and pieces of words.

Each row is in one of the folds, by the hash of its text, and is judged by the classifier that learned from the other
folds. So no copy of a text is in the training data of its own judge.
"""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier

from finetune_trainer.data.review.confident import Floats, Numbers, Thresholds

FOLDS = 5
WORD_CHARACTERS, PIECE_CHARACTERS = 2_000, 400
"""From the beginning of a text: words need more room, pieces of words help with short texts."""

MOST_FEATURES = 1 << 18
WEIGHT_BYTES = 120 << 20
"""For the classifiers of all folds: with 512 labels there are 2^13 features."""

UPDATES = 100_000_000
"""Of the weights of one class by one row: what learning may take, a minute or two."""

MOST_EPOCHS = 5
BATCH_VALUES = 1 << 20
REGULARISATION = 1e-4
"""As good on noisy labels as logistic regression solved to the end, which takes a hundred times as long."""


def fold_of(keys: npt.NDArray[np.uint64]) -> Numbers:
    """The fold of each row, by the key of its text (or of the first of its near-duplicates)."""
    return (keys % np.uint64(FOLDS)).astype(np.int64)


class Features:
    """Texts as vectors, [texts, size] of float32."""

    def __init__(self, classes: int) -> None:
        fits = WEIGHT_BYTES // (FOLDS * classes * 4)
        self.size = min(MOST_FEATURES, 1 << (fits.bit_length() - 1))
        settings = {"n_features": self.size, "dtype": np.float32}
        self._words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", **settings)
        self._pieces = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), **settings)

    def of(self, texts: Sequence[str]) -> sparse.csr_array:
        words = self._words.transform([text[:WORD_CHARACTERS] for text in texts])
        pieces = self._pieces.transform([text[:PIECE_CHARACTERS] for text in texts])
        return sparse.csr_array((words + pieces) * 0.5**0.5).astype(np.float32)


class Classifiers:
    """One for each fold, learned from all rows but those of the fold. Raises ValueError for less than two classes."""

    def __init__(self, classes: int) -> None:
        if classes < 2:
            raise ValueError("there is nothing to tell apart")
        self._classes = classes
        self._weights: list[tuple[Floats, Floats]] = []
        self.seen = np.zeros((FOLDS, classes), np.int64)
        """Rows of each class that the classifier of each fold has learned from."""

    def learn(
        self, features: sparse.csr_array, labels: Numbers, folds: Numbers, advance: Callable[[float], None]
    ) -> None:
        """features: [rows, size]; labels, folds: [rows]. `advance` is called for every batch with the share of the work
        that is done, and may raise to stop.
        """
        epochs = max(1, min(MOST_EPOCHS, UPDATES // max(1, len(labels) * self._classes * (FOLDS - 1))))
        for fold in range(FOLDS):
            rows = np.flatnonzero(folds != fold)
            self.seen[fold] = np.bincount(labels[rows], minlength=self._classes)
            model = SGDClassifier(
                loss="log_loss", alpha=REGULARISATION, random_state=0, n_jobs=len(os.sched_getaffinity(0))
            )
            for epoch in range(epochs):
                order = np.random.default_rng([fold, epoch]).permutation(rows)
                for batch in _batches(order, features.indptr):
                    advance((fold + epoch / epochs) / FOLDS)
                    model.partial_fit(features[batch], labels[batch], classes=np.arange(self._classes))
            self._weights.append(self._taken_from(model))

    def _taken_from(self, model: SGDClassifier) -> tuple[Floats, Floats]:
        if not hasattr(model, "coef_"):  # all rows are in this fold
            return np.zeros((1, 0), np.float32), np.zeros(self._classes, np.float32)
        return model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32)

    def probabilities(self, features: sparse.csr_array, folds: Numbers) -> Floats:
        """Of each row by the classifier that has not seen it: [rows, classes]."""
        found = np.empty((len(folds), self._classes), np.float32)
        for fold in np.unique(folds):
            rows = np.flatnonzero(folds == fold)
            weights, intercept = self._weights[fold]
            scores = features[rows] @ weights + intercept if weights.size else np.tile(intercept, (len(rows), 1))
            found[rows] = _shares(scores)
        return found

    def thresholds(self, features: sparse.csr_array, labels: Numbers, folds: Numbers) -> Floats:
        """Of the classes, from rows that their judges have not seen: [classes]."""
        thresholds = Thresholds(self._classes)
        for batch in _batches(np.arange(len(labels)), features.indptr):
            thresholds.add(self.probabilities(features[batch], folds[batch]), labels[batch])
        return thresholds.values


def _shares(scores: Floats) -> Floats:
    """One against the rest, so that the shares add up to 1: [rows, classes]. Of two classes there is one score."""
    each = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
    if scores.shape[1] == 1:
        return np.hstack([1 - each, each])
    shares: Floats = each / each.sum(axis=1, keepdims=True)
    return shares


def _batches(rows: Numbers, starts: npt.NDArray[np.int32]) -> Iterator[Numbers]:
    """The rows in their order, cut so that no batch has much more than BATCH_VALUES values."""
    ends = np.cumsum(starts[rows + 1].astype(np.int64) - starts[rows])
    cuts = np.searchsorted(ends, np.arange(BATCH_VALUES, ends[-1] if len(ends) else 0, BATCH_VALUES)) + 1
    return (batch for batch in np.split(rows, cuts) if len(batch))
