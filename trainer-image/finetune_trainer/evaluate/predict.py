"""Runs a model over a split and scores what it says."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from finetune_api.report import Evaluation
from finetune_api.spec import Task

from finetune_trainer.data.store import Rows
from finetune_trainer.evaluate.metrics import classification, generation
from finetune_trainer.train.batches import collate, micro_batches
from finetune_trainer.train.device import Device
from finetune_trainer.train.loss import predict

OnBatch = Callable[[float], None]
"""Called before every micro-batch with the share of the rows that is done; may raise to stop."""


@dataclass(frozen=True)
class Evaluator:
    """All that an evaluation needs beside the model and the rows."""

    task: Task
    labels: list[str] | None
    device: Device
    micro_batch_tokens: int
    pad_token_id: int

    def __call__(self, name: str, model: torch.nn.Module, data: Rows, on_batch: OnBatch) -> Evaluation:
        """Scores of `model` on every row of `data`. Leaves the model in evaluation mode."""
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        predicted, true, targets, done = [], [], 0, 0
        with torch.no_grad(), self.device.autocast():
            for rows in micro_batches(np.arange(len(data)), data.lengths, self.micro_batch_tokens):
                on_batch(done / len(data))
                batch = collate(data, rows, self.pad_token_id, self.task)
                predictions = predict(model, batch.to(self.device.torch_device))
                loss += predictions.losses().sum()
                targets += len(batch.targets)
                done += len(rows)
                if self.task is Task.CLASSIFICATION:
                    predicted.append(predictions.logits.argmax(dim=-1))
                    true.append(batch.targets)
        mean = float(loss) / max(1, targets)
        if self.task is Task.GENERATION:
            return generation(name, mean)
        return classification(
            name, torch.cat(true).numpy(), torch.cat(predicted).cpu().numpy(), mean, self.labels or []
        )
