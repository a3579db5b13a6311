"""A trainer that does as it is told, in place of finetune_trainer: for tests of what runs it."""

import json
import os
from pathlib import Path

import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.report import ClassScores, Evaluation, EvaluationReport

from tests.fake_cluster import TRAINED, failure, success

PROGRAM = """
import http.server, json, os, pathlib, signal, sys, threading, time

stage, plan = sys.argv[1], json.loads(pathlib.Path(sys.argv[3]).read_text())
tries = pathlib.Path(plan["workspace"], f"tries-{stage}")
tries.parent.mkdir(parents=True, exist_ok=True)
number = int(tries.read_text()) + 1 if tries.exists() else 1
tries.write_text(str(number))
script = json.loads(os.environ["FAKE_TRAINER"])[stage]
action = script["actions"][min(number, len(script["actions"])) - 1]
pathlib.Path(plan["workspace"], "pid").write_text(str(os.getpid()))
ours = {name: value for name, value in os.environ.items() if name.startswith("FINETUNE_")}
pathlib.Path(plan["workspace"], "environment.json").write_text(json.dumps(ours))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(script["progress"].encode())
    def log_message(self, *_):
        pass

def end(code, text):
    pathlib.Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(text)
    sys.exit(code)

if action == "succeed":
    for path, text in script["files"].items():
        file = pathlib.Path(plan["workspace"], path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    end(0, script["success"])
if action == "refuse":
    end(64, script["refusal"])
if action == "crash":
    sys.exit(1)
if action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if action == "work":
    signal.signal(signal.SIGTERM, lambda *_: end(75, script["interruption"]))
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["FINETUNE_TELEMETRY_PORT"])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
pathlib.Path(plan["workspace"], "working").touch()
while True:
    time.sleep(0.02)
"""

PROGRESS = {
    "activity": "Training", "fraction": 0.5, "step": 20, "totalSteps": 40, "trainingLoss": 0.5, "learningRate": 0.001,
    "tokensPerSecond": 1234.0, "estimatedRemainingSeconds": 75.0, "updatedAt": 1_800_000_000.0,
}  # fmt: skip


def evaluation(name: str, confusion: list[list[int]]) -> Evaluation:
    classes = [
        ClassScores(label=label, precision=0.5, recall=0.5, f1=f1, support=sum(row))
        for label, f1, row in zip(("bad", "good"), (0.9, 0.8), confusion, strict=True)
    ]
    return Evaluation(name=name, metrics={"accuracy": 0.875, "macroF1": 0.85}, classes=classes, confusion=confusion)


REPORT = EvaluationReport(
    split="test",
    rows=40,
    tuned=evaluation("tuned", [[18, 2], [3, 17]]),
    baseline=evaluation("majority class", [[20, 0], [20, 0]]),
    scores=TRAINED.scores,
)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **actions: list[str]) -> None:
    """From now on a stage does its nth action at its nth attempt, then the last one again and again.

    succeed; refuse (exit 64); crash (exit 1); killed (SIGKILL); work (until SIGTERM: exit 75); stubborn (ignores it).
    """
    package = folder / "fake" / "finetune_trainer"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    script = {
        stage: {
            "actions": actions.get(stage.value, ["succeed"]),
            "success": success(stage).to_termination_message(),
            "refusal": failure(stage, Reason.DATA_INVALID, "train.jsonl line 3: no label").to_termination_message(),
            "interruption": json.dumps({"stage": stage, "outcome": "Interrupted", "reason": "Interrupted", "step": 20}),
            "progress": json.dumps({"stage": stage, **PROGRESS}),
            "files": {"report/evaluation.json": REPORT.to_json()} if stage is Stage.TRAIN else {},
        }
        for stage in Stage
    }
    monkeypatch.setenv("FAKE_TRAINER", json.dumps(script))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH")))))
