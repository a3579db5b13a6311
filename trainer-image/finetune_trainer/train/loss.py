"""The model's losses on a micro-batch, computed only where there is something to learn."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from finetune_trainer.train.batches import MicroBatch


class Predictions(NamedTuple):
    logits: torch.Tensor
    """fp32 [n, classes or vocabulary]"""
    targets: torch.Tensor
    """int64 [n]"""

    def losses(self) -> torch.Tensor:
        """Cross-entropy in nats, fp32 [n]."""
        return functional.cross_entropy(self.logits, self.targets, reduction="none")


def predict(model: torch.nn.Module, batch: MicroBatch) -> Predictions:
    """Logits for the targets of a micro-batch; for Generation at the supervised positions alone.

    All logits would be the largest tensor by far, and most of them have no target. The model runs its own
    forward, so that scaling and soft-capping happen; only the input of its output layer is narrowed on the way.
    """
    if batch.positions is None:
        return Predictions(_forward(model, batch).float(), batch.targets)
    rows, positions = batch.positions
    with _narrowed_output(model, rows, positions):
        logits = _forward(model, batch)
    # a model that computes its logits without its output layer has all of them: never [1, n], for n < t
    all_of_them = logits.shape[:2] == batch.input_ids.shape
    return Predictions((logits[rows, positions] if all_of_them else logits[0]).float(), batch.targets)


def _forward(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits


def _narrowed_output(
    model: torch.nn.Module, rows: torch.Tensor, positions: torch.Tensor
) -> AbstractContextManager[Any]:
    """While it is entered, the output layer sees the hidden states at these n places only, as [1, n, width]."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if layer is None:
        return nullcontext()

    def narrow(_layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][rows, positions].unsqueeze(0), *inputs[1:])

    return layer.register_forward_pre_hook(narrow)  # type: ignore[no-any-return]
