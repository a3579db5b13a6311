"""dataset.duplicates: which rows are left out, and what there was of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from finetune_api.report import DuplicateReport

from finetune_trainer.data.duplicates.search import SignatureFiles, find_similar
from finetune_trainer.data.groups import Groups, Numbers, group_rows, is_first
from finetune_trainer.data.ledger import Ledger

Mask = npt.NDArray[np.bool_]

LARGE_SHARE = 0.2
LARGE_GROUP = (
    "the largest group holds {share:.0%} of all rows: if they share an instruction rather than say the same, raise "
    "dataset.duplicates.similarity or leave it out"
)


@dataclass(frozen=True)
class Duplicates:
    """`exact`: rows that say what an earlier one says, answer or label included; `near`: those that do nearly; each
    [rows]. `groups`: the first row of those that are similar or have the same input, [rows].
    """

    exact: Mask
    near: Mask
    groups: Groups

    def report(self, similarity: float | None, dropped: int, held_out: int) -> DuplicateReport:
        """dropped: rows left out of the training sources; held_out: training rows that held-out sources have."""
        _, others = np.unique(self.groups[~is_first(self.groups)], return_counts=True)
        sizes = others + 1
        largest = int(sizes.max(initial=min(1, len(self.groups))))
        large = largest > LARGE_SHARE * max(len(self.groups), 1) and largest > 1
        return DuplicateReport(
            similarity=similarity,
            exact_rows=int(self.exact.sum()),
            near_rows=int(self.near.sum()) if similarity is not None else None,
            rows_dropped=dropped,
            held_out_rows=held_out,
            groups=len(sizes),
            largest_group=largest,
            group_sizes=_size_table(sizes),
            note=LARGE_GROUP.format(share=largest / len(self.groups)) if large else None,
        )


def find_duplicates(ledger: Ledger, inputs: Groups, files: SignatureFiles | None) -> Duplicates:
    """inputs: groups of rows with the same input, [rows]; files: where similar rows are looked for."""
    exact = ~is_first(group_rows(ledger.take_whole_keys()))
    if files is None:
        return Duplicates(exact, np.zeros_like(exact), inputs)
    similar = find_similar(files, ledger.labels, inputs)
    return Duplicates(exact, similar.repeats & ~exact, similar.groups)


def _size_table(sizes: Numbers) -> dict[str, int]:
    """How many groups have how many rows."""
    bounds = (2, 3, 5, 10, 100, 1000)
    table = {}
    for low, high in zip(bounds, (*bounds[1:], None), strict=True):
        name = f"{low}" if high == low + 1 else f"{low}-{high - 1}" if high else f"{low}+"
        table[name] = int(((sizes >= low) & (sizes < (high or sizes.max(initial=0) + 1))).sum())
    return {name: count for name, count in table.items() if count}
