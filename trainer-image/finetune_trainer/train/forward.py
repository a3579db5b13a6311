"""How a model is run on micro-batches: documents packed or rows padded, logits only where there is something to learn.

What a model can do is not looked up by its name but proved on a few tokens, against its plain forward pass.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from finetune_api.spec import Precision, Task
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from finetune_trainer.model.adapters import block_lists, without_adapters
from finetune_trainer.train import attention
from finetune_trainer.train.attention import PACKED, CannotPackError
from finetune_trainer.train.device import Device
from finetune_trainer.train.micro_batches import MicroBatch, arrange

LOGITS_BYTES = 256 * 2**20
"""Most that the logits of one chunk take in fp32. With a vocabulary of 128,000 that is 524 targets: enough to keep a
GPU busy, where those of all 8,192 tokens of a micro-batch would take 4 GiB, and as much again for their gradients."""

RUN_WITHIN = "run_within_forward"
"""Method of a sharded model that runs a function with the model's own weights gathered, as its forward pass does."""

KINDS_OF_ATTENTION = ("full_attention", "sliding_attention")
MOST_GRAPHS = 256
"""Of one piece of code: eight lengths per power of two, in training and in evaluation, and then some."""
PROBE_LENGTHS = (5, 9, 4)
EXACT, ROUNDED = 1e-5, 3e-2


@dataclass(frozen=True)
class Forward:
    """Runs `model`, which keeps its mode (training or evaluation); `prove` makes one."""

    model: torch.nn.Module
    task: Task
    packs: bool = False
    """Documents stand side by side in one sequence, without padding; the model's attention is that of `attention`."""
    why_padded: str | None = None
    """What keeps this model from packing, for people."""
    apart: bool = False
    """Whether what follows on the last hidden states can be run apart from them: so, the logits come in chunks."""
    output: Any = None
    """Classification on features: an output of the transformer, to be given again with these in it."""

    @property
    def batching(self) -> str:
        """How rows lie in a micro-batch, for people."""
        if self.output is not None:
            return "encoded once"
        if self.packs:
            return "packed"
        return f"padded: {self.why_padded}" if self.why_padded else "padded"

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Of the classes, fp32 [rows, classes] (Classification)."""
        if batch.features is not None:
            return logits_of(self.model, self.output, batch.features.unsqueeze(1))
        logits: torch.Tensor = self.model(**_inputs(batch)).logits
        return logits.float()

    def transform(self, batch: MicroBatch) -> Any:
        """What the transformer alone gives, with `last_hidden_state` [b, t, width]."""
        return without_adapters(self.model).base_model(**_inputs(batch))

    def losses(self, batch: MicroBatch) -> torch.Tensor:
        """Cross-entropy of each target in nats, fp32 [n]."""
        if batch.positions is None:
            return cross_entropy(self.logits(batch), batch.targets)
        if not self.apart:
            logits = self.model(**_inputs(batch)).logits.flatten(0, 1)
            return cross_entropy(logits[batch.positions], batch.targets)
        # a sharded model has to gather what is beside its transformer's blocks
        run = getattr(self.model, RUN_WITHIN, lambda work, *arguments: work(*arguments))
        losses: torch.Tensor = run(self._losses_apart, batch)
        return losses

    def _losses_apart(self, batch: MicroBatch) -> torch.Tensor:
        output = self.transform(batch)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.positions]
        return self._losses_in_chunks(output, hidden, batch.targets)

    def _losses_in_chunks(self, output: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """All logits at once would be the largest tensor by far. The backward pass computes those of a chunk anew."""
        size = max(1, LOGITS_BYTES // (4 * vocabulary_size(self.model)))

        def losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(logits_of(self.model, output, hidden.unsqueeze(0))[0], targets)

        if len(hidden) <= size:
            return losses(hidden, targets)
        chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks])


def prove(model: torch.nn.Module, task: Task, device: Device) -> Forward:
    """The fastest way to run `model` that gives the same losses as its plain forward pass on padded rows.

    If it packs, its attention is switched over for good. Draws nothing from the global RNG; leaves the mode as it was.
    """
    if task is Task.CLASSIFICATION:
        return Forward(model, task)
    training = model.training
    try:
        with torch.no_grad(), device.autocast():
            return _prove(model.eval(), device)
    finally:
        model.train(training)


def compile_blocks(forward: Forward, backend: str = "inductor") -> None:
    """Has torch.compile make kernels of each transformer block, whose attention stays as it is.

    Packed, there is one graph per length (see `Batching.in_buckets`); padded, whose shapes have two sides, few for all.
    """
    own = without_adapters(forward.model)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for name in block_lists(own):
        for block in own.get_submodule(name).children():
            block.compile(backend=backend, dynamic=False if forward.packs else None)


def logits_of(model: torch.nn.Module, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What `model` makes of the last hidden states [b, t, width]: fp32 [b, classes] or [b, t, vocabulary].

    It runs its own forward, so that scaling and soft-capping happen, with `hidden` in the place of what its
    transformer gives. `output` is an earlier one of that, whose other parts are given again.
    """
    whole = without_adapters(model)
    output = copy.copy(output)
    output.last_hidden_state = hidden
    if getattr(output, "pooler_output", None) is not None:
        output.pooler_output = whole.base_model.pooler(hidden)
    with _standing_in(whole.base_model, output):
        # not by a call, which would gather the weights of a sharded model a second time
        logits: torch.Tensor = whole.forward(input_ids=hidden.new_zeros(hidden.shape[:2], dtype=torch.long)).logits
    return logits.float()


@contextmanager
def _standing_in(module: torch.nn.Module, output: Any) -> Iterator[None]:
    """While it is entered, `module` gives `output` and computes nothing."""
    own = vars(module).get("forward")  # set where somebody has wrapped it
    module.forward = lambda *_arguments, **_named: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _prove(model: torch.nn.Module, device: Device) -> Forward:
    own = without_adapters(model)
    plain, padded, packed = Forward(model, Task.GENERATION), _probe(model, False, device), _probe(model, True, device)
    expected = plain.losses(padded)
    apart = replace(plain, apart=True)
    if own.base_model is own or differs(apart.losses, padded, expected, tolerance(device)):
        apart = plain
    before = own.config._attn_implementation
    forward = replace(apart, packs=True)
    why = _switch_attention(own) or differs(forward.losses, packed, expected, tolerance(device))
    if why is None:
        return forward
    own.set_attn_implementation(before)
    return replace(apart, why_padded=why)


def tolerance(device: Device) -> float:
    """How far results may differ, relative and absolute: on CPU fp32 is not rounded to TF32."""
    return EXACT if device.torch_device.type == "cpu" and device.precision is Precision.FP32 else ROUNDED


def _probe(model: torch.nn.Module, packed: bool, device: Device) -> MicroBatch:
    """A few documents with a loss at every token."""
    random = np.random.default_rng(0)
    documents = [random.integers(vocabulary_size(model), size=length) for length in PROBE_LENGTHS]
    supervised = [np.ones(length, np.bool_) for length in PROBE_LENGTHS]
    return arrange(documents, supervised, 0, packed).to(device.torch_device)


def _switch_attention(model: PreTrainedModel) -> str | None:
    """Puts `attention` in the place of the model's own; says why that cannot be done."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if unknown := sorted(kinds - {*KINDS_OF_ATTENTION}):
        return f"some of its layers have {unknown[0].replace('_', ' ')}"
    attention.register()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it warns of is said here
    try:
        model.set_attn_implementation(PACKED)
    except (ValueError, ImportError):
        return "its attention cannot be exchanged"
    finally:
        transformers_logging.set_verbosity(verbosity)
    return None if model.config._attn_implementation == PACKED else "its attention cannot be exchanged"


def differs(
    run: Callable[[MicroBatch], torch.Tensor], batch: MicroBatch, expected: torch.Tensor, most: float
) -> str | None:
    """What is wrong with what `run` gives for `batch`."""
    try:
        found = run(batch)
    except CannotPackError as problem:
        return str(problem)
    except (TypeError, ValueError, AttributeError, RuntimeError) as problem:
        return f"it cannot be run on packed documents ({type(problem).__name__})"
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=most, atol=most)
    return None if same else "its documents would see each other"


def vocabulary_size(model: torch.nn.Module) -> int:
    """Of the input embeddings."""
    return int(without_adapters(model).get_input_embeddings().weight.shape[0])


def _inputs(batch: MicroBatch) -> dict[str, Any]:
    if batch.documents is None:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "documents": batch.documents}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each target in nats, fp32 [n]."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")
