"""Linear layers on CPU: fp32 products by oneDNN, LoRA's update added in place.

torch gives fp32 matrix products to MKL, which leaves AVX-512 alone on CPUs that are not Intel's; oneDNN, which torch
carries too, uses it (see benchmarks/README.md). It is reached through the operator that torch.compile uses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.autograd.function import once_differentiable

Tensors = tuple[torch.Tensor | None, ...]


def speed_up(model: torch.nn.Module) -> None:
    """Gives the linear layers of a model on CPU a faster forward and backward pass with the same results.

    It works where everything is fp32; otherwise a layer runs as before.
    """
    if not _has_onednn():
        return
    for layer in model.modules():
        if type(layer) is torch.nn.Linear:
            layer.forward = partial(_linear, layer, layer.forward)  # type: ignore[method-assign]
        elif type(layer) is LoraLinear:
            layer.forward = partial(_lora, layer, layer.forward)


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _linear(layer: torch.nn.Linear, slow: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    if not _is_plain(inputs, layer.weight):
        return slow(inputs)
    product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        inputs.reshape(-1, inputs.shape[-1]), layer.weight, layer.bias
    )
    return product.view(*inputs.shape[:-1], -1)


def _lora(
    layer: Any, slow: Callable[..., torch.Tensor], inputs: torch.Tensor, *arguments: Any, **named: Any
) -> torch.Tensor:
    names = layer.active_adapters
    fits = len(names) == 1 and names[0] in layer.lora_A and names[0] not in layer.lora_variant
    base = layer.base_layer
    frozen = type(base) is torch.nn.Linear and not any(weight.requires_grad for weight in base.parameters())
    if not (fits and frozen) or arguments or named or layer.merged or layer.disable_adapters:
        return slow(inputs, *arguments, **named)
    name = names[0]
    down, up = layer.lora_A[name], layer.lora_B[name]
    plain = _is_plain(inputs, base.weight, down.weight, up.weight) and down.bias is None and up.bias is None
    if not plain or any(_has_hooks(part) for part in (base, down, up)):
        return slow(inputs)
    flat = inputs.reshape(-1, inputs.shape[-1])
    dropped = layer.lora_dropout[name](inputs)  # not of `flat`: another layout in memory would get another mask
    dropped = flat if dropped is inputs else dropped.reshape(flat.shape)
    product: torch.Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
        flat, dropped, base.weight, base.bias, down.weight, up.weight, layer.scaling[name]
    )
    return product.view(*inputs.shape[:-1], -1)


def _is_plain(inputs: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether all are fp32 on CPU and stay so."""
    plain = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in (inputs, *weights))
    return plain and inputs.numel() > 0 and not torch.is_autocast_enabled("cpu")


def _has_hooks(part: torch.nn.Module) -> bool:
    """Whether somebody wants to hear of its forward or backward pass, which is not run by itself here."""
    return bool(part._forward_pre_hooks or part._forward_hooks or part._backward_pre_hooks or part._backward_hooks)


def _times_transposed(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """left [n, k], right [m, k] -> left @ right.T + bias, [n, m]."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """x [n, in], weight [out, in], bias [out] -> x @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _times_transposed(x, weight, bias)

    @staticmethod
    @once_differentiable  # a second derivative would be wrong: say so
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _times_transposed(gradient, weight.t()) if of_x else None,
            _times_transposed(gradient.t(), x.t()) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


class _LoraProduct(torch.autograd.Function):
    """x @ weight.T + bias + scale * (dropped @ down.T) @ up.T, where `dropped` is x after LoRA's dropout."""

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd functions take no names)
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low = torch.mm(dropped, down.t())
        ctx.save_for_backward(dropped, weight, down, up, low)
        ctx.scale, ctx.same = scale, dropped is x
        return _times_transposed(x, weight, bias).addmm_(low, up.t(), alpha=scale)

    @staticmethod
    @once_differentiable  # a second derivative would be wrong: say so
    def backward(ctx: Any, *gradients: torch.Tensor) -> Tensors:
        (gradient,), (dropped, weight, down, up, low) = gradients, ctx.saved_tensors
        of_low = torch.mm(gradient, up).mul_(ctx.scale)
        of_x = _times_transposed(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_dropped = None
        if ctx.same and of_x is not None:
            of_x.addmm_(of_low, down)
        elif ctx.needs_input_grad[1]:
            of_dropped = torch.mm(of_low, down)
        of_down = torch.mm(of_low.t(), dropped)
        of_up = torch.mm(gradient.t(), low).mul_(ctx.scale)
        return of_x, of_dropped, None, None, of_down, of_up, None
