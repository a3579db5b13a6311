"""The same text with different labels: which rows that concerns, and which of them may be trained on."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from finetune_api.dataset import ConflictAction
from finetune_api.report import ConflictReport

from finetune_trainer.data.groups import Groups

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Conflicts:
    """`rows`: of groups with several labels; `minority`: those of them without the label that more than half of their
    group has. Each [rows].
    """

    groups: int
    rows: Mask
    minority: Mask

    def unwanted(self, action: ConflictAction, training: Mask) -> Mask:
        """The rows that are left out of training, as dataset.labelling.conflicts says. `training`: [rows]."""
        match action:
            case ConflictAction.KEEP:
                return np.zeros_like(training)
            case ConflictAction.DROP:
                return self.rows & training
            case ConflictAction.MAJORITY:
                return self.minority & training

    def report(self, held_out: Mask, dropped: int) -> ConflictReport:
        """`held_out`: rows of validation and test that are kept, [rows]."""
        return ConflictReport(
            groups=self.groups,
            rows=int(self.rows.sum()),
            held_out_rows=int((self.rows & held_out).sum()),
            rows_dropped=dropped,
        )


def find_conflicts(groups: Groups, labels: npt.NDArray[np.int16]) -> Conflicts:
    """groups: the number of a row that stands for all with the same text (or nearly the same), for each row; labels:
    the number of each row's label. Both [rows]. All rows of a group vote, duplicates that are left out too.
    """
    several = np.zeros(len(groups), np.bool_)
    several[groups[labels != labels[groups]]] = True
    rows: Mask = several[groups]
    places = np.flatnonzero(rows)
    pairs = groups[places].astype(np.int64) * (int(labels.max(initial=0)) + 1) + labels[places]
    _, pair, votes = np.unique(pairs, return_inverse=True, return_counts=True)
    _, group, members = np.unique(groups[places], return_inverse=True, return_counts=True)
    minority = np.zeros(len(groups), np.bool_)
    minority[places] = 2 * votes[pair] <= members[group]
    return Conflicts(groups=int(several.sum()), rows=rows, minority=minority)
