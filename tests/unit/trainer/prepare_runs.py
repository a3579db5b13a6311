"""Runs of the stage prepare on small files, and what they leave."""

import hashlib
import json
from pathlib import Path

from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome
from finetune_api.report import DataReport, Quarantined
from finetune_api.spec import Task
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry

from tests.models import save_tiny_bert, save_tiny_llama
from tests.plans import make_plan

LABELS = ["negative", "neutral", "positive"]


def save_models(root: Path) -> dict[Task, Path]:
    return {Task.CLASSIFICATION: save_tiny_bert(root / "bert"), Task.GENERATION: save_tiny_llama(root / "llama")}


def write_jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def sentiment(count: int, start: int = 0) -> list[dict]:
    return [{"headline": f"profit {n} rises", "sentiment": LABELS[n % 3]} for n in range(start, start + count)]


def source(path: Path, field: str = "dataset.sources[0]", **more) -> dict:
    return {"location": {"uri": f"file://{path.name}", "path": str(path)}, "field": field, **more}


def prepare_plan(
    workspace: Path, model: Path, *sources: Path, task: Task = Task.CLASSIFICATION, training=None, **dataset
) -> Plan:
    """A plan for the given training sources; `dataset` changes it."""
    return make_plan(
        workspace,
        Stage.PREPARE,
        task=task,
        model={"location": {"uri": f"file://{model.name}", "path": str(model)}},
        training=training or {},
        dataset={"sources": [source(path, f"dataset.sources[{n}]") for n, path in enumerate(sources)], **dataset},
    )


def prepare(plan: Plan):
    result = run(plan, Telemetry(plan.stage, plan.job))
    assert result.outcome is Outcome.SUCCEEDED
    return result.prepare


def report(plan: Plan) -> DataReport:
    return DataReport.model_validate_json((Path(plan.workspace) / "report" / "data.json").read_bytes())


def quarantine(plan: Plan) -> list[Quarantined]:
    lines = (Path(plan.workspace) / "report" / "quarantine.jsonl").read_text().splitlines()
    return [Quarantined.model_validate_json(line) for line in lines]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
