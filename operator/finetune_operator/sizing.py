"""How long a run is, and what it needs in memory, from the facts that prepare found. Pure.

The memory plan is made before a GPU is asked for: how many tokens one pass may hold, whether activations are kept or
computed again, how many GPUs it takes, and whether the job fits at all. What it says is per GPU, or of the training
process on CPU.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from finetune_api.plan import PlanTraining
from finetune_api.spec import FineTuneJobSpec, MethodType, Precision, Task
from finetune_api.status import DataStatus, ModelStatus
from kubernetes.utils.quantity import parse_quantity

GIB = 2**30

GPU_ACTIVATIONS = 4 * GIB
CPU_ACTIVATIONS = 1 * GIB
"""Most for the activations of one pass where the device's own memory is not known; on CPU also where it is, for more
makes no CPU faster. 4 GiB fit a GPU of 24 GB beside the bf16 weights of a 7B model."""

MOST_TOKENS = 32768
"""Of a pass that chooses its own size: no accelerator becomes faster beyond."""

LOGITS_CHUNK = 256 * 2**20
"""Most bytes of fp32 logits that the trainer makes at a time."""

LOGITS_COPIES = 3
"""Logits, their log-softmax and their gradient."""

CPU_RUNTIME = 500 * 2**20
"""A process with torch, transformers and peft, without any weights; measured."""

GPU_RUNTIME = 1 * GIB
"""The CUDA context, and the workspaces of cuBLAS and cuDNN."""

NF4_BYTES = (4 + 0.127) / 8
"""Per weight, with its doubly quantised scales (Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314)."""

FRAGMENTATION = 0.05
"""Share of what is allocated that the allocator holds beyond it."""

CPU_HEAP = 0.75
"""Share of the activations that glibc keeps in holes between them; measured between 0.4 (Full) and 1.2 (LoRA). Where
they would not fit, the trainer has it give them back."""

LARGEST = 2**60
"""Bytes: more than any machine has."""

GPU_COUNTS = (1, 2, 4, 8)
"""Of a node, as clouds sell them."""

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


@dataclass(frozen=True)
class Memory:
    """Bytes that a device holds at the worst moment of training, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class MemoryPlan:
    """The choice. `limit` is None where nobody has said how much memory there is."""

    gpus: int
    micro_batch_tokens: int
    activation_checkpointing: bool
    memory: Memory
    limit: int | None
    compact_heap: bool = False
    """On CPU: freed memory goes back to the system at once. That costs time, so it is done only where it must be."""

    @property
    def fits(self) -> bool:
        return self.limit is None or self.memory.total <= self.limit


@dataclass(frozen=True)
class Training:
    """What a job's memory depends on. `gpus` and `nodes` count where Full shards; 0 GPUs are a CPU."""

    task: Task
    method: MethodType
    model: ModelStatus
    precision: Precision
    longest: int
    """The longest row in tokens."""
    batch_tokens: int
    """Most tokens that one optimizer step has."""
    gpus: int
    nodes: int = 1
    quantized: bool = False
    """QLoRA: the frozen linear layers in NF4."""
    mean_batch_tokens: int | None = None
    """Tokens that one optimizer step has on average."""

    @property
    def bytes_per_linear_weight(self) -> float:
        """Of a layer that is not trained."""
        if self.quantized:
            return NF4_BYTES
        return 2 if self.precision is Precision.BF16 else 4

    @property
    def devices(self) -> int:
        return max(1, self.gpus) * self.nodes

    @property
    def share(self) -> int:
        """Tokens of an optimizer step that fall to one device: with more in a pass, another would have no work."""
        if self.devices == 1:
            return self.batch_tokens
        return max(self.longest, math.ceil((self.mean_batch_tokens or self.batch_tokens) / self.devices))

    @property
    def shards(self) -> int:
        """Over how many devices weights, gradients and optimizer are spread: Full does it (FSDP), LoRA not."""
        return self.devices if self.method is MethodType.FULL else 1


def plan_memory(spec: FineTuneJobSpec, training: PlanTraining, model: ModelStatus, data: DataStatus) -> MemoryPlan:
    """The memory plan of a job. Of what the user left open, it takes what is fastest among all that fits:
    as few GPUs as possible, then activations that are kept, then as many tokens at once as there is room for.

    If nothing fits, it is the plan that comes closest. Of `training`, only what the spec and prepare decide counts.
    """
    job, limit = _read(spec, training, model, data), memory_limit(spec)
    wanted = spec.training.activation_checkpointing
    counts = (job.gpus,) if spec.resources.gpus is not None or job.gpus == 0 else GPU_COUNTS
    tried: list[MemoryPlan] = []
    for count in counts:
        for checkpointing in (
            (False, True) if wanted is None and model.supports_checkpointing is not False else (bool(wanted),)
        ):
            candidate = replace(job, gpus=count)
            tokens = spec.training.micro_batch_tokens or _most_tokens(candidate, checkpointing, limit)
            tokens = max(candidate.longest, min(tokens, candidate.batch_tokens))
            for compact in (False, True) if limit is not None and job.gpus == 0 else (False,):
                memory = estimate(candidate, tokens, checkpointing, compact_heap=compact)
                tried.append(MemoryPlan(count, tokens, checkpointing, memory, limit, compact))
                if tried[-1].fits:
                    return tried[-1]
    return min(tried, key=lambda plan: plan.memory.total)


def estimate(training: Training, tokens: int, checkpointing: bool, *, compact_heap: bool = True) -> Memory:
    """Memory of one device whose passes hold `tokens` tokens; for `compact_heap` see MemoryPlan.

    Weights, gradients and Adam's two moments: fp32, 16 bytes per trained weight (Rajbhandari et al. 2020, ZeRO,
    https://arxiv.org/abs/1910.02054, section 3.1); the other weights 4 bytes, in frozen linear layers 2 with bf16 and
    half a byte with NF4.
    They are never all at their peak at once, so this is a bound that is met when a step has several passes.
    """
    trained, frozen, reducible = _weights(training)
    weights = 4 * (trained + frozen - reducible) + int(training.bytes_per_linear_weight * reducible)
    held = Memory(
        weights=weights // training.shards,
        gradients=4 * trained // training.shards,
        optimizer=8 * trained // training.shards,
        activations=_activations(training, tokens, checkpointing),
        logits=_logits(training, tokens),
        overhead=0,
    )
    overhead = int(FRAGMENTATION * held.total) + (GPU_RUNTIME if training.gpus else CPU_RUNTIME)
    if not (compact_heap or training.gpus):
        overhead += int(CPU_HEAP * held.activations)
    if training.shards > 1:  # one block is put together while the next one is on its way
        overhead += (
            2 * (2 if training.precision is Precision.BF16 else 4) * (trained + frozen) // (training.model.layers or 1)
        )
    return replace(held, overhead=overhead)


def _weights(training: Training) -> tuple[int, int, int]:
    """Trained weights, frozen ones, and those of the frozen that are in linear layers.

    Without prepare's counts: Full trains all, and what the others train, about a hundredth, is left out.
    """
    model = training.model
    if model.trainable_parameters is not None and model.frozen_parameters is not None:
        return model.trainable_parameters, model.frozen_parameters, model.frozen_linear_parameters or 0
    if training.method is MethodType.FULL:
        return model.parameters, 0, 0
    embeddings = (model.vocabulary_size or 0) * (model.hidden_size or 0) * (1 if model.tied_embeddings else 2)
    return 0, model.parameters, max(0, model.parameters - embeddings)


def _activations(training: Training, tokens: int, checkpointing: bool) -> int:
    """What is kept for the backward pass, and what the pass needs on its way.

    With checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174) only the input of each block is kept, in
    fp32 as the embeddings are, and the activations of one block at a time are computed again.
    """
    fixed, per_token, per_pair = _kept(training)
    kept = tokens * (per_token + per_pair * training.longest)
    model, width = training.model, training.model.hidden_size or 0
    if checkpointing and model.layers:
        kept = min(kept, kept // model.layers + 4 * tokens * model.layers * width)
    if training.shards > 1:
        fixed = 0  # weights come in bf16 already, block by block
    # gradients of one block's widest tensors
    passing = 4 * tokens * (2 * (model.intermediate_size or 4 * width) + 2 * width)
    return fixed + kept + passing


def _kept(training: Training) -> tuple[int, int, int]:
    """Bytes kept for the backward pass: whatever the tokens, per token, and per pair of tokens of a row.

    As prepare has found them. If it could not, 34 * hidden_size bytes per token and block in 16 bits, twice that in
    fp32 (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, equation 2, without the attention scores, which
    fused attention does not keep), half as much again for the inputs and masks of LoRA's adapters.
    """
    model = training.model
    if model.activations is not None:
        return model.activations.fixed_bytes, model.activations.bytes_per_token, model.activations.bytes_per_token_pair
    if training.method is MethodType.HEAD:
        return 0, 0, 0
    half = training.precision is Precision.BF16
    per_token = (34 if half else 68) * (model.hidden_size or 0) * (model.layers or 0)
    if training.method is MethodType.LORA:
        return 0, per_token * 3 // 2, 0
    return 2 * model.parameters if half else 0, per_token, 0


def _logits(training: Training, tokens: int) -> int:
    """Of one chunk of supervised positions; a classifier's are nothing."""
    if training.task is Task.CLASSIFICATION:
        return 0
    return LOGITS_COPIES * min(LOGITS_CHUNK, 4 * tokens * (training.model.vocabulary_size or 0))


def _most_tokens(training: Training, checkpointing: bool, limit: int | None) -> int:
    """As many tokens as the limit has room for; without one, as the usual share for activations has."""
    usual = (CPU_ACTIVATIONS if training.gpus == 0 else GPU_ACTIVATIONS) + _kept(training)[0]

    def fits(tokens: int) -> bool:
        memory = estimate(training, tokens, checkpointing)
        capped = training.gpus == 0 or limit is None
        return (limit is None or memory.total <= limit) and (not capped or memory.activations <= usual)

    low, high = 0, min(MOST_TOKENS, training.share)
    while low < high:  # the most that fits: memory only grows with the tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _read(spec: FineTuneJobSpec, training: PlanTraining, model: ModelStatus, data: DataStatus) -> Training:
    documents = 2 if spec.method.dpo else 1  # of a row; a pair is never torn apart
    longest = data.lengths.longest if data.lengths else training.max_length * documents
    sequences, gpus = training.batch_sequences, wanted_gpus(spec)
    batch = training.batch_tokens or 1 if sequences is None else sequences * longest
    mean = batch if sequences is None else math.ceil(sequences * data.tokens / max(1, data.train_rows))
    usual = Precision.BF16 if gpus and not spec.resources.allow_cpu_fallback else Precision.FP32
    found = model.activations.precision if model.activations else usual
    return Training(
        task=spec.task,
        method=spec.method.type,
        model=model,
        precision=training.precision or found,
        longest=max(1, longest),
        batch_tokens=max(batch, longest, 1),
        mean_batch_tokens=mean,
        gpus=gpus,
        nodes=spec.resources.nodes,
        quantized=spec.method.lora is not None and spec.method.lora.quantization is not None,
    )


def memory_limit(spec: FineTuneJobSpec) -> int | None:
    """Bytes per GPU, or for the process on CPU; where training may fall back to CPU, the smaller of the two."""
    limits, resources = [], spec.resources
    if wanted_gpus(spec):
        limits.append(_bytes(resources.gpu_memory))
    if not wanted_gpus(spec) or resources.allow_cpu_fallback:
        limits.append(_bytes((resources.limits or {}).get("memory")))
    return min((limit for limit in limits if limit is not None), default=None)


def wanted_gpus(spec: FineTuneJobSpec) -> int:
    """GPUs per node, as far as the spec says: with gpuMemory alone at least 1, without either 0."""
    resources = spec.resources
    return resources.gpus if resources.gpus is not None else int(resources.gpu_memory is not None)


def _bytes(quantity: str | None) -> int | None:
    """None without one, or if it is no number (the API server will say so)."""
    if quantity is None:
        return None
    try:
        return int(min(parse_quantity(quantity), LARGEST))  # more than that says no more
    except ValueError:
        return None


def explain(plan: MemoryPlan) -> str:
    """The plan's numbers in a sentence: 'needs about 11.2 of 80 GiB per GPU: weights 3.1, gradients 0.1, ...'."""
    where = "per GPU" if plan.gpus else "on CPU"
    need = _gib(plan.memory.total)
    amount = f"{need} GiB" if plan.limit is None else f"{need} of {_gib(plan.limit)} GiB"
    amounts = ((part.name, getattr(plan.memory, part.name)) for part in fields(plan.memory))
    parts = ", ".join(f"{name} {_gib(amount)}" for name, amount in amounts if amount >= GIB / 100)
    again = ", activations computed again" if plan.activation_checkpointing else ""
    return f"training needs about {amount} {where}: {parts} ({plan.micro_batch_tokens} tokens per pass{again})"


def advise(plan: MemoryPlan, spec: FineTuneJobSpec) -> str:
    """What would help a job that does not fit."""
    return "; ".join(_remedies(plan, spec))


def _remedies(plan: MemoryPlan, spec: FineTuneJobSpec) -> Iterator[str]:
    if spec.training.activation_checkpointing is False:
        yield "leave out training.activationCheckpointing"
    if spec.method.type is MethodType.FULL:
        yield "use method.type LoRA instead of Full"
    elif plan.gpus and spec.method.type is MethodType.LORA and not (spec.method.lora and spec.method.lora.quantization):
        yield "set method.lora.quantization: NF4"
    if plan.memory.activations + plan.memory.logits > plan.memory.total // 4:
        yield "lower training.maxLength or training.microBatchTokens"
    needed = math.ceil(plan.memory.total / GIB)
    if plan.gpus:
        if spec.method.type is MethodType.FULL and plan.gpus < GPU_COUNTS[-1]:
            yield "raise resources.gpus, over which Full spreads its weights"
        yield f"use GPUs of {needed} GiB and say so in resources.gpuMemory"
    else:
        yield f"raise resources.limits.memory to {needed}Gi"


def _gib(amount: int) -> str:
    return f"{amount / GIB:.1f}" if amount >= GIB else f"{amount / GIB:.2f}"
