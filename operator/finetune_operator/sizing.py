"""How long a run is and what one forward pass may hold, from the facts that prepare found. Pure.

A first, careful answer that keeps small machines alive. The full memory plan (which GPU, which sharding, whether the
job fits at all) has its place here.
"""

import math
from dataclasses import dataclass

from finetune_api.spec import FineTuneJobSpec, MethodType, Task
from finetune_api.status import DataStatus, ModelStatus
from kubernetes.utils.quantity import parse_quantity

GIB = 2**30

GPU_ACTIVATIONS = 4 * GIB
CPU_ACTIVATIONS = 1 * GIB
"""Memory for the activations of one forward and backward pass where the device's own memory is not known. 4 GiB fit
a GPU of 24 GB beside the bf16 weights of a 7B model; more than 1 GiB makes no CPU faster."""

RUNTIME_BYTES = 1 * GIB
"""A process with torch and transformers loaded, before any weights."""

LARGEST = 2**60
"""Bytes: more than any machine has."""

CHECKPOINTS_PER_RUN = 20


@dataclass(frozen=True)
class RunLength:
    """In optimizer steps. The trainer, which knows every row's length, counts for itself; see `run_length`."""

    steps_per_epoch: int
    total_steps: int

    @property
    def checkpoint_steps(self) -> int:
        """A twentieth of the run."""
        return math.ceil(self.total_steps / CHECKPOINTS_PER_RUN)

    @property
    def evaluation_steps(self) -> int:
        """Once per epoch, and in a run shorter than an epoch once at its end."""
        return min(self.steps_per_epoch, self.total_steps)


def run_length(
    data: DataStatus, sequences: int | None, tokens: int | None, epochs: float | None, max_steps: int | None
) -> RunLength:
    """Steps of a run whose optimizer steps hold `sequences` rows or at most `tokens` tokens.

    steps_per_epoch = ceil(rows / sequences), or ceil(all tokens / tokens); total = max_steps or ceil(epochs * it).
    Exact for sequences; with tokens the trainer needs a few more, since rows are not cut to fill a step.
    """
    share = data.train_rows / sequences if sequences is not None else data.tokens / (tokens or 1)
    steps_per_epoch = max(1, math.ceil(share))
    return RunLength(steps_per_epoch, max_steps or max(1, math.ceil((epochs or 0) * steps_per_epoch)))


def micro_batch_tokens(spec: FineTuneJobSpec, model: ModelStatus, max_length: int, batch_tokens: int) -> int:
    """Most padded tokens of one forward pass: as many as the activations' memory holds.

    Never less than `max_length`, so that the longest row fits, and never more than that or `batch_tokens`, the most
    that one optimizer step has.
    """
    per_token = activation_bytes_per_token(model, spec.task)
    fitting = 0 if per_token is None else activation_memory(spec, model) // per_token
    return max(max_length, min(fitting, batch_tokens))


def activation_bytes_per_token(model: ModelStatus, task: Task) -> int | None:
    """Bytes that the backward pass keeps per token; None if the model's shape is not known.

    Per transformer block 34 * hidden_size bytes in 16 bits (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198,
    equation 2, without the attention scores, which fused attention does not keep), twice that in fp32, the safe case.
    Generation adds the logits, their log-softmax and their gradient in fp32: 12 bytes per known token.
    """
    if not model.layers or not model.hidden_size:
        return None
    logits = 12 * (model.vocabulary_size or 0) if task is Task.GENERATION else 0
    return 2 * 34 * model.hidden_size * model.layers + logits


def activation_memory(spec: FineTuneJobSpec, model: ModelStatus) -> int:
    """Bytes for activations. A memory limit counts where training may run on CPU: half of what weights leave."""
    on_cpu = spec.resources.gpus == 0
    usual = CPU_ACTIVATIONS if on_cpu else GPU_ACTIVATIONS
    limit = _memory_limit(spec)
    if limit is None or not (on_cpu or spec.resources.allow_cpu_fallback):
        return usual
    return max(0, min(usual, (limit - RUNTIME_BYTES - _weight_bytes(spec, model)) // 2))


def _weight_bytes(spec: FineTuneJobSpec, model: ModelStatus) -> int:
    """fp32 weights; a weight that is trained has a gradient and Adam's two moments beside it (16 bytes in all).

    What LoRA and Head train, about a hundredth of the weights, is left out.
    """
    return model.parameters * (16 if spec.method.type is MethodType.FULL else 4)


def _memory_limit(spec: FineTuneJobSpec) -> int | None:
    """resources.limits.memory in bytes; None without one, or if it is no number (the API server will say so)."""
    text = (spec.resources.limits or {}).get("memory")
    if text is None:
        return None
    try:
        return int(min(parse_quantity(text), LARGEST))  # an int of 1e999999 would take the machine's memory
    except ValueError:
        return None
