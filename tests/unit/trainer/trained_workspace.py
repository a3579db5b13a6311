"""A workspace as prepare and train leave it, with weights that differ from the untuned model's."""

from pathlib import Path
from typing import Any

import torch
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.report import (
    ClassScores,
    DataReport,
    Evaluation,
    EvaluationReport,
    FileReport,
    LengthReport,
    SourceReport,
)
from finetune_api.spec import Task
from finetune_api.status import DataStatus, GateResult, ModelStatus, Score
from finetune_trainer.data.store import DataManifest, SplitManifest, write_manifest
from finetune_trainer.model.load import build_model, trainable_state
from finetune_trainer.train.checkpoint import Best, Checkpoints, identify
from finetune_trainer.workspace import Workspace, write_file

from tests.models import save_tiny_bert, save_tiny_llama
from tests.plans import make_plan

LABELS = ["negative", "neutral", "positive"]
REVISION = "a" * 40
GENERATION = {"task": "Generation", "evaluation": {"metrics": ["loss", "perplexity"]}}


def make_trained(folder: Path, **changes: Any) -> tuple[Plan, torch.nn.Module]:
    """Writes the workspace; returns the publish plan and the trained model itself."""
    plan = make_plan(folder, Stage.PUBLISH, **changes)
    workspace = Workspace(folder)
    classification = plan.task is Task.CLASSIFICATION
    if not workspace.model.exists():
        (save_tiny_bert if classification else save_tiny_llama)(workspace.model)
    labels = LABELS if classification else None
    split = SplitManifest(rows=90, tokens=900, supervised_tokens=90, truncated_rows=1)
    manifest = DataManifest(task=plan.task, labels=labels, max_length=64, fingerprint="f" * 64, splits={"train": split})
    write_manifest(workspace.data, manifest)
    model = build_model(plan, workspace, labels)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for weight in trainable_state(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    checkpoints = Checkpoints(workspace.checkpoints, identify(plan, manifest.fingerprint))
    checkpoints.save_best(model, Best(step=20, score=0.9))
    write_file(workspace.report / "data.json", data_report(labels).to_json())
    write_file(workspace.report / "evaluation.json", evaluation_report(labels).to_json())
    return plan, model.eval()


def data_report(labels: list[str] | None = None) -> DataReport:
    return DataReport(
        summary=DataStatus(
            rows_read=105,
            rows_kept=100,
            rows_rejected=5,
            train_rows=90,
            validation_rows=10,
            test_rows=0,
            tokens=900,
            supervised_tokens=90,
            truncated_rows=1,
            max_length=64,
            labels=labels and labels[:32],
            fingerprint="f" * 64,
        ),
        model=ModelStatus(architecture="BertModel", revision=REVISION, parameters=1_234_567),
        sources=[
            SourceReport(
                field="dataset.sources[0]",
                uri="s3://bucket/train.csv",
                sha256="b" * 64,
                format="LabelledText",
                file=FileReport(kind="CSV", encoding="utf-8", delimiter=","),
                rows_read=105,
                rows_rejected=5,
            )
        ],
        rejections={"no label": 3, "empty text": 2},
        labels=None if labels is None else {"train": dict.fromkeys(labels, 30), "validation": {labels[0]: 10}},
        lengths=LengthReport(mean=10, p50=9, p90=20, p99=40, longest=70),
    )


def evaluation_report(labels: list[str] | None = None) -> EvaluationReport:
    metrics = {"macroF1": 0.91234, "accuracy": 0.9} if labels else {"loss": 1.25, "perplexity": 3.4903}
    confusion = None
    classes = None
    if labels:
        confusion = [[30 if row == column else row for column in range(len(labels))] for row in range(len(labels))]
        classes = [ClassScores(label=label, precision=0.9, recall=0.8, f1=0.847, support=33) for label in labels]
    return EvaluationReport(
        split="test",
        rows=99,
        tuned=Evaluation(name="tuned", metrics=metrics, classes=classes, confusion=confusion),
        baseline=Evaluation(name="majority class", metrics=dict.fromkeys(metrics, 0.25)),
        scores=[Score(metric=name, value="0.9", baseline="0.25") for name in metrics],
        gate=GateResult(passed=True, message="macroF1 0.9123 is at least 0.8"),
    )
