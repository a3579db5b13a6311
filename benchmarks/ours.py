"""Our side: plans as the operator makes them, stages as the pods run them."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bench import HERE, ROWS_PER_STEP, WORK, execute
from finetune_api.constants import Stage
from finetune_api.progress import Result
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.local import LocalLayout
from finetune_operator.observed import Resource
from finetune_operator.plans import build_plan
from report import Figures

NEVER = 10_000_000


class Ours:
    """Our side: plans as the operator makes them, stages as the pods run them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.workspace = WORK / "workspace"
        self._options = options
        self._document: dict[str, Any] = {
            "metadata": {"namespace": "benchmark", "name": "ours", "uid": "0001"},
            "spec": job_spec(options),
            "status": {},
        }

    def prepare(self) -> None:
        """Makes the workspace that all contestants take model and rows from."""
        found = self._run(Stage.PREPARE).prepare
        if found is None:
            raise SystemExit("the prepare stage gave no facts")
        self._document["status"] = {"data": found.data.to_dict(), "model": found.model.to_dict()}
        self.data, self.model = found.data, found.model

    def train(self, adapter: Path) -> Figures:
        """One training from the start; its adapter goes to `adapter`."""
        self._forget()
        figures = WORK / "ours.figures.json"
        train = self._run(Stage.TRAIN, (figures, "time")).train
        if train is None or train.tokens_per_second is None:
            raise SystemExit("the train stage gave no result")
        self._run(Stage.PUBLISH)
        shutil.move(self.workspace / "artifacts", adapter)
        tokens = self.data.tokens * self._options.epochs
        return Figures(
            steps=train.steps,
            seconds=tokens / train.tokens_per_second,
            cpu_seconds=json.loads(figures.read_text(encoding="utf-8"))["cpu_seconds"],
            tokens=tokens,
            supervised_tokens=self.data.supervised_tokens * self._options.epochs,
            peak_memory_bytes=train.peak_memory_bytes or 0,
        )

    def profile(self) -> dict[str, Any]:
        """One more training, of few steps, under torch.profiler."""
        self._forget()
        steps = {"maxSteps": self._options.profile_steps, "epochs": None}
        training = {**self._document["spec"]["training"], **steps}
        plan = self._plan(Stage.TRAIN, {**self._document["spec"], "training": training})
        path = WORK / "profile.json"
        command = [sys.executable, HERE / "ours_train.py", plan, path, "profile"]
        execute(command, "profile", self._options, telemetry())
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _run(self, stage: Stage, watched: tuple[Any, ...] = ()) -> Result:
        """`watched`: for train, figures and kind of ours_train.py, which runs the same stage."""
        message, plan = WORK / f"{stage}.message.json", self._plan(stage)
        command = (
            [HERE / "ours_train.py", plan, *watched] if watched else ["-m", "finetune_trainer", stage, "--plan", plan]
        )
        execute([sys.executable, *command], f"ours {stage}", self._options, telemetry(message))
        return Result.model_validate_json(message.read_bytes())

    def _plan(self, stage: Stage, spec: dict[str, Any] | None = None) -> Path:
        document = {**self._document, "spec": spec or self._document["spec"]}
        parsed = FineTuneJobSpec.model_validate(document["spec"])
        plan = build_plan(Resource.read(document), parsed, stage, LocalLayout(WORK, WORK))
        path = WORK / f"{stage}.plan.json"
        path.write_text(plan.to_json(indent=2), encoding="utf-8")
        return path

    def _forget(self) -> None:
        for name in ("checkpoints", "artifacts"):
            shutil.rmtree(self.workspace / name, ignore_errors=True)


def job_spec(options: argparse.Namespace) -> dict[str, Any]:
    """The FineTuneJob; evaluation and checkpoints only at the end, as TRL is told, too."""
    return {
        "task": "Generation",
        "model": {"uri": "file://model"},
        "dataset": {
            "sources": [{"uri": "file://train.jsonl"}],
            "validation": {"sources": [{"uri": "file://held-out.jsonl"}]},
        },
        "method": {"type": "LoRA", "lora": {"rank": options.rank, "alpha": 2 * options.rank, "dropout": 0}},
        "training": {
            "epochs": options.epochs,
            "learningRate": options.learning_rate,
            "batchSize": {"sequences": ROWS_PER_STEP},
            "maxLength": options.max_length,
            "precision": options.precision,
            "seed": options.seed,
            "schedule": "Linear",
            "warmupRatio": 0,
            "weightDecay": 0.01,
            "maxGradNorm": 1,
            "checkpointSteps": NEVER,
            "evaluationSteps": NEVER,
        },
        "resources": {"gpus": options.gpus},
    }


def telemetry(message: Path | None = None) -> dict[str, str]:
    where = {"FINETUNE_TERMINATION_LOG": str(message)} if message else {}
    return {"FINETUNE_TELEMETRY_PORT": "0", **where}
