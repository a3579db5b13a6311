"""Less memory for the same result: activations that are computed again, a heap that gives back what is free."""

import ctypes
import logging
import sys

import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan

from finetune_trainer.errors import UserError
from finetune_trainer.model.adapters import without_adapters

logger = logging.getLogger(__name__)

M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""

MAPPED_BYTES = 2**20


def check_checkpointing(model: torch.nn.Module, plan: Plan) -> None:
    """Raises UserError if the job asks for activation checkpointing, and the model has no blocks that can do it."""
    if plan.training.activation_checkpointing and not supports_checkpointing(model):
        raise UserError(
            Reason.INVALID_SPEC,
            f"training.activationCheckpointing: {type(without_adapters(model)).__name__} cannot compute its "
            "activations again; leave it out",
        )


def supports_checkpointing(model: torch.nn.Module) -> bool:
    return bool(getattr(without_adapters(model), "supports_gradient_checkpointing", False))


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Keeps only the input of each block, and computes the rest again in the backward pass, with the same dropout.

    In evaluation mode nothing changes.
    """
    settings = {
        "use_reentrant": False
    }  # the other kind needs inputs that require grad, which frozen embeddings have not
    without_adapters(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def return_free_memory() -> None:
    """Has blocks of a MiB and more given back to the system as soon as they are free, on a machine with glibc.

    Left alone, glibc learns to keep what is below 32 MiB, and the holes between activations of different sizes then
    cost up to as much again as the activations themselves. Giving back costs time instead: each new block is zeroed.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    except AttributeError:  # another C library
        logger.info("No mallopt in this C library: training on CPU may take more memory than was planned")
