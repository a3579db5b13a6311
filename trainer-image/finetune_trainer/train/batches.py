"""Which rows form which optimizer step.

The batch plan is a pure function of (row lengths, batch size, seed): optimizer step k always has the same rows,
so the cursor of a resume is k and nothing else.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from finetune_api.spec import BatchSize

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
