"""Which rows form which optimizer step, and how a step is cut into padded micro-batches.

The batch plan is a pure function of (row lengths, batch size, seed): optimizer step k always has the same rows,
so the cursor of a resume is k and nothing else.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from finetune_api.spec import BatchSize, Task

from finetune_trainer.data.store import Rows

Indices = npt.NDArray[np.int64]


class BatchPlan:
    """All optimizer steps of a run, numbered from 0 across the epochs.

    `lengths` is int [rows]: tokens per row. A size in tokens means non-padding ones, and a longer row stands
    alone. Exactly one of `epochs` (may be fractional) and `max_steps` is given.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int32],
        size: BatchSize,
        seed: int,
        epochs: float | None = None,
        max_steps: int | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("there are no rows to make batches of")
        if (epochs is None) == (max_steps is None):
            raise ValueError("give either epochs or max_steps")
        self._lengths = lengths
        self._size = size
        self._seed = seed
        self._epoch_starts = [0]
        """First step of each epoch that was needed so far; with a token budget epochs differ in their steps."""
        self._order = lru_cache(maxsize=1)(self._make_order)
        self.total_steps = max_steps if max_steps is not None else self.steps_in(epochs or 0.0)

    def rows(self, step: int) -> Indices:
        """The rows of an optimizer step, in their shuffled order."""
        epoch, first = self._find(step)
        order, cuts = self._order(epoch)
        return order[cuts[step - first] : cuts[step - first + 1]]

    def epoch(self, steps: int) -> float:
        """Passes over the rows that `steps` optimizer steps make."""
        if steps == 0:
            return 0.0
        epoch, first = self._find(steps - 1)
        return epoch + (steps - first) / (self._start(epoch + 1) - first)

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps that so many passes over the rows take."""
        whole = math.floor(epochs)
        start = self._start(whole)
        part = epochs - whole
        return start if part == 0 else start + math.ceil(part * (self._start(whole + 1) - start))

    def _find(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and that epoch's first step."""
        while self._epoch_starts[-1] <= step:
            self._start(len(self._epoch_starts))
        epoch = int(np.searchsorted(self._epoch_starts, step, side="right")) - 1
        return epoch, self._epoch_starts[epoch]

    def _start(self, epoch: int) -> int:
        while len(self._epoch_starts) <= epoch:
            _, cuts = self._order(len(self._epoch_starts) - 1)
            self._epoch_starts.append(self._epoch_starts[-1] + len(cuts) - 1)
        return self._epoch_starts[epoch]

    def _make_order(self, epoch: int) -> tuple[Indices, Indices]:
        """The shuffled rows of an epoch, and where its steps begin and end in them: [steps + 1]."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
        return order, cut_steps(self._lengths[order], self._size)


def cut_steps(lengths: npt.NDArray[np.int32], size: BatchSize) -> Indices:
    """Borders of the optimizer steps in rows of these lengths, in their order: int64 [steps + 1]."""
    if size.sequences is not None:
        return np.append(np.arange(0, len(lengths), size.sequences), len(lengths))
    if size.tokens is None:
        raise ValueError("a batch size needs sequences or tokens")
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts = [0]
    while cuts[-1] < len(lengths):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        fits = int(np.searchsorted(ends, before + size.tokens, side="right"))
        cuts.append(max(fits, cuts[-1] + 1))
    return np.array(cuts, np.int64)


def micro_batches(rows: Indices, lengths: npt.NDArray[np.int32], most_tokens: int) -> list[Indices]:
    """Cuts rows into groups of at most `most_tokens` padded tokens; a longer row stands alone.

    Rows of similar length come together, the longest first: a size that does not fit the memory shows at once.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    groups, start = [], 0
    while start < len(order):
        count = max(1, most_tokens // max(1, int(lengths[order[start]])))
        groups.append(order[start : start + count])
        start += count
    return groups


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right to the longest of them: b rows, t tokens, n losses."""

    rows: Indices
    """Their numbers in the split, in the order of the tensors."""
    input_ids: torch.Tensor
    """int64 [b, t]"""
    attention_mask: torch.Tensor | None
    """int64 [b, t]: 1 for a token, 0 for padding; None if nothing is padded."""
    targets: torch.Tensor
    """What is to be predicted, int64 [n]: class ids with n = b (Classification), or supervised tokens."""
    positions: torch.Tensor | None
    """Row and position of the token before each target, int64 [2, n] (Generation)."""
    tokens: int
    """Tokens without padding."""

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            attention_mask=None if self.attention_mask is None else move(self.attention_mask),
            targets=move(self.targets),
            positions=None if self.positions is None else move(self.positions),
        )


def collate(data: Rows, rows: Indices, pad_token_id: int, task: Task) -> MicroBatch:
    """Reads and pads the given rows. The first token of a row has no token before it, so it is never a target."""
    lengths = data.lengths[rows]
    inside = np.arange(int(lengths.max())) < lengths[:, None]
    ids = np.full(inside.shape, pad_token_id, np.int64)
    ids[inside] = np.concatenate([data.input_ids(row) for row in rows.tolist()])
    positions = None
    if task is Task.CLASSIFICATION:
        targets = np.array([data.label(row) for row in rows.tolist()], np.int64)
    else:
        supervised = np.zeros(inside.shape, np.bool_)
        supervised[inside] = np.concatenate([data.loss_mask(row) for row in rows.tolist()])
        where = np.stack(np.nonzero(supervised[:, 1:]))
        targets = ids[where[0], where[1] + 1]
        positions = torch.from_numpy(where)
    return MicroBatch(
        rows=rows,
        input_ids=torch.from_numpy(ids),
        attention_mask=None if inside.all() else torch.from_numpy(inside.astype(np.int64)),
        targets=torch.from_numpy(targets),
        positions=positions,
        tokens=int(lengths.sum()),
    )
