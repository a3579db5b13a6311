"""Attention for documents that stand side by side in one sequence, none of which sees another.

It is registered with transformers under a name of its own; the model's layers call it with the `documents` that the
forward pass was given. It needs no mask, so none is built.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from finetune_trainer.train.batches import Documents

PACKED = "finetune_packed"
"""The name in `config._attn_implementation`."""

UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "head_mask")
"""What some models add to their scores; dropping it would give wrong ones."""


class CannotPack(Exception):
    """The model's attention is of a kind that cannot be computed per document; says which."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each document: query [1, heads, t, d], key and value [1, groups, t, d] -> [1, t, heads, d].

    The arguments are those of an attention function of transformers. Raises CannotPack if some of them are of no known
    meaning, or the model did not pass the documents on.
    """
    if documents is None:
        raise CannotPack("its layers do not hand the borders of documents to their attention")
    if unknown := [name for name in UNKNOWN_ARGUMENTS if others.get(name) is not None]:
        raise CannotPack(f"its attention takes {unknown[0]}")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # as it does itself for the attention of torch
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if dropout == 0 and softcap is None and _has_flash_attention(query):
        return _varlen(query, key, value, documents, causal, sliding_window, scaling), None
    parts = [part.split(documents.lengths, dim=2) for part in (query, key, value)]
    outputs = [
        _attend(q, k, v, causal, sliding_window, softcap, dropout, scaling).transpose(1, 2)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def register() -> None:
    """Makes `PACKED` known to transformers."""
    AttentionInterface.register(PACKED, packed_attention)


def _has_flash_attention(query: torch.Tensor) -> bool:
    """Whether `varlen_attn` takes it: 16 bits, heads of at most 256 in steps of 8, an NVIDIA GPU since Ampere."""
    width = query.shape[-1]
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0
    return fits and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    causal: bool,
    sliding_window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """All documents in one call of Flash Attention."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = documents.starts, documents.longest
    reach = -1 if sliding_window is None else sliding_window - 1
    attended = varlen_attn(
        *(part[0].transpose(0, 1) for part in (query, key, value)),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.unsqueeze(0)  # type: ignore[union-attr]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """One document: [1, heads, t, d]."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    mask = None
    if sliding_window is not None and sliding_window < length:
        mask, causal = _window(length, sliding_window, causal, query.device), False
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling, enable_gqa=grouped)
    if mask is None and causal:
        mask = _window(length, length, causal, query.device)
    return _capped(query, key, value, mask, softcap, dropout, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _window(length: int, reach: int, causal: bool, device: torch.device) -> torch.Tensor:
    """True where a token is seen: those less than `reach` before it and, if not causal, behind it. bool [t, t]."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back < reach) & (back >= 0 if causal else back > -reach)


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    """With scores capped by softcap * tanh(score / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value
