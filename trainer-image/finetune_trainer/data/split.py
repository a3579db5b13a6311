"""Which split a row belongs to, by its content alone, and what keeps the held-out splits unseen."""

import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from finetune_api.constants import Reason
from finetune_api.plan import PlanDataset

from finetune_trainer.data.examples import Example, LabelledText, example_texts, input_texts
from finetune_trainer.data.groups import Groups, Numbers, blocks, is_first
from finetune_trainer.errors import UserError

if TYPE_CHECKING:
    from finetune_trainer.data.ledger import Ledger

SEPARATOR = "\x1f"
"""It is white space, so no text holds it once its white space is evened out."""

KEY_BYTES = 8

Mask = npt.NDArray[np.bool_]


class Split(StrEnum):
    """In the order in which their sources are read: what is held out must be known before it may be learned."""

    TEST = "test"
    VALIDATION = "validation"
    TRAIN = "train"


SPLITS = tuple(Split)
TEST, VALIDATION, TRAIN = range(len(SPLITS))
"""Their places, which stand for them where there is one per row."""


def input_key(example: Example) -> int:
    """64 bits that stand for what the model is given, whatever its white space. What it is to answer is no part
    of it: the same text with another label, or the same prompt with another completion, must not be held out and
    learned at once.
    """
    return _key(input_texts(example))


def whole_key(example: Example) -> int:
    """64 bits that stand for what the model is given and what it is to answer, whatever their white space."""
    texts = example_texts(example)
    return _key([*texts, example.label] if isinstance(example, LabelledText) else texts)


def row_hash(text: str) -> bytes:
    """128 bits that stand for a text, whatever its white space; the first half of them is its `input_key`."""
    return _hash([text])


def _key(texts: list[str]) -> int:
    return int.from_bytes(_hash(texts)[:KEY_BYTES])


def _hash(texts: list[str]) -> bytes:
    content = SEPARATOR.join([" ".join(text.split()) for text in texts])
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def leave_out_held_out(ledger: "Ledger", groups: Groups) -> Mask:
    """Rows of a group of which a source that is read earlier has one: with them a score would be dishonest."""
    found: Mask = ledger.origins > ledger.origins[groups]
    return found


def place_rows(ledger: "Ledger", groups: Groups, dataset: PlanDataset) -> npt.NDArray[np.uint8]:
    """The split of each row [rows]. A group goes to one split as a whole, by the hash of its first row: it keeps its
    split when rows are added. A label that a split by fraction should have, but has not, is given its nearest group.
    """
    test = (dataset.test.fraction or 0.0) if dataset.test else 0.0
    validation = dataset.validation.fraction or 0.0
    splits = ledger.origins.copy()
    divided = ledger.origins == TRAIN
    heads = is_first(groups) & divided
    for some in blocks(len(groups)):
        shares = _shares(ledger.input_keys[some])
        by_share = np.select([shares < test, shares < test + validation], [TEST, VALIDATION], TRAIN)
        splits[some][heads[some]] = by_share[heads[some]]
    if ledger.label_names:
        _spread_labels(ledger, heads, splits, (test, validation))
    for some in blocks(len(groups)):
        splits[some] = np.where(divided[some], splits[groups[some]], splits[some])
    return splits


def _shares(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Where in a whole the hashes of rows are: 0 to 1."""
    shares: npt.NDArray[np.float64] = keys / 2.0**64
    return shares


def _spread_labels(
    ledger: "Ledger", heads: Mask, splits: npt.NDArray[np.uint8], fractions: tuple[float, float]
) -> None:
    """Moves the fewest groups so that training has every label, and a split by fraction each of which it would have one
    on average. `heads`: first rows of the groups that are divided, [rows].
    """
    count = len(ledger.label_names)
    by_split = [np.bincount(ledger.labels[heads & (splits == split)], minlength=count) for split in range(len(SPLITS))]
    total = np.sum(by_split, axis=0)

    def by_share(label: int) -> Numbers:
        found = np.flatnonzero(heads & (ledger.labels == label))
        return found[np.argsort(_shares(ledger.input_keys[found]), kind="stable")]

    for split, fraction in zip((TEST, VALIDATION), fractions, strict=True):
        lacking = (by_split[split] == 0) & (total * fraction >= 1) & (by_split[TRAIN] > 1)
        for label in np.flatnonzero(lacking).tolist():
            splits[next(head for head in by_share(label) if splits[head] == TRAIN)] = split
            by_split[TRAIN][label] -= 1
    for label in np.flatnonzero((by_split[TRAIN] == 0) & (total > 0)).tolist():
        splits[by_share(label)[-1]] = TRAIN


def check_splits(rows: Mapping[str, int], dataset: PlanDataset, left_out: str = "") -> None:
    """Raises UserError (DataInvalid) for a split without rows. `rows`: split -> rows; `left_out`: why not more."""
    wanted = [Split.TRAIN, Split.VALIDATION, *([Split.TEST] if dataset.test else [])]
    empty = [split for split in wanted if not rows.get(split)]
    if not empty:
        return
    plan = {Split.VALIDATION: dataset.validation, Split.TEST: dataset.test}.get(empty[0])
    if plan is None or plan.fraction is None:
        message = f"the split {empty[0]} has no rows"
    else:
        total = sum(rows.values())
        message = (
            f"dataset.{empty[0]}.fraction: {plan.fraction:g} of {total} rows gave none: "
            "raise it, add rows, or give the split sources of its own"
        )
    raise UserError(Reason.DATA_INVALID, f"{message}. Left out: {left_out}" if left_out else message)
