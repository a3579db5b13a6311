"""What a trainer pod tells the operator: `Progress` while it runs (GET /progress), `Result` when it ends.

A `Result` is the pod's termination message: JSON of at most 4096 bytes, written also on failure.
"""

from enum import StrEnum

from pydantic import Field

from finetune_api.base import Document
from finetune_api.constants import TERMINATION_MESSAGE_BYTES, Reason, Stage
from finetune_api.spec import Precision
from finetune_api.status import ArtifactStatus, DataStatus, GateResult, Message, ModelStatus, Score


class Progress(Document):
    stage: Stage
    activity: str = Field(description="What it does now, for people: 'Training', 'Evaluating', 'Saving a checkpoint'.")
    fraction: float = Field(ge=0, le=1, description="Share of this stage that is done, counted from the run's true start.")
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    estimated_remaining_seconds: float | None = None
    resumed_from_step: int | None = Field(None, description="Set if this attempt went on from a checkpoint.")
    training_loss: float | None = None
    evaluation_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    peak_memory_bytes: int | None = None
    precision: Precision | None = None
    device: str | None = None
    trainable_parameters: int | None = None
    batching: str | None = Field(None, description="How rows lie in a micro-batch: 'packed', 'padded' and why, or 'encoded once'.")
    micro_batch_tokens: int | None = Field(None, description="Set if it had to be lowered, because the GPU ran out of memory.")
    updated_at: float = Field(description="Unix time of the last change.")


class Outcome(StrEnum):
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    INTERRUPTED = "Interrupted"


class PrepareResult(Document):
    data: DataStatus
    model: ModelStatus


class TrainResult(Document):
    steps: int
    stopped_early: Message | None = Field(None, description="Where and why training ended before its last step, for people.")
    best_step: int
    precision: Precision
    device: str
    trainable_parameters: int
    batching: str | None = Field(None, description="How rows lie in a micro-batch: 'packed', 'padded' and why, or 'encoded once'.")
    micro_batch_tokens: int | None = Field(None, description="Most tokens of a micro-batch at the end.")
    training_loss: float | None = None
    evaluation_loss: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    peak_memory_bytes: int | None = None
    split: str = Field(max_length=32)
    baseline: str = Field(max_length=64)
    scores: list[Score] = Field(max_length=16)
    gate: GateResult | None = None


class PublishResult(Document):
    artifact: ArtifactStatus


class Result(Document):
    stage: Stage
    outcome: Outcome
    reason: Reason | None = Field(None, description="Set unless it succeeded.")
    message: str = ""
    step: int | None = Field(None, description="Last optimizer step that is safe in a checkpoint.")
    prepare: PrepareResult | None = None
    train: TrainResult | None = None
    publish: PublishResult | None = None

    def to_termination_message(self) -> str:
        """JSON within the kubelet's limit; the message gives way first, then the list of labels, each from its end.

        Raises ValueError if that is not enough.
        """
        result, text = self, self.to_json()
        while (over := len(text.encode()) - TERMINATION_MESSAGE_BYTES) > 0:
            result = result._shorter(over)
            text = result.to_json()
        return text

    def _shorter(self, over: int) -> "Result":
        if self.message:
            cut = max(1, over // 6)  # a character is at most 6 bytes of JSON
            message = self.message.removesuffix("…")[:-cut]
            return self.model_copy(update={"message": message and message + "…"})
        if self.prepare and self.prepare.data.labels:
            data = self.prepare.data.model_copy(update={"labels": self.prepare.data.labels[:-1]})
            return self.model_copy(update={"prepare": self.prepare.model_copy(update={"data": data})})
        raise ValueError(f"a result is {over} bytes too long for a termination message")
