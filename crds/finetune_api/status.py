"""`FineTuneJob.status`: what the operator reports. Decimals are strings, as the Kubernetes API conventions ask."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from finetune_api.base import Document
from finetune_api.constants import ConditionType, Phase, Reason, Stage
from finetune_api.spec import Precision

Decimal = Annotated[str, StringConstraints(pattern=r"^(-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]+)?|nan|-?inf)$", max_length=32)]


def _is_a_time(text: str) -> str:
    """The pattern lets 2026-02-31T99:00:00Z through."""
    datetime.fromisoformat(text.replace("Z", "+00:00"))
    return text


Timestamp = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z$", max_length=32),
    AfterValidator(_is_a_time),
]
MESSAGE_LENGTH = 2048


def _clip(text: Any) -> Any:
    """What does not fit gives way at its end: no message may be too long to be written."""
    return text[: MESSAGE_LENGTH - 1] + "…" if isinstance(text, str) and len(text) > MESSAGE_LENGTH else text


Message = Annotated[str, StringConstraints(max_length=MESSAGE_LENGTH), BeforeValidator(_clip)]


def decimal(value: float | None, digits: int = 4) -> str | None:
    """A number as the status shows it: `digits` significant digits, 12350 rather than 1.235e+04; None stays None."""
    return None if value is None else f"{float(f'{value:.{digits}g}'):.15g}"


class Condition(Document):
    type: ConditionType = Field(description="What the condition is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Reason = Field(description="Why, as a constant for programs.")
    message: Message = Field(description="Why, for people.")
    observed_generation: int = Field(description="metadata.generation that this was found for.")
    last_transition_time: Timestamp = Field(description="When the status last changed.")


class ProgressStatus(Document):
    percentage: int = Field(ge=0, le=100, description="Share of the whole job that is done; 100 only when it succeeded.")
    step: int | None = Field(None, description="Optimizer steps done, counted from the run's true start.")
    total_steps: int | None = Field(None, description="Optimizer steps of the whole run.")
    epoch: Decimal | None = Field(None, description="Passes over the training rows done.")
    estimated_remaining_seconds: int | None = Field(None, description="Time to the end of the current stage, from the speed of this attempt.")
    eta: str | None = Field(None, max_length=32, description="The same for people, for example 4m10s.")
    last_updated_time: Timestamp = Field(description="When the trainer last said so.")


class MetricsStatus(Document):
    training_loss: Decimal | None = Field(None, description="Mean loss per supervised token or row over the last reported steps.")
    evaluation_loss: Decimal | None = Field(None, description="Loss on validation at the last evaluation.")
    learning_rate: Decimal | None = Field(None, description="Learning rate of the last step.")
    tokens_per_second: Decimal | None = Field(None, description="Training speed in non-padding tokens.")
    samples_per_second: Decimal | None = Field(None, description="Training speed in rows.")
    peak_memory_bytes: int | None = Field(None, description="Peak memory: of the accelerator, or resident memory on CPU.")


class LengthStatus(Document):
    """Tokens per training row, cut at maxLength; of a preference pair, of both answers."""

    p50: int = Field(description="Half of the rows are no longer.")
    p95: int = Field(description="19 of 20 rows are no longer.")
    p99: int = Field(description="99 of 100 rows are no longer.")
    longest: int = Field(description="The longest row.")


class DataStatus(Document):
    """The summary of the data report (`report/data.json` in the workspace)."""

    rows_read: int = Field(description="Rows found in all sources.")
    rows_kept: int = Field(description="Rows that are trained on or judged by.")
    rows_rejected: int = Field(description="Rows in quarantine, with file, line and reason (report/quarantine.jsonl).")
    train_rows: int = Field(description="Rows to train on.")
    validation_rows: int = Field(description="Rows to choose the best checkpoint by.")
    test_rows: int = Field(description="Held-out rows.")
    tokens: int = Field(description="Tokens of the training rows.")
    supervised_tokens: int = Field(description="Training tokens that have a loss; for Classification the number of training rows.")
    truncated_rows: int = Field(description="Training rows cut at maxLength.")
    max_length: int = Field(description="Longest row in tokens that was allowed.")
    lengths: LengthStatus | None = Field(None, description="Tokens per training row.")
    labels: Annotated[list[str], Field(max_length=32)] | None = Field(None, description="Labels in the order of their class ids, the first 32.")
    duplicate_rows: int | None = Field(None, description="Rows that say what an earlier one says, or nearly; unset if the spec does not ask for it.")
    weak_rows: int | None = Field(None, description="Rows whose label is of dataset.labelling.rules; unset without rules.")
    conflicting_rows: int | None = Field(None, description="Rows whose text stands there with another label, too (Classification).")
    suspicious_rows: int | None = Field(None, description="Training rows whose label is probably wrong (report/review.jsonl); unset without dataset.review.")
    personal_data: Annotated[dict[str, int], Field(max_length=24)] | None = Field(None, description="Values found by kind, for example Email: 12; unset if the spec does not ask for it.")
    fingerprint: str = Field(max_length=128, description="Hash of the rows, the tokenizer and the settings.")


class ActivationStatus(Document):
    """What one pass keeps for its backward pass: fixedBytes + tokens * bytesPerToken, and bytesPerTokenPair for each pair of tokens of a row."""

    precision: Precision = Field(description="Precision that this holds for.")
    fixed_bytes: int = Field(ge=0, description="Whatever the number of tokens: weights cast to bf16.")
    bytes_per_token: int = Field(ge=0, description="Per token of the pass.")
    bytes_per_token_pair: int = Field(ge=0, description="Per pair of tokens of the same row; 0 where attention keeps no scores.")


class ModelStatus(Document):
    """Facts about the foundation model and what the job trains of it, found by prepare."""

    architecture: str = Field(max_length=128, description="Class of the model.")
    revision: str | None = Field(None, max_length=128, description="The commit that was used.")
    parameters: int = Field(description="Number of parameters.")
    layers: int | None = Field(None, description="Number of transformer blocks.")
    hidden_size: int | None = Field(None, description="Width.")
    intermediate_size: int | None = Field(None, description="Width between the two parts of a feed-forward network, of all experts that one token uses.")
    attention_heads: int | None = Field(None, description="Attention heads per block.")
    key_value_heads: int | None = Field(None, description="Attention heads that have keys and values of their own.")
    vocabulary_size: int | None = Field(None, description="Number of tokens known.")
    context_length: int | None = Field(None, description="Longest input.")
    tied_embeddings: bool | None = Field(None, description="Whether input embeddings and output layer share their weights.")
    trainable_parameters: int | None = Field(None, description="Weights that method trains, adapters and head included.")
    frozen_parameters: int | None = Field(None, description="Weights that method leaves as they are.")
    frozen_linear_parameters: int | None = Field(None, description="Those of them that are in linear layers before the output layer: what lower precision makes smaller.")
    supports_checkpointing: bool | None = Field(None, description="Whether its blocks can compute their activations again.")
    activations: ActivationStatus | None = Field(None, description="Memory of a training pass beside weights and logits.")


class ResolvedStatus(Document):
    """Every setting that was left to us, and what was chosen."""

    method: str = Field(max_length=64, description="Method, for example 'LoRA r=16 alpha=32', 'DoRA r=16 alpha=32 NF4', 'Full lastLayers=2' or 'Full, DPO beta=0.1'.")
    head_first: str | None = Field(None, max_length=64, description="Training of the head alone before the rest, for example '1 epochs, learning rate 0.001'.")
    epochs: Decimal | None = Field(None, description="Epochs; unset if maxSteps decides.")
    max_steps: int | None = Field(None, description="Optimizer steps, if they decide.")
    learning_rate: Decimal = Field(description="Peak learning rate.")
    schedule: str = Field(max_length=32, description="Shape of the learning rate.")
    batch_size: str = Field(max_length=64, description="Size of an optimizer step, for example '32 sequences'.")
    micro_batch_tokens: int | None = Field(None, description="Most tokens in one forward pass; less than at first if the GPU ran out of memory.")
    batching: str | None = Field(None, max_length=128, description="How rows lie in a forward pass: 'packed' (side by side, without padding), 'padded' and why, or 'encoded once' (Head on a frozen encoder); known when training has begun.")
    activation_checkpointing: bool | None = Field(None, description="Whether activations are computed again instead of kept; known after prepare.")
    gpus: int | None = Field(None, description="GPUs per node; 0 is CPU. Known after prepare if they are left to the memory plan.")
    max_length: int | None = Field(None, description="Longest row in tokens.")
    precision: str | None = Field(None, max_length=16, description="Precision; known when training has begun.")
    device: str | None = Field(None, max_length=128, description="Device, for example '2 nodes x 4 x NVIDIA H100'; its name is known when training has begun.")
    trainable_parameters: int | None = Field(None, description="Number of weights that are trained; known when training has begun.")
    checkpoint_steps: int | None = Field(None, description="Steps between checkpoints.")
    evaluation_steps: int | None = Field(None, description="Steps between evaluations.")
    early_stopping: str | None = Field(None, max_length=64, description="When training ends early, for example 'patience 3, minimum improvement 0.01'.")
    output: str = Field(max_length=32, description="Adapter or Merged.")
    metrics: Annotated[list[str], Field(max_length=8)] = Field(description="Metrics, the first one is shown in the Metric column.")


class Score(Document):
    metric: str = Field(max_length=64, description="Name of the metric.")
    value: Decimal = Field(description="Score of the tuned model.")
    baseline: Decimal | None = Field(None, description="Score of the baseline on the same rows.")


class GateResult(Document):
    passed: bool = Field(description="Whether the gate was passed.")
    message: Message = Field(description="The comparison, with its numbers.")


class ArtifactStatus(Document):
    uri: str = Field(max_length=1024, description="Where it lies.")
    sha256: str = Field(max_length=64, description="Hash of its SHA256SUMS file, which holds the hashes of all files.")
    format: str = Field(max_length=32, description="Adapter or Merged.")
    size_bytes: int = Field(description="Size of all files.")


class MemoryStatus(Document):
    """The memory plan, per GPU, or of the training process on CPU."""

    estimate_bytes: int = Field(description="What training needs.")
    limit_bytes: int | None = Field(None, description="What there is, by resources.gpuMemory or on CPU resources.limits.memory.")
    peak_bytes: int | None = Field(None, description="The most that it had, measured; known when training has ended.")


class ResultStatus(Document):
    split: str | None = Field(None, max_length=32, description="The split that the scores are from: test or validation.")
    baseline: str | None = Field(None, max_length=64, description="What it is compared with: the majority class, the untuned model, or the adapter that it went on from.")
    scores: Annotated[list[Score], Field(max_length=16)] | None = Field(None, description="Scores of the best checkpoint.")
    stopped_early: Message | None = Field(None, description="At which step and why training ended early, if it did.")
    gate: GateResult | None = Field(None, description="Outcome of evaluation.gate.")
    artifact: ArtifactStatus | None = Field(None, description="What was published.")


class FailureStatus(Document):
    stage: Stage | None = Field(None, description="Stage that failed.")
    reason: Reason = Field(description="Cause, as a constant.")
    message: Message = Field(description="Cause, for people, with the field or file and line, and what to do.")
    exit_code: int | None = Field(None, description="Exit code of the container.")


class InterruptionStatus(Document):
    """A try of a stage that ended before its work was done, and after which it is tried again."""

    stage: Stage = Field(description="Stage that was interrupted.")
    reason: Reason = Field(description="Cause, as a constant: Evicted, Preempted or Disrupted, which cost no retry, or why it failed.")
    message: Message = Field(description="Cause, for people.")
    time: Timestamp = Field(description="When the operator saw it.")
    pod_name: str | None = Field(None, max_length=253, description="Pod that was interrupted; of several nodes the first one's. Unset if none was seen to work.")
    resumed_from_step: int | None = Field(None, description="Step of the checkpoint that training went on from, 0 without one; known when it has gone on.")
    lost_steps: int | None = Field(None, description="Steps that had been reported and are done again; known when training has gone on.")


class FineTuneJobStatus(Document):
    observed_generation: int | None = Field(None, description="metadata.generation that this status is about; -1 before the operator has seen the job.")
    phase: Phase | None = Field(None, description="Where the job stands, in a word. Programs should read the conditions.")
    message: Message | None = Field(None, description="Where the job stands, in a sentence.")
    conditions: Annotated[list[Condition], Field(max_length=16)] | None = Field(
        None, description="Where the job stands, for programs.", json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    attempt: int | None = Field(None, description="Which try of the current stage this is, from 1. Only failures count, as in limits.retries.")
    disruptions: int | None = Field(None, description="How often work was interrupted and no failure of its own: preempted, evicted, its node lost, its pods or its Job deleted.")
    last_interruption: InterruptionStatus | None = Field(None, description="The last time that a stage was interrupted and is tried again, by a failure or a disruption.")
    pod_name: str | None = Field(None, max_length=253, description="Pod that works on the current stage, or that was the last to; of several nodes the first one's.")
    start_time: Timestamp | None = Field(None, description="When the operator first acted on the job.")
    completion_time: Timestamp | None = Field(None, description="When it succeeded or failed.")
    progress: ProgressStatus | None = Field(None, description="How far it is. While training it is renewed with each poll, every 5 s if the chart does not say otherwise; of many jobs that train, five have their turn in each poll.")
    metric: str | None = Field(None, max_length=64, description="The number to look at: the loss while training, the first score at the end.")
    metrics: MetricsStatus | None = Field(None, description="Numbers of the running training.")
    model: ModelStatus | None = Field(None, description="Facts about the foundation model.")
    data: DataStatus | None = Field(None, description="Summary of the data report.")
    resolved: ResolvedStatus | None = Field(None, description="The settings in force.")
    memory: MemoryStatus | None = Field(None, description="Memory of the training, estimated before and measured after.")
    result: ResultStatus | None = Field(None, description="Evidence and artifact.")
    failure: FailureStatus | None = Field(None, description="Why the job failed.")
