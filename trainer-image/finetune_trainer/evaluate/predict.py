"""Runs a model over a split and scores what it says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from finetune_api.plan import PlanDpo
from finetune_api.report import Evaluation
from finetune_api.spec import Task

from finetune_trainer.data.store import Rows
from finetune_trainer.evaluate.metrics import classification, generation, preference
from finetune_trainer.train.device import Device
from finetune_trainer.train.distributed import ALONE, World
from finetune_trainer.train.forward import Forward, cross_entropy
from finetune_trainer.train.micro_batches import Batching
from finetune_trainer.train.preference import Preference

OnBatch = Callable[[float], None]
"""Called before every micro-batch with the share of the work that is done; may raise to stop."""


@dataclass(frozen=True)
class Evaluator:
    """All that an evaluation needs beside the model and the rows."""

    batching: Batching
    labels: list[str] | None
    device: Device
    dpo: PlanDpo | None = None
    world: World = ALONE

    def __call__(self, name: str, forward: Forward, data: Rows, on_batch: OnBatch) -> Evaluation:
        """Scores of the model on every row of `data`, in all processes the same. Leaves it in evaluation mode."""
        forward.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        predicted, true, margins, targets = [], [], [], 0
        with torch.no_grad(), self.device.autocast():
            for batch, counts in self.batching.own_share(data, self.world, on_batch):
                there = batch.to(self.device.torch_device)
                if not counts:
                    forward.losses(there)
                    continue
                if forward.task is Task.CLASSIFICATION:
                    logits = forward.logits(there)
                    loss += cross_entropy(logits, there.targets).sum()
                    predicted.append(logits.argmax(dim=-1))
                    true.append(batch.targets)
                elif self.dpo is not None:
                    margins.append(Preference(forward, self.dpo.beta).margins(there))
                else:
                    loss += forward.losses(there).sum()
                targets += len(batch.targets)
        found = self.world.gather((float(loss), targets, _join(true), _join(predicted), _join(margins)))
        if self.dpo is not None:
            return preference(name, np.concatenate([part[4] for part in found]).astype(np.float64))
        mean = sum(part[0] for part in found) / max(1, sum(part[1] for part in found))
        if forward.task is Task.GENERATION:
            return generation(name, mean)
        labelled, answered = (np.concatenate([part[at] for part in found]) for at in (2, 3))
        return classification(name, labelled, answered, mean, self.labels or [])


def _join(parts: list[torch.Tensor]) -> npt.NDArray[Any]:
    return torch.cat(parts).cpu().numpy() if parts else np.zeros(0, np.int64)
