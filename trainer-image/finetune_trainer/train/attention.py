"""Attention for documents that stand side by side in one sequence, none of which sees another.

It is registered with transformers under a name of its own; the model's layers call it with the `documents` that the
forward pass was given. It needs no mask, so none is built.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from finetune_trainer.train.micro_batches import Documents

PACKED = "finetune_packed"
"""The name in `config._attn_implementation`."""

UNKNOWN_ARGUMENTS = ("s_aux", "position_bias", "head_mask")
"""What some models add to their scores; dropping it would give wrong ones."""


class CannotPackError(Exception):
    """The model's attention is of a kind that cannot be computed per document; says which."""


@dataclass(frozen=True)
class _Scores:
    """How a layer makes its scores."""

    causal: bool
    window: int | None
    """Tokens that one sees before it, itself included (and as many behind it, if not causal)."""
    scaling: float | None
    softcap: float | None
    dropout: float


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
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

    The arguments are those of an attention function of transformers. Raises CannotPackError if some of them are of no
    known meaning, or the model did not pass the documents on.
    """
    if documents is None:
        raise CannotPackError("its layers do not hand the borders of documents to their attention")
    if unknown := [name for name in UNKNOWN_ARGUMENTS if others.get(name) is not None]:
        raise CannotPackError(f"its attention takes {unknown[0]}")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scores = _Scores(causal, sliding_window, scaling, softcap, dropout)
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # as it does itself for the attention of torch
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    if dropout == 0 and softcap is None and _has_flash_attention(query):
        return _attend_all(query, key, value, documents, scores), None
    queries, keys, values = (torch.split(part, list(documents.lengths), dim=2) for part in (query, key, value))
    outputs = [_attend(q, k, v, scores).transpose(1, 2) for q, k, v in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=1), None


def register() -> None:
    """Makes `PACKED` known to transformers."""
    # its loop over documents would be another graph for every batch: torch.compile goes around it
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]


def _has_flash_attention(query: torch.Tensor) -> bool:
    """Whether `varlen_attn` takes it: 16 bits, heads of at most 256 in steps of 8, an NVIDIA GPU since Ampere."""
    width = query.shape[-1]
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0
    return fits and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attend_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scores: _Scores
) -> torch.Tensor:
    """All documents in one call of Flash Attention: [1, t, heads, d]."""
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if scores.window is None else scores.window - 1
    attended: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # its decorator hides what it takes
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        documents.starts,
        documents.starts,
        documents.longest,
        documents.longest,
        scale=scores.scaling,
        window_size=(before, 0 if scores.causal else before),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.unsqueeze(0)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: _Scores) -> torch.Tensor:
    """One document: [1, heads, t, d]."""
    length, causal, mask = query.shape[2], scores.causal, None
    if scores.window is not None and scores.window < length:
        mask, causal = _seen(length, scores.window, causal, query.device), False
    if scores.softcap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            scores.dropout,
            causal,
            scale=scores.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if mask is None and causal:
        mask = _seen(length, length, causal, query.device)
    return _attend_capped(query, key, value, mask, scores)


def _seen(length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """What each token (row) sees: bool [t, t]."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back < window) & (back >= 0 if causal else back > -window)


def _attend_capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scores: _Scores
) -> torch.Tensor:
    """With scores capped by softcap * tanh(score / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118)."""
    groups, softcap = query.shape[1] // key.shape[1], scores.softcap or 1.0
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scores.scaling is None else scores.scaling
    capped = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if mask is not None:
        capped = capped.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(capped, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, scores.dropout) @ value
