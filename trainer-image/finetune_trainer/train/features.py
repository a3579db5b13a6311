"""Method Head: what the frozen encoder says of each row is computed once, and the head learns from that.

Most classifiers read the hidden state of one token, the first or the last. Whether one does is proved on a few rows.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from finetune_trainer.data.store import Rows
from finetune_trainer.model.adapters import without_adapters
from finetune_trainer.train.device import Device
from finetune_trainer.train.forward import PROBE_LENGTHS, Forward, differs, tolerance, vocabulary_size
from finetune_trainer.train.micro_batches import Batching, MicroBatch, padded


class Place(Enum):
    """The token whose last hidden state is a row's features."""

    FIRST = "first"
    LAST = "last"

    def of(self, hidden: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """hidden [b, t, width] -> [b, width]"""
        places = [0] * len(lengths) if self is Place.FIRST else [length - 1 for length in lengths]
        return hidden[torch.arange(len(lengths)), torch.tensor(places)]


@dataclass(frozen=True)
class Encoder:
    """The frozen part of a classifier, and how to go on from its features."""

    forward: Forward
    place: Place
    device: Device

    def encode(self, data: Rows, batching: Batching, scratch: Path, on_batch: Callable[[float], None]) -> None:
        """Computes `data.features`, fp32 [rows, width] in a file in `scratch` that goes with the process.

        `on_batch` is called before every micro-batch with the share of the rows that is done; may raise to stop.
        """
        self.forward.model.eval()
        features: npt.NDArray[np.float32] | None = None
        done = 0
        with torch.no_grad(), self.device.autocast():
            for rows in batching.cut(data, np.arange(len(data))):
                on_batch(done / len(data))
                found = self._encode(batching.read(data, rows), data.lengths[rows].tolist())
                if features is None:
                    features = _on_disk(scratch, (len(data), found.shape[1]))
                features[rows] = found
                done += len(rows)
        data.features = features

    def _encode(self, batch: MicroBatch, lengths: list[int]) -> npt.NDArray[np.float32]:
        there = batch.to(self.device.torch_device)
        hidden = self.forward.transform(there).last_hidden_state
        return self.place.of(hidden, lengths).float().cpu().numpy()


def find_encoder(forward: Forward, device: Device) -> Encoder | None:
    """The encoder of a classifier, if its head reads one token alone; the forward pass that it holds takes features.

    Draws nothing from the global RNG; leaves the model in evaluation mode.
    """
    forward.model.eval()
    random = np.random.default_rng(0)
    pad_token_id = int(without_adapters(forward.model).config.pad_token_id or 0)
    words = np.delete(np.arange(vocabulary_size(forward.model)), pad_token_id)
    documents = [random.choice(words, size=length) for length in PROBE_LENGTHS]
    batch = padded(documents, np.zeros(len(documents), np.int64), pad_token_id).to(device.torch_device)
    with torch.no_grad(), device.autocast():
        expected = forward.logits(batch)
        output = forward.transform(batch)
        for place in Place:
            features = place.of(output.last_hidden_state, list(PROBE_LENGTHS)).float()
            on_features = replace(forward, output=output)
            probe = replace(batch, features=features)
            if differs(on_features.logits, probe, expected, tolerance(device)) is None:
                return Encoder(on_features, place, device)
    return None


def _on_disk(folder: Path, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """An array that may be larger than the memory. Its file has no name: nothing is left of it after a kill."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
