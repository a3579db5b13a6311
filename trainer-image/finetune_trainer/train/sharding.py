"""Full training by several processes: each holds a part of every weight, of its gradient and of its moments (FSDP2).

Zhao et al. 2023, https://arxiv.org/abs/2304.11277. The transformer's blocks are gathered one by one as they are needed;
what is beside them (embeddings, last norm, output layer) is gathered with the model as a whole.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from finetune_api.constants import Reason
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from finetune_trainer.errors import StageError
from finetune_trainer.model.adapters import block_lists
from finetune_trainer.model.load import fill, trainable_state
from finetune_trainer.train.distributed import Replicas, World
from finetune_trainer.train.forward import RUN_WITHIN

SHARDS = "shards"
"""Folder of a checkpoint that holds weights and moments as torch.distributed.checkpoint writes them."""


class Shards(Replicas):
    """Processes that each hold a part of the weights and make all their passes together."""

    is_sharded = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._mesh = init_device_mesh(device.type, (self.size,))

    def place(self, model: torch.nn.Module, device: torch.device) -> None:
        """Spreads the model over the processes; only its blocks are ever whole on a device, one at a time."""
        blocks = [block for name in block_lists(model) for block in model.get_submodule(name).children()]
        for module in (*blocks, model):
            # also after a forward pass: an evaluation would leave whole weights, which a loaded checkpoint outdates
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nobody changes it in place
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gradients are summed: the loss is already divided
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        setattr(model, RUN_WITHIN, lambda work, *arguments: work(*arguments))
        register_fsdp_forward_method(model, RUN_WITHIN)
        model.to(device)  # buffers

    def sum_gradients(
        self, weights: list[torch.nn.Parameter], only: list[torch.nn.Parameter] | None, loss: torch.Tensor
    ) -> torch.Tensor:
        """The backward pass has summed them."""
        if only is not None:
            kept = {id(weight) for weight in only}
            for weight in weights:
                if id(weight) not in kept:
                    weight.grad = None
        dist.all_reduce(loss)
        return loss

    def clip(self, weights: list[torch.nn.Parameter], most: float) -> torch.Tensor:
        norm = clip_grad_norm_(weights, most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def same(self, weights: Sequence[torch.Tensor]) -> None:
        """Each process has read its part from the same files."""


def save_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, world: World) -> list[Path]:
    """Each process writes its part of weights and moments; returns the files that are this one's."""
    state = {**_weights(model), **{_name(*key): value for key, value in _moments(optimizer).items()}}
    writer = FileSystemWriter(folder / SHARDS)
    _checked(lambda: save(state, storage_writer=writer, process_group=world.control))
    own = list((folder / SHARDS).glob(f"__{world.rank}_*"))
    return [*own, folder / SHARDS / ".metadata"] if world.is_main else own


def load_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path, world: World) -> None:
    """Reads what any number of processes has written; raises StageError if it is another model's."""
    reader = FileSystemReader(folder / SHARDS)
    stored = {
        name: entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    weights = _weights(model)
    if any(stored.get(name) != weight.shape for name, weight in weights.items()):
        raise StageError(
            Reason.STAGE_FAILED,
            f"{folder.name} is from another model or method; delete the checkpoints and train again",
        )
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for index, weight in enumerate(_trained(optimizer)):
        prefix = _name(index, "")
        fields = {name.removeprefix(prefix): size for name, size in stored.items() if name.startswith(prefix)}
        if fields:
            moments[index] = {
                field: torch.zeros_like(weight) if size == weight.shape else torch.zeros(size)
                for field, size in fields.items()
            }
    state = {**weights, **{_name(index, field): t for index, fields in moments.items() for field, t in fields.items()}}
    alone = world.size == 1
    _checked(lambda: load(state, storage_reader=reader, process_group=world.control, no_dist=alone))
    _put_moments(optimizer, moments)


def load_moments(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, torch.Tensor]]) -> None:
    """Puts the optimizer state of one process into the optimizer of any number."""
    weights = list(_trained(optimizer))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for index, fields in state.items():
        weight = weights[index]
        moments[index] = {}
        for field, value in fields.items():
            moments[index][field] = torch.zeros_like(weight) if value.shape == weight.shape else value
            if value.shape == weight.shape:
                fill(moments[index][field], value)
    _put_moments(optimizer, moments)


def _put_moments(optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, torch.Tensor]]) -> None:
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"weights.{name}": weight for name, weight in trainable_state(model).items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    state: dict[int, dict[str, torch.Tensor]] = optimizer.state_dict()["state"]
    return {(index, field): value for index, fields in state.items() for field, value in fields.items()}


def _name(index: int, field: str) -> str:
    return f"optimizer.{index}.{field}"


def _trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """In the order of the optimizer's own numbers."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _checked(work: Callable[[], Any]) -> None:
    """Runs a collective read or write; what failed in one process is raised in all as what it is."""
    try:
        work()
    except CheckpointException as error:
        raise next(failure for failure, _ in error.failures.values()) from None
