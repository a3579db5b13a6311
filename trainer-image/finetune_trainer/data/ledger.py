"""What is decided about rows without their texts: 23 bytes for each, whatever its length."""

from array import array
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.convert import Unwanted
from finetune_trainer.data.labels import check_label_count
from finetune_trainer.data.split import SPLITS, Split
from finetune_trainer.data.work import WorkedBatch

NO_LABEL = -1


class Verdict(IntEnum):
    """Why a sound row is left out, decided by what other rows are."""

    KEPT = 0
    HELD_OUT_DUPLICATE = 1
    CONFLICTING_LABELS = 2
    DUPLICATE = 3
    NEAR_DUPLICATE = 4


REASONS = {
    Verdict.HELD_OUT_DUPLICATE: Unwanted("held-out duplicate", "a held-out source has the same or a similar one"),
    Verdict.CONFLICTING_LABELS: Unwanted("conflicting labels", "other rows have the same text with another label"),
    Verdict.DUPLICATE: Unwanted("duplicate", "an earlier row says the same"),
    Verdict.NEAR_DUPLICATE: Unwanted("near duplicate", "an earlier row says nearly the same"),
}


class Ledger:
    """One entry per sound row, in the order of the sources (held-out ones first).

    After `close`: `origins`, `splits` uint8 (places in SPLITS), `verdicts` uint8, `input_keys` uint64, `labels` int16
    (places in `label_names`, or NO_LABEL), `weak` bool (labelled by rules), `suspicious` bool (the label is probably
    wrong), each [rows].
    """

    def __init__(self) -> None:
        self.label_names: list[str] = []
        self._label_ids: dict[str, int] = {}
        self._origins, self._labels, self._weak = array("B"), array("h"), array("B")
        self._input_keys, self._whole_keys = array("Q"), array("Q")

    def add(self, origin: Split, batch: WorkedBatch) -> None:
        """Raises UserError (DataInvalid) for endless labels."""
        rows = len(batch.lines)
        labels = [self._label_id(label) for label in batch.labels] if batch.labels else [NO_LABEL] * rows
        self._origins.frombytes(bytes([SPLITS.index(origin)]) * rows)
        self._input_keys.extend(batch.input_keys)
        self._whole_keys.extend(batch.whole_keys)
        self._labels.extend(labels)
        self._weak.frombytes(batch.weak or bytes(rows))

    def _label_id(self, label: str) -> int:
        number = self._label_ids.get(label)
        if number is None:
            number = self._label_ids[label] = len(self.label_names)
            self.label_names.append(label)
            check_label_count(self.label_names)
        return number

    def close(self) -> None:
        """After the last row."""
        self.origins: npt.NDArray[np.uint8] = np.frombuffer(self._origins, np.uint8)
        self.input_keys: npt.NDArray[np.uint64] = np.frombuffer(self._input_keys, np.uint64)
        self.labels: npt.NDArray[np.int16] = np.frombuffer(self._labels, np.int16)
        self.weak: npt.NDArray[np.bool_] = np.frombuffer(self._weak, np.bool_)
        self.splits: npt.NDArray[np.uint8] = self.origins.copy()
        self.suspicious: npt.NDArray[np.bool_] = np.zeros(len(self.origins), np.bool_)
        self.verdicts: npt.NDArray[np.uint8] = np.zeros(len(self.origins), np.uint8)

    def take_whole_keys(self) -> npt.NDArray[np.uint64]:
        """Those of `split.whole_key`, once: after that they are a third of the ledger for nothing."""
        keys: npt.NDArray[np.uint64] = np.frombuffer(self._whole_keys, np.uint64)
        self._whole_keys = array("Q")
        return keys

    def settle(self) -> None:
        """Forgets what decisions are made of, for none is to be made any more: three bytes a row are left."""
        del self.origins, self.input_keys, self.labels, self.weak
        del self._origins, self._input_keys, self._whole_keys, self._labels, self._weak

    def __len__(self) -> int:
        return len(self.verdicts)

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        kept: npt.NDArray[np.bool_] = self.verdicts == Verdict.KEPT
        return kept

    def rows_by_split(self) -> dict[Split, int]:
        return self._by_split(self.kept)

    def weak_by_split(self) -> dict[Split, int]:
        return self._by_split(self.kept & self.weak)

    def _by_split(self, rows: npt.NDArray[np.bool_]) -> dict[Split, int]:
        return {split: int(np.count_nonzero(rows & (self.splits == place))) for place, split in enumerate(SPLITS)}

    def labels_by_split(self) -> dict[Split, dict[str, int]]:
        """Split -> label -> rows; without labels nothing."""
        if not self.label_names:
            return {}
        counted = self.kept & (self.labels != NO_LABEL)
        found = {}
        for place, split in enumerate(SPLITS):
            counts = np.bincount(self.labels[counted & (self.splits == place)], minlength=len(self.label_names))
            found[split] = dict(zip(self.label_names, counts.tolist(), strict=True))
        return found
