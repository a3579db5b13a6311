"""Statuses of FineTuneJobs: one with every field set, and those that tools which wait must tell apart."""

from dataclasses import dataclass

from finetune_api.constants import ConditionType, Phase, Reason, Stage
from finetune_api.spec import Precision
from finetune_api.status import (
    ActivationStatus,
    ArtifactStatus,
    Condition,
    DataStatus,
    FailureStatus,
    FineTuneJobStatus,
    GateResult,
    InterruptionStatus,
    LengthStatus,
    MemoryStatus,
    MetricsStatus,
    ModelStatus,
    ProgressStatus,
    ResolvedStatus,
    ResultStatus,
    Score,
    decimal,
)

NOW = "2026-11-24T23:25:48Z"


def full_status() -> FineTuneJobStatus:
    return FineTuneJobStatus(
        observed_generation=1,
        phase=Phase.FAILED,
        message="macroF1 0.71 is below the minimum 0.8",
        conditions=[
            Condition(
                type=kind,
                status="True" if kind == ConditionType.FAILED else "False",
                reason=Reason.GATE_FAILED,
                message="macroF1 0.71 is below the minimum 0.8",
                observed_generation=1,
                last_transition_time=NOW,
            )
            for kind in ConditionType
        ],
        attempt=2,
        disruptions=1,
        last_interruption=InterruptionStatus(
            stage=Stage.TRAIN,
            reason=Reason.PREEMPTED,
            message="a pod of higher priority took its place",
            time=NOW,
            pod_name="example-train-0-x7k2p",
            resumed_from_step=40,
            lost_steps=2,
        ),
        pod_name="example-train-0-b9q4d",
        start_time=NOW,
        completion_time=NOW,
        progress=ProgressStatus(
            percentage=99,
            step=100,
            total_steps=100,
            epoch="2.5",
            estimated_remaining_seconds=0,
            eta="0s",
            last_updated_time=NOW,
        ),
        metric="macroF1=0.71",
        metrics=MetricsStatus(
            training_loss=decimal(float("nan")),
            evaluation_loss=decimal(float("inf")),
            learning_rate=decimal(2e-5),
            tokens_per_second=decimal(123456.7),
            samples_per_second=decimal(0.5),
            peak_memory_bytes=2**40,
        ),
        model=ModelStatus(
            architecture="BertModel",
            revision="c5f93f70e82a6fbd6d56e8b1d7cc2f5b1c0a0a5e",
            parameters=22_713_216,
            layers=6,
            hidden_size=384,
            intermediate_size=1536,
            attention_heads=12,
            key_value_heads=12,
            vocabulary_size=30522,
            context_length=512,
            tied_embeddings=True,
            trainable_parameters=100_000,
            frozen_parameters=22_713_216,
            frozen_linear_parameters=10_616_832,
            supports_checkpointing=True,
            activations=ActivationStatus(
                precision=Precision.BF16, fixed_bytes=200_000, bytes_per_token=190_000, bytes_per_token_pair=0
            ),
        ),
        data=DataStatus(
            rows_read=1000,
            rows_kept=999,
            rows_rejected=1,
            train_rows=800,
            validation_rows=99,
            test_rows=100,
            tokens=20_000,
            supervised_tokens=800,
            truncated_rows=0,
            max_length=128,
            lengths=LengthStatus(p50=20, p95=60, p99=90, longest=128),
            labels=["negative", "positive"],
            duplicate_rows=14,
            weak_rows=120,
            conflicting_rows=6,
            suspicious_rows=7,
            personal_data={"Email": 12, "EMPLOYEE": 1},
            fingerprint="sha256:" + "0" * 64,
        ),
        resolved=ResolvedStatus(
            method="LoRA r=16 alpha=32",
            head_first="0.5 epochs, learning rate 0.001",
            epochs="2.5",
            max_steps=100,
            learning_rate="0.0002",
            schedule="Cosine",
            batch_size="32 sequences",
            micro_batch_tokens=4096,
            activation_checkpointing=False,
            gpus=1,
            max_length=128,
            precision="bf16",
            device="2 nodes x 4 x NVIDIA H100",
            trainable_parameters=100_000,
            checkpoint_steps=5,
            evaluation_steps=40,
            early_stopping="patience 3, minimum improvement 0.01",
            output="Adapter",
            metrics=["macroF1"],
        ),
        memory=MemoryStatus(estimate_bytes=2_100_000_000, limit_bytes=80 * 2**30, peak_bytes=2_000_000_000),
        result=ResultStatus(
            split="test",
            baseline="majority class",
            scores=[Score(metric="macroF1", value="0.71", baseline="0.2")],
            stopped_early="stopped early after step 80 of 100: in 2 evaluations macroF1 was not better than the 0.7 of step 40",
            gate=GateResult(passed=False, message="macroF1 0.71 is below the minimum 0.8"),
            artifact=ArtifactStatus(uri="s3://bucket/model", sha256="0" * 64, format="Adapter", size_bytes=1024),
        ),
        failure=FailureStatus(
            stage=Stage.TRAIN,
            reason=Reason.GATE_FAILED,
            message="macroF1 0.71 is below the minimum 0.8",
            exit_code=64,
        ),
    )


def data_status(rows: int, tokens: int, max_length: int) -> DataStatus:
    """What prepare found: rows that are all trained on and learned from in every token."""
    return DataStatus(
        rows_read=rows,
        rows_kept=rows,
        rows_rejected=0,
        train_rows=rows,
        validation_rows=0,
        test_rows=0,
        tokens=tokens,
        supervised_tokens=tokens,
        truncated_rows=0,
        max_length=max_length,
        fingerprint="f",
    )


@dataclass(frozen=True)
class Moment:
    """A status, and what docs/gitops.md says that it is to Argo CD (with these words) and to Flux."""

    name: str
    status: FineTuneJobStatus
    health: str
    words: str
    flux: str
    generation: int = 2


def _at(*conditions: tuple[ConditionType, bool], seen: int = 2) -> FineTuneJobStatus:
    return FineTuneJobStatus(
        observed_generation=seen,
        message="Training: step 3 of 9",
        conditions=[
            Condition(
                type=kind,
                status="True" if holds else "False",
                reason=Reason.VALID,
                message=f"{kind} is {holds}",
                observed_generation=seen,
                last_transition_time=NOW,
            )
            for kind, holds in conditions
        ],
    )


_SUSPENDED, _COMPLETE = ConditionType.SUSPENDED, ConditionType.COMPLETE

MOMENTS = [
    Moment("not seen", FineTuneJobStatus(observed_generation=-1), "Progressing", "the operator", "InProgress"),
    Moment("edit not seen", _at((_SUSPENDED, True), seen=1), "Progressing", "the operator", "InProgress"),
    Moment("at work", _at((ConditionType.RUNNING, True)), "Progressing", "step 3 of 9", "InProgress"),
    Moment("suspended", _at((_SUSPENDED, True)), "Suspended", "Suspended is True", "InProgress"),
    Moment("resumed", _at((_SUSPENDED, False)), "Progressing", "step 3 of 9", "InProgress"),
    Moment("succeeded", _at((_SUSPENDED, False), (_COMPLETE, True)), "Healthy", "Complete is True", "Current"),
    Moment("failed", full_status(), "Degraded", "macroF1 0.71 is below", "Failed", generation=1),
]
