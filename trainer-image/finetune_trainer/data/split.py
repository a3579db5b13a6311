"""Which split a row belongs to, by its content alone, and what keeps the held-out splits unseen."""

import hashlib
from collections.abc import Mapping
from enum import StrEnum

from finetune_api.constants import Reason
from finetune_api.plan import PlanDataset

from finetune_trainer.data.examples import Example, input_texts
from finetune_trainer.errors import UserError

SEPARATOR = "\x1f"
"""It is white space, so no text holds it once its white space is evened out."""


class Split(StrEnum):
    """In the order in which their sources are read: what is held out must be known before it may be learned."""

    TEST = "test"
    VALIDATION = "validation"
    TRAIN = "train"


def content_key(example: Example) -> bytes:
    """16 bytes that stand for what the model is given, whatever its white space. What it is to answer is no part
    of it: the same text with another label, or the same prompt with another completion, must not be held out and
    learned at once. Rows with equal keys, exact duplicates among them, are all kept, in one split.
    """
    content = SEPARATOR.join(" ".join(text.split()) for text in input_texts(example))
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


class Splitter:
    """Places rows one by one. Rows of test and validation sources must come before those of training sources.

    The fractions are of the hashes' range: a row keeps its split when rows are added, and rows with
    equal keys share one.
    """

    def __init__(self, dataset: PlanDataset) -> None:
        self._test_fraction = (dataset.test.fraction or 0.0) if dataset.test else 0.0
        self._validation_fraction = dataset.validation.fraction or 0.0
        self._held_out: dict[bytes, Split] = {}

    def place(self, origin: Split, key: bytes) -> Split | None:
        """The split of a row from a source of `origin`; None if a held-out source has one with the same key,
        which would make a score dishonest.
        """
        if self._held_out.get(key, origin) is not origin:
            return None
        if origin is not Split.TRAIN:
            self._held_out[key] = origin
            return origin
        share = int.from_bytes(key[:8]) / 2**64
        if share < self._test_fraction:
            return Split.TEST
        return Split.VALIDATION if share < self._test_fraction + self._validation_fraction else Split.TRAIN


def check_splits(rows: Mapping[str, int], dataset: PlanDataset) -> None:
    """Raises UserError (DataInvalid) for a split without rows. `rows`: split -> rows."""
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
    raise UserError(Reason.DATA_INVALID, message)
