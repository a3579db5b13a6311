"""The publish stage: best checkpoint -> `artifacts/` in the workspace -> output.uri."""

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from finetune_api.base import Document
from finetune_api.constants import Reason
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, PublishResult, Result
from finetune_api.report import DATA_REPORT, EVALUATION_REPORT, DataReport, EvaluationReport
from finetune_api.status import ArtifactStatus
from pydantic import ValidationError

from finetune_trainer.data.store import read_manifest
from finetune_trainer.errors import StageError
from finetune_trainer.model.load import build_model
from finetune_trainer.publish.card import model_card, software_versions
from finetune_trainer.publish.export import export
from finetune_trainer.publish.push import push, stop_if_asked
from finetune_trainer.publish.sums import CARD, SUMS, write_sums
from finetune_trainer.storage import display_uri
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train.checkpoint import Best, Checkpoints, identify
from finetune_trainer.workspace import Workspace, new_folder, write_file

ReportT = TypeVar("ReportT", bound=Document)

logger = logging.getLogger(__name__)

EXPORT_SHARE = 0.5
"""Share of the stage's progress that the export has if a push follows."""


def run(plan: Plan, telemetry: Telemetry) -> Result:
    """Exports, describes and pushes the best checkpoint. A second run replaces what the first one left.

    Raises UserError (OutputFailed) if output.uri cannot be written to, Interrupted when asked to stop.
    """
    workspace = Workspace(Path(plan.workspace))
    location = plan.output.location
    share = 1.0 if location is None else EXPORT_SHARE
    _export(plan, workspace, telemetry, share)
    if location is not None:
        push(workspace.artifacts, location, telemetry, share)
    telemetry.update(activity="Published", fraction=1)
    files = [file for file in workspace.artifacts.rglob("*") if file.is_file()]
    artifact = ArtifactStatus(
        uri=plan.output.workspace_uri if location is None else display_uri(location),
        sha256=hashlib.sha256((workspace.artifacts / SUMS).read_bytes()).hexdigest(),
        format=plan.output.format,
        size_bytes=sum(file.stat().st_size for file in files),
    )
    logger.info("Published %d files, %d bytes: %s", len(files), artifact.size_bytes, artifact.uri)
    return Result(stage=plan.stage, outcome=Outcome.SUCCEEDED, publish=PublishResult(artifact=artifact))


def _export(plan: Plan, workspace: Workspace, telemetry: Telemetry, share: float) -> None:
    """Makes artifacts/; `share` is the progress that it ends at."""
    data = _read_report(workspace, DATA_REPORT, DataReport)
    evaluation = _read_report(workspace, EVALUATION_REPORT, EvaluationReport)
    if data.model is None:  # so prepare leaves it when it refuses the data
        raise StageError(Reason.STAGE_FAILED, f"{workspace.report / DATA_REPORT} is of data that was refused")
    telemetry.update(activity="Loading the best checkpoint", fraction=0)
    model, best = _load_best(plan, workspace)
    stop_if_asked(telemetry)
    with new_folder(workspace.artifacts) as folder:
        telemetry.update(activity=f"Exporting ({plan.output.format.value})", fraction=0.4 * share)
        dtype = export(model, plan, workspace, data.model.revision, folder)
        stop_if_asked(telemetry)
        card = model_card(
            plan,
            data,
            evaluation,
            model=data.model,
            best_step=best.step,
            dtype=dtype,
            versions=software_versions(),
        )
        write_file(folder / CARD, card)
        write_file(folder / EVALUATION_REPORT, evaluation.to_json(indent=2))
        telemetry.update(activity="Hashing", fraction=0.8 * share)
        write_sums(folder, partial(stop_if_asked, telemetry))
        stop_if_asked(telemetry)
    telemetry.update(fraction=share)


def _load_best(plan: Plan, workspace: Workspace) -> tuple[torch.nn.Module, Best]:
    """The model with the weights of the best checkpoint, in fp32 on the CPU; raises StageError if there is none."""
    manifest = read_manifest(workspace.data)
    checkpoints = Checkpoints(workspace.checkpoints, identify(plan, manifest.fingerprint))
    best = checkpoints.best()
    if best is None:
        raise StageError(Reason.STAGE_FAILED, f"{checkpoints.best_folder} has no trained model; run train first")
    model = build_model(plan, workspace, manifest.labels)
    checkpoints.load_best(model)
    return model.eval(), best


def _read_report(workspace: Workspace, name: str, kind: type[ReportT]) -> ReportT:
    """A document of report/; raises StageError if an earlier stage did not leave it."""
    path = workspace.report / name
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        message = f"{path} is missing or not readable; run the earlier stages again"
        raise StageError(Reason.STAGE_FAILED, message) from error
