"""What training will hold in memory, found on a model without weights: for the operator's memory plan.

Nothing is allocated: the skeleton's tensors are fake, they have a shape and a type and no storage
(https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html). So this is exact for any architecture, and
takes a second where the real pass would take a GPU.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from finetune_api.plan import Plan
from finetune_api.spec import MethodType, Precision
from finetune_api.status import ActivationStatus, ModelStatus
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from finetune_trainer.errors import UserError
from finetune_trainer.model.adapters import training_mode, without_adapters
from finetune_trainer.train.device import cast_frozen, castable_layers
from finetune_trainer.train.memory import check_checkpointing, supports_checkpointing

logger = logging.getLogger(__name__)
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what it says is said here

LONGEST_PROBE = 256
"""Tokens. Three lengths tell the constant, the linear and the quadratic part apart."""


def add_footprint(facts: ModelStatus, build: Callable[[], torch.nn.Module], plan: Plan) -> ModelStatus:
    """The facts with the weights that the method trains and the activations of a pass, as far as they can be found.

    `build` makes the skeleton: the job's model on the meta device. Raises UserError if the method does not fit the
    model; a model whose own code needs real weights is told of in the log, and left to the operator's formulas.
    """
    try:
        skeleton = build()
        check_checkpointing(skeleton, plan)
        facts = facts.model_copy(update=_count(skeleton))
        activations = measure_activations(skeleton, plan, facts.context_length)
    except UserError:
        raise
    except Exception as error:
        # code of a stranger on tensors that it was not written for: what it may raise is not known
        logger.warning("The memory plan goes by formulas: no dry run of %s (%s)", facts.architecture, error)
        return facts
    return facts.model_copy(update={"activations": activations})


def measure_activations(skeleton: torch.nn.Module, plan: Plan, context_length: int | None) -> ActivationStatus:
    """What one training pass keeps for its backward pass, without weights and logits. Casts the skeleton's weights.

    For the device that the plan asks for: on an accelerator, attention keeps no scores whatever its dropout.
    """
    precision = expected_precision(plan)
    cast_frozen(skeleton, precision)
    training_mode(skeleton, head_only=plan.method is MethodType.HEAD)
    longest = min(LONGEST_PROBE, context_length or LONGEST_PROBE)
    lengths = [longest // 4, longest // 2, longest]
    fake = FakeTensorMode()
    _make_fake(skeleton, fake)
    with fake:
        kept = [_kept_bytes(skeleton, n, precision, on_cpu=_may_run_on_cpu(plan)) for n in lengths]
    # the parabola through the three points
    first, second = ((kept[i + 1] - kept[i]) / (lengths[i + 1] - lengths[i]) for i in (0, 1))
    pairs = max(0.0, (second - first) / (lengths[2] - lengths[0]))
    tokens = max(0.0, first - pairs * (lengths[0] + lengths[1]))
    return ActivationStatus(
        precision=precision,
        fixed_bytes=max(0, round(kept[0] - tokens * lengths[0] - pairs * lengths[0] ** 2)),
        bytes_per_token=round(tokens),
        bytes_per_token_pair=round(pairs),
    )


def expected_precision(plan: Plan) -> Precision:
    """Of the device that is not there yet: bf16 is what accelerators have."""
    return plan.training.precision or (Precision.FP32 if _may_run_on_cpu(plan) else Precision.BF16)


def _may_run_on_cpu(plan: Plan) -> bool:
    return plan.device.gpus == 0 or plan.device.allow_cpu_fallback


def _count(skeleton: torch.nn.Module) -> dict[str, int]:
    trained = sum(weight.numel() for weight in skeleton.parameters() if weight.requires_grad)
    return {
        "trainable_parameters": trained,
        "frozen_parameters": sum(weight.numel() for weight in skeleton.parameters()) - trained,
        "supports_checkpointing": supports_checkpointing(skeleton),
        "frozen_linear_parameters": sum(
            weight.numel() for layer in castable_layers(skeleton) for weight in layer.parameters()
        ),
    }


def _make_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors on the CPU into the place of all weights and buffers; shared ones stay shared."""
    replaced: dict[torch.Tensor, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in replaced:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, torch.nn.Parameter)
            replaced[tensor] = torch.nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return replaced[tensor]

    with mode:
        for module in model.modules():
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fake(tensor)


def _kept_bytes(model: torch.nn.Module, tokens: int, precision: Precision, *, on_cpu: bool) -> int:
    """Bytes that the pass of one row saves for the backward pass, each storage once and weights not at all.

    The output layer is left out: its logits are made in chunks, and the memory plan counts these.
    """
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BF16),
        _Attention(on_cpu),
    ):
        output = without_adapters(model).base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    del output
    return sum(storage.nbytes() for storage in storages.values())


class _Attention(TorchFunctionMode):
    """On CPU, fused attention has no dropout, and torch falls back to one that keeps the scores; accelerators' has."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention and not self._on_cpu and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
