"""One run of our stage prepare up to the model: `python benchmarks/prepare_ours.py INPUT FOLDER`.

Reads, cleans, takes personal data out and decides as the stage does, then writes the kept texts as JSON lines.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench import cpu_seconds
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.report import QUARANTINE
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.duplicates.search import SignatureFiles
from finetune_trainer.data.pipeline import Rows
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.report import Findings
from finetune_trainer.data.spool import Spool
from finetune_trainer.prepare import Run, fetch_data, read_data
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.workspace import Workspace

SIMILARITY = 0.7

DATASET: dict[str, Any] = {
    "validation": {"fraction": 0.01},
    "clean": {
        "repairEncoding": True,
        "unicode": "NFC",
        "removeControlCharacters": True,
        "normalizeWhitespace": True,
        "minCharacters": 20,
        "maxCharacters": 100_000,
        "maxRepetition": 0.2,
        "languages": ["en", "de", "fr", "es"],
    },
    "duplicates": {"similarity": SIMILARITY},
    "personalData": {"action": "Redact", "kinds": ["Email", "Phone", "CreditCard", "IPAddress", "Secret"]},
}


def make_plan(source: Path, folder: Path, model: Path | None = None) -> Plan:
    """As `finetune run` makes it; up to the model none is needed."""
    from finetune_operator.local import LocalLayout  # here: worker processes import this file, too
    from finetune_operator.observed import Resource
    from finetune_operator.plans import build_plan

    spec = {
        "task": "Generation",
        "model": {"uri": f"file://{model}" if model else "hf://none/needed"},
        "dataset": {"sources": [{"uri": f"file://{source.name}", "format": "Text"}], **DATASET},
    }
    resource = Resource.read({"metadata": {"namespace": "benchmark", "name": "ours", "uid": "0001"}, "spec": spec})
    parsed = FineTuneJobSpec.model_validate(spec)
    return build_plan(resource, parsed, Stage.PREPARE, LocalLayout(folder, source.parent))


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    plan = make_plan(source, folder)
    workspace = Workspace(folder)
    telemetry = Telemetry(Stage.PREPARE, plan.job, port=None)
    started, cpu = time.perf_counter(), cpu_seconds()
    with (
        Quarantine(workspace.report / QUARANTINE) as quarantine,
        Spool(folder / "spool") as spool,
        SignatureFiles(folder / "signatures", SIMILARITY) as signatures,
    ):
        this = Run(plan, workspace, telemetry, quarantine, Findings(max_length=plan.training.max_length))
        fetch_data(this, folder / "downloads")
        rows = read_data(this, Rows(this.findings.sources, spool, signatures))
        with (folder / "kept.jsonl").open("w", encoding="utf-8") as out:
            for row in rows.placed():
                out.write(json.dumps({"id": row.line, "text": row.example.text}, ensure_ascii=False) + "\n")
        report = this.report()
    figures = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "dropped": report.rejections,
        "changed": {name: step.rows_changed for name, step in report.cleaning.steps.items()} if report.cleaning else {},
    }
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
