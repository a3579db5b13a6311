"""Runs a model over a split and scores what it says."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from finetune_api.plan import PlanDpo
from finetune_api.report import Evaluation
from finetune_api.spec import Task

from finetune_trainer.data.store import Rows
from finetune_trainer.evaluate.metrics import classification, generation, preference
from finetune_trainer.train.batches import Batching
from finetune_trainer.train.device import Device
from finetune_trainer.train.forward import Forward, cross_entropy
from finetune_trainer.train.preference import Preference

OnBatch = Callable[[float], None]
"""Called before every micro-batch with the share of the rows that is done; may raise to stop."""


@dataclass(frozen=True)
class Evaluator:
    """All that an evaluation needs beside the model and the rows."""

    batching: Batching
    labels: list[str] | None
    device: Device
    dpo: PlanDpo | None = None

    def __call__(self, name: str, forward: Forward, data: Rows, on_batch: OnBatch) -> Evaluation:
        """Scores of the model on every row of `data`. Leaves it in evaluation mode."""
        forward.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        predicted, true, margins, targets, done = [], [], [], 0, 0
        with torch.no_grad(), self.device.autocast():
            for rows in self.batching.cut(data, np.arange(len(data))):
                on_batch(done / len(data))
                batch = self.batching.read(data, rows)
                there = batch.to(self.device.torch_device)
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
                done += len(rows)
        if self.dpo is not None:
            return preference(name, torch.cat(margins).double().cpu().numpy())
        mean = float(loss) / max(1, targets)
        if forward.task is Task.GENERATION:
            return generation(name, mean)
        return classification(
            name, torch.cat(true).numpy(), torch.cat(predicted).cpu().numpy(), mean, self.labels or []
        )
