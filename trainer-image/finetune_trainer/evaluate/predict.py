"""Runs a model over a split and scores what it says."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from finetune_api.report import Evaluation
from finetune_api.spec import Task

from finetune_trainer.data.store import Rows
from finetune_trainer.evaluate.metrics import Integers, classification, generation
from finetune_trainer.train.batches import Batching
from finetune_trainer.train.device import Device
from finetune_trainer.train.distributed import ALONE, World
from finetune_trainer.train.forward import Forward, cross_entropy

OnBatch = Callable[[float], None]
"""Called before every micro-batch with the share of the work that is done; may raise to stop."""


@dataclass(frozen=True)
class Evaluator:
    """All that an evaluation needs beside the model and the rows."""

    batching: Batching
    labels: list[str] | None
    device: Device
    world: World = ALONE

    def __call__(self, name: str, forward: Forward, data: Rows, on_batch: OnBatch) -> Evaluation:
        """Scores of the model on every row of `data`, in all processes the same. Leaves it in evaluation mode."""
        forward.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        predicted, true, targets = [], [], 0
        groups = self.batching.cut(data, np.arange(len(data)))
        share = self.world.share([int(data.lengths[rows].sum()) for rows in groups])
        turns = len(share.numbers) + share.idle
        with torch.no_grad(), self.device.autocast():
            for turn, number in enumerate(share.numbers):
                on_batch(turn / turns)
                batch = self.batching.read(data, groups[number])
                there = batch.to(self.device.torch_device)
                if forward.task is Task.CLASSIFICATION:
                    logits = forward.logits(there)
                    loss += cross_entropy(logits, there.targets).sum()
                    predicted.append(logits.argmax(dim=-1))
                    true.append(batch.targets)
                else:
                    loss += forward.losses(there).sum()
                targets += len(batch.targets)
            for turn in range(len(share.numbers), turns):
                on_batch(turn / turns)
                if self.world.is_sharded:  # the others need this process's part of the weights
                    forward.losses(self.batching.read(data, groups[-1]).to(self.device.torch_device))
        found = self.world.gather((float(loss), targets, _join(true), _join(predicted)))
        mean = sum(part[0] for part in found) / max(1, sum(part[1] for part in found))
        if forward.task is Task.GENERATION:
            return generation(name, mean)
        labelled, answered = (np.concatenate([part[at] for part in found]) for at in (2, 3))
        return classification(name, labelled, answered, mean, self.labels or [])


def _join(parts: list[torch.Tensor]) -> Integers:
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.int64)
