"""Direct Preference Optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290): a loss on pairs of answers.

How much likelier has the model made an answer than the model that it started from? That gain should be greater for
the better answer. The start model's side of it never changes, so it is computed once, before the first step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.nn import functional

from finetune_trainer.data.store import Rows
from finetune_trainer.train.device import Device
from finetune_trainer.train.distributed import ALONE, World
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.micro_batches import Batching, MicroBatch
from finetune_trainer.workspace import write_file

LIKELIHOODS, DIGEST = "log_likelihoods", "digest"

Likelihoods = npt.NDArray[np.float32]
"""Logarithms in nats, [pairs, 2]: of the better and of the worse answer, given the prompt."""


@dataclass(frozen=True)
class Preference:
    """What is learned from pairs, in the place of what `forward` would learn from every token."""

    forward: Forward
    beta: float

    def losses(self, batch: MicroBatch) -> torch.Tensor:
        """-log sigmoid(margin), equation 7 of the paper: fp32 [pairs]."""
        return -functional.logsigmoid(self.margins(batch))

    def margins(self, batch: MicroBatch) -> torch.Tensor:
        """beta * (gain of the better answer - gain of the worse one) in nats: fp32 [pairs]."""
        if batch.reference is None:
            raise ValueError("the start model was not asked about these pairs")
        gains = log_likelihoods(self.forward, batch) - batch.reference
        return self.beta * (gains[:, 0] - gains[:, 1])


def log_likelihoods(forward: Forward, batch: MicroBatch) -> torch.Tensor:
    """Of the answers in a micro-batch of pairs, each the sum over its supervised tokens: fp32 [pairs, 2]."""
    documents = torch.split(forward.losses(batch), list(batch.document_targets))
    return -torch.stack([losses.sum() for losses in documents]).view(-1, 2)


def start_likelihoods(
    forward: Forward,
    data: Rows,
    batching: Batching,
    device: Device,
    on_batch: Callable[[float], None],
    *,
    world: World = ALONE,
) -> Likelihoods:
    """Of all pairs of a split under the model as it is now, which is left in evaluation mode.

    `on_batch` is called before every micro-batch with the share of the work that is done, and may raise to stop.
    """
    forward.model.eval()
    own = []
    with torch.no_grad(), device.autocast():
        for batch, counts in batching.own_share(data, world, on_batch):
            likelihoods = log_likelihoods(forward, batch.to(device.torch_device)).cpu().numpy()
            if counts:
                own.append((batch.rows, likelihoods))
    found = np.empty((len(data), 2), np.float32)
    for part in world.gather(own):
        for rows, likelihoods in part:
            found[rows] = likelihoods
    return found


def remember(path: Path, digest: str, likelihoods: Likelihoods) -> None:
    write_file(path, save({LIKELIHOODS: likelihoods}, metadata={DIGEST: digest}))


def recall(path: Path, digest: str) -> Likelihoods | None:
    """What the same run remembered; None if there is nothing whole, or it is another run's."""
    try:
        with safe_open(path, "numpy") as file:
            same = (file.metadata() or {}).get(DIGEST) == digest
            likelihoods: Likelihoods = file.get_tensor(LIKELIHOODS)
            return likelihoods if same else None
    except (OSError, SafetensorError):
        return None
