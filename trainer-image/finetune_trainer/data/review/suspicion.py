"""Which training rows have a label that is probably wrong, from the texts in the spool and the numbers in the ledger.

Training rows alone teach the classifiers, and training rows alone are judged. Were validation and test rows corrected
where a model disagrees with them, and only there, they would no longer tell how good a model is.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from finetune_api.report import LabelPair
from scipy import sparse

from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.groups import Groups
from finetune_trainer.data.ledger import Ledger
from finetune_trainer.data.review.confident import ConfidentJoint, Mask, Numbers, is_suspicious, judge
from finetune_trainer.data.review.cross_validation import Classifiers, Features, fold_of
from finetune_trainer.data.split import TRAIN
from finetune_trainer.data.spool import Spool

LEAST_EXAMPLES = 5
"""Of a label, outside of a row's fold: a classifier that has seen less of it cannot say that it is not that."""

MOST_ROWS, MOST_VALUES = 100_000, 1 << 23
"""Rows to learn from, and values in their vectors, 8 bytes each. More rows are judged by what these teach."""

MOST_PAIRS = 100

SEEN = np.dtype(
    [("number", np.int64), ("suggested", np.int16), ("confidence", np.float32), ("margin", np.float32), ("wrong", bool)]
)
"""A row that somebody should look at. `wrong`: its label is probably wrong."""


class Facts(NamedTuple):
    """Of all rows, each [rows]."""

    groups: Groups
    """The number of a row that stands for all with the same text (or nearly the same): these are in one fold."""
    decided: Mask
    """Somebody has looked at them; they are not judged, but others are by them."""
    conflicting: Mask
    """To be looked at anyhow: their text has other labels, too."""


class Training(NamedTuple):
    """Vectors of the rows to learn from, [rows, size], and their numbers."""

    features: sparse.csr_array
    numbers: Numbers


@dataclass
class Judgement:
    """What the classifiers say of the rows, added up chunk by chunk. `seen`: in the order of their numbers."""

    joint: ConfidentJoint
    seen: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, SEEN))
    rows: int = 0
    right: int = 0
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float | None:
        return self.right / self.rows if self.rows else None

    @property
    def error_share(self) -> float | None:
        return self.joint.error_share() if self.rows else None

    def label_pairs(self, names: list[str]) -> list[LabelPair]:
        return [
            LabelPair(label=names[given], suggested=names[suggested], rows=rows)
            for (given, suggested), rows in self.pairs.most_common(MOST_PAIRS)
        ]


class Judge:
    """Classifiers that have learned from the training rows, and what makes their answers comparable."""

    def __init__(self, spool: Spool, ledger: Ledger, facts: Facts, advance: Callable[[float], None]) -> None:
        classes = len(ledger.label_names)
        self._spool, self._ledger, self._facts = spool, ledger, facts
        self._trained = ledger.kept & (ledger.splits == TRAIN)
        self._features, self._classifiers = Features(classes), Classifiers(classes)
        total = max(1, len(ledger))
        chosen = (self._trained, self._keys)
        training = read_training(spool, self._features, *chosen, lambda done: advance(done / total / 2))
        labels, folds = self._given(training.numbers)
        self._classifiers.learn(training.features, labels, folds, lambda done: advance((1 + done) / 2))
        self._thresholds = self._classifiers.thresholds(training.features, labels, folds)

    def judge(self, advance: Callable[[float], None]) -> Judgement:
        """Of all training rows that nobody has decided on."""
        found = Judgement(ConfidentJoint(len(self._thresholds)))
        seen = [found.seen]
        for numbers, texts in _texts(self._spool, self._trained & ~self._facts.decided):
            seen.append(self._judge(numbers, texts, found))
            advance(int(numbers[-1]) / len(self._ledger))
        found.seen = np.concatenate(seen)
        return found

    def _keys(self, numbers: Numbers) -> npt.NDArray[np.uint64]:
        """Of the groups of some rows."""
        return self._ledger.input_keys[self._facts.groups[numbers]]

    def _given(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The given labels and the folds of some rows."""
        return self._ledger.labels[numbers].astype(np.int64), fold_of(self._keys(numbers))

    def _judge(self, numbers: Numbers, texts: list[str], found: Judgement) -> npt.NDArray[Any]:
        """Adds the rows to what was found; returns those to be seen."""
        given, folds = self._given(numbers)
        probabilities = self._classifiers.probabilities(self._features.of(texts), folds)
        judged = judge(probabilities, given, self._thresholds)
        known = self._classifiers.seen[folds, given] >= LEAST_EXAMPLES
        wrong = is_suspicious(judged, given) & known
        found.rows += int(known.sum())
        found.right += int((probabilities.argmax(axis=1) == given)[known].sum())
        found.joint.add(given[known], judged.of(known))
        found.pairs.update(zip(given[wrong].tolist(), judged.suggested[wrong].tolist(), strict=True))
        seen = np.empty(len(numbers), SEEN)
        seen["number"], seen["margin"], seen["wrong"] = numbers, judged.margin, wrong
        seen["suggested"] = np.where(wrong, judged.suggested, given)
        seen["confidence"] = probabilities[np.arange(len(given)), seen["suggested"]]
        return seen[wrong | self._facts.conflicting[numbers]]


def find_suspicious(spool: Spool, ledger: Ledger, facts: Facts, advance: Callable[[float], None]) -> Judgement:
    """Learns from all training rows, then judges those that nobody has decided on.

    `advance` is called often with the share of the work that is done, and may raise to stop.
    """
    judge = Judge(spool, ledger, facts, lambda done: advance(done / 2))
    return judge.judge(lambda done: advance((1 + done) / 2))


def read_training(
    spool: Spool,
    features: Features,
    trained: Mask,
    keys_of: Callable[[Numbers], npt.NDArray[np.uint64]],
    advance: Callable[[int], None],
) -> Training:
    """The rows to learn from: all, or those with the lowest hashes of which memory holds enough."""

    def chances(numbers: Numbers) -> npt.NDArray[np.float64]:
        hashes = keys_of(numbers) * np.uint64(0x9E3779B97F4A7C15)  # other bits than those that choose split and fold
        shares: npt.NDArray[np.float64] = hashes / 2.0**64
        return shares

    most = min(1.0, MOST_ROWS / max(1, int(trained.sum())))
    blocks: list[Training] = []
    values = 0
    for numbers, texts in _texts(spool, trained):
        chosen = np.flatnonzero(chances(numbers) < most)
        if len(chosen):
            block = Training(features.of([texts[place] for place in chosen.tolist()]), numbers[chosen])
            blocks.append(block)
            values += block.features.nnz
        while values > MOST_VALUES:
            most /= 2
            blocks = [_less(block, chances(block.numbers) < most) for block in blocks]
            values = sum(block.features.nnz for block in blocks)
        advance(int(numbers[-1]))
    if not blocks:
        return Training(sparse.csr_array((0, features.size), dtype=np.float32), np.empty(0, np.int64))
    return Training(
        sparse.csr_array(sparse.vstack([block.features for block in blocks])),
        np.concatenate([block.numbers for block in blocks]),
    )


def _less(block: Training, kept: Mask) -> Training:
    return Training(block.features[np.flatnonzero(kept)], block.numbers[kept])


def _texts(spool: Spool, wanted: Mask) -> Iterator[tuple[Numbers, list[str]]]:
    """Chunk by chunk the numbers and texts of the labelled rows that are `wanted` [rows]."""
    for chunk in spool.chunks():
        numbers = chunk.start + np.flatnonzero(wanted[chunk.start : chunk.start + len(chunk.examples)])
        texts = [_text(chunk.examples[number - chunk.start]) for number in numbers.tolist()]
        if texts:
            yield numbers, texts


def _text(example: object) -> str:
    if not isinstance(example, LabelledText):
        raise TypeError("only labelled texts are reviewed")
    return example.text
