"""`python -m finetune_trainer` as the kubelet runs it: exit code, termination message, signals, log."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.progress import Outcome, Progress, Result
from finetune_trainer.__main__ import STAGE_MODULES, write_termination_message

from tests.plans import make_plan

SECRET_ROW = "Ms Miller owes 4,711 dollars"

WITH_OWN_STAGE = (
    "import sys\n"
    "from finetune_trainer import __main__ as trainer\n"
    "trainer.STAGE_MODULES = dict.fromkeys(trainer.STAGE_MODULES, 'stage_of_the_test')\n"
    "sys.exit(trainer.main())\n"
)
IMPORTS = (
    "import os, sys, time\n"
    "from finetune_api.constants import Reason, Stage\n"
    "from finetune_api.progress import Outcome, Result\n"
    "from finetune_trainer.errors import Interrupted, StageError, UserError\n"
)


class End(NamedTuple):
    code: int
    result: Result | None
    """The termination message."""
    log: list[dict]
    stderr: str


class Trainer:
    """Runs the trainer in a folder of its own, with the command's arguments or with a stage given as code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.termination_log = folder / "termination-log"
        self.plan = folder / "plan.json"
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
            "FINETUNE_TERMINATION_LOG": str(self.termination_log),
            "FINETUNE_TELEMETRY_PORT": "0",
        }

    def write_plan(self, stage: Stage) -> None:
        self.plan.write_text(make_plan(self.folder, stage).to_json())

    def start(self, *arguments: str, python: tuple[str, ...] = ("-m", "finetune_trainer")) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *python, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_stage(self, stage: Stage, body: str) -> subprocess.Popen[str]:
        """`body` is that of run(plan, telemetry)."""
        self.write_plan(stage)
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (self.folder / "stage_of_the_test.py").write_text(f"{IMPORTS}def run(plan, telemetry):\n{lines}")
        return self.start(stage, "--plan", str(self.plan), python=("-c", WITH_OWN_STAGE))

    def end(self, process: subprocess.Popen[str]) -> End:
        stdout, stderr = process.communicate(timeout=30)
        message = self.termination_log.read_text() if self.termination_log.exists() else None
        result = None if message is None else Result.model_validate_json(message)
        return End(process.returncode, result, [json.loads(line) for line in stdout.splitlines() if line], stderr)

    def run(self, *arguments: str) -> End:
        return self.end(self.start(*arguments))

    def run_stage(self, stage: Stage, body: str) -> End:
        return self.end(self.start_stage(stage, body))


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path)


class TestPlan:
    def test_that_is_missing_may_come_yet(self, trainer):
        end = trainer.run("prepare", "--plan", str(trainer.plan))
        assert end.code == 1
        assert (end.result.outcome, end.result.reason) == (Outcome.FAILED, Reason.STAGE_FAILED)
        assert f"cannot read the plan {trainer.plan}: No such file" in end.result.message

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ("{", "the document: Invalid JSON"),
            ("{}", "stage: Field required"),
            (b"\xff", "the document: "),
        ],
    )
    def test_that_is_none_names_the_field(self, trainer, content, found):
        trainer.plan.write_bytes(content.encode() if isinstance(content, str) else content)
        end = trainer.run("train", "--plan", str(trainer.plan))
        assert (end.code, end.result.reason) == (64, Reason.INVALID_SPEC)
        assert found in end.result.message

    def test_with_a_field_of_another_version_names_it_but_not_its_value(self, trainer):
        trainer.write_plan(Stage.TRAIN)
        trainer.plan.write_text(json.dumps(json.loads(trainer.plan.read_text()) | {"novelty": SECRET_ROW}))
        end = trainer.run("train", "--plan", str(trainer.plan))
        assert end.code == 64
        assert "novelty" in end.result.message
        assert "same version" in end.result.message
        assert SECRET_ROW not in json.dumps(end.log) + end.result.message

    def test_for_another_stage_is_refused(self, trainer):
        trainer.write_plan(Stage.PREPARE)
        end = trainer.run("publish", "--plan", str(trainer.plan))
        assert (end.code, end.result.stage) == (64, Stage.PUBLISH)
        assert "a plan for prepare, not for publish" in end.result.message


class TestEnd:
    def test_of_a_stage_that_succeeds(self, trainer):
        end = trainer.run_stage(Stage.TRAIN, "return Result(stage=plan.stage, outcome=Outcome.SUCCEEDED)")
        assert (end.code, end.result) == (0, Result(stage=Stage.TRAIN, outcome=Outcome.SUCCEEDED))
        assert {line["job"] for line in end.log} == {"team/sentiment"}
        assert end.log[-1]["message"] == "train succeeded, exit code 0"
        assert end.stderr == ""

    @pytest.mark.parametrize(
        ("body", "code", "reason"),
        [
            ("raise UserError(Reason.DATA_INVALID, 'train.csv:3: no label')", 64, Reason.DATA_INVALID),
            ("raise StageError(Reason.DATA_NOT_FOUND, 'away')", 1, Reason.DATA_NOT_FOUND),
            ("raise Interrupted('saved', 7)", 75, Reason.INTERRUPTED),
            ("raise MemoryError", 1, Reason.OOM_KILLED),
            (
                "return Result(stage=plan.stage, outcome=Outcome.FAILED, reason=Reason.GATE_FAILED)",
                64,
                Reason.GATE_FAILED,
            ),
        ],
    )
    def test_has_the_exit_code_of_its_cause(self, trainer, body, code, reason):
        end = trainer.run_stage(Stage.TRAIN, body)
        assert (end.code, end.result.reason) == (code, reason)

    def test_shows_a_traceback_only_for_what_nobody_expected(self, trainer):
        expected = trainer.run_stage(Stage.TRAIN, "raise UserError(Reason.DATA_INVALID, 'train.csv:3: no label')")
        assert not any("traceback" in line for line in expected.log)
        surprise = trainer.run_stage(Stage.TRAIN, "raise ValueError('shapes differ')")
        (trace,) = [line["traceback"] for line in surprise.log if "traceback" in line]
        assert "stage_of_the_test.py" in trace
        assert trace.endswith("ValueError: shapes differ")

    def test_of_prepare_never_quotes_a_row(self, trainer):
        body = (
            f"try:\n    int({SECRET_ROW!r})\nexcept ValueError as error:\n    raise RuntimeError(str(error)) from error"
        )
        end = trainer.run_stage(Stage.PREPARE, body)
        assert end.code == 1
        # the traceback shows source lines; where the row stands in the source is this test's doing
        traces = "".join(line.pop("traceback", "") for line in end.log)
        assert "RuntimeError at stage_of_the_test.py:" in traces
        assert "invalid literal" not in traces
        assert SECRET_ROW not in json.dumps(end.log) + end.stderr + end.result.to_json()

    def test_with_a_termination_log_that_cannot_be_written_keeps_its_exit_code(self, trainer):
        trainer.environment["FINETUNE_TERMINATION_LOG"] = str(trainer.folder / "missing" / "log")
        end = trainer.run_stage(Stage.TRAIN, "raise UserError(Reason.DATA_INVALID, 'x')")
        assert end.code == 64
        assert any("could not be written" in line["message"] for line in end.log)

    def test_removes_the_temporary_folder(self, trainer):
        trainer.environment["TMPDIR"] = str(trainer.folder / "tmp")
        (trainer.folder / "tmp").mkdir()
        body = "open(os.path.join(os.environ['HF_HOME'] + '.txt'), 'w').close()\nraise ValueError"
        assert trainer.run_stage(Stage.TRAIN, body).code == 1
        assert list((trainer.folder / "tmp").iterdir()) == []


class TestSignals:
    SAVE = (
        "print('{}', flush=True)\n"
        "if telemetry.stop_requested.wait(20):\n"
        "    raise Interrupted('saved', 12)\n"
        "raise ValueError('no signal')"
    )
    HANG = (
        "print('{}', flush=True)\n"
        "telemetry.stop_requested.wait(20)\n"
        "print('{}', flush=True)\n"
        "for _ in range(200): time.sleep(0.1)"
    )

    def wait_for_stage(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert any(line.startswith("{}") for line in process.stdout)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ask_the_stage_to_save_and_exit_75(self, trainer, number):
        process = trainer.start_stage(Stage.TRAIN, self.SAVE)
        self.wait_for_stage(process)
        process.send_signal(number)
        end = trainer.end(process)
        assert (end.code, end.result.outcome, end.result.step) == (75, Outcome.INTERRUPTED, 12)

    def test_a_second_ctrl_c_ends_it_at_once(self, trainer):
        process = trainer.start_stage(Stage.TRAIN, self.HANG)
        for _ in range(2):
            self.wait_for_stage(process)
            process.send_signal(signal.SIGINT)
        end = trainer.end(process)
        assert (end.code, end.result.reason) == (75, Reason.INTERRUPTED)

    def test_before_the_plan_is_read_are_not_forgotten(self, trainer):
        """Without a handler they would end this process, and be ignored by the first one of a container."""
        trainer.write_plan(Stage.TRAIN)
        plan = trainer.plan.read_text()
        trainer.plan.unlink()
        os.mkfifo(trainer.plan)
        process = trainer.start("train", "--plan", str(trainer.plan))
        with trainer.plan.open("w") as pipe:  # opens when the trainer reads it
            process.send_signal(signal.SIGTERM)
            pipe.write(plan)
        end = trainer.end(process)
        assert (end.code, end.result.reason) == (75, Reason.INTERRUPTED)

    def test_before_the_stage_began_start_nothing(self, trainer):
        (trainer.folder / "slow_start.py").write_text("print('{}', flush=True)\nimport time\ntime.sleep(0.5)\n")
        process = trainer.start_stage(Stage.TRAIN, "raise ValueError('it ran')")
        module = trainer.folder / "stage_of_the_test.py"
        module.write_text("import slow_start\n" + module.read_text())
        self.wait_for_stage(process)
        process.send_signal(signal.SIGTERM)
        end = trainer.end(process)
        assert end.code == 75
        assert "before the stage began" in end.result.message


def test_progress_is_served_while_the_stage_runs(trainer):
    body = (
        "telemetry.update(activity='Training', step=3)\n"
        "import json\n"
        "print(json.dumps({'port': telemetry.port}), flush=True)\n"
        "telemetry.stop_requested.wait(20)\n"
        "return Result(stage=plan.stage, outcome=Outcome.SUCCEEDED)"
    )
    process = trainer.start_stage(Stage.TRAIN, body)
    assert process.stdout is not None
    port = next(json.loads(line)["port"] for line in process.stdout if "port" in line)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress", timeout=5) as answer:
        assert Progress.model_validate_json(answer.read()).step == 3
    process.send_signal(signal.SIGTERM)
    assert trainer.end(process).code == 0


def test_help_and_mistakes_on_the_command_line_need_no_torch(trainer):
    code = (
        "import sys\n"
        "from finetune_trainer.__main__ import main\n"
        "try:\n    main(['publish'])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    process = trainer.start(python=("-c", code))
    stdout, stderr = process.communicate(timeout=30)
    assert stdout == "2 False\n"
    assert "--plan" in stderr


def test_every_stage_has_a_module():
    assert set(STAGE_MODULES) == set(Stage)


def test_outside_a_pod_no_termination_message_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("FINETUNE_TERMINATION_LOG", raising=False)
    monkeypatch.setattr("finetune_trainer.__main__.TERMINATION_LOG", tmp_path / "absent")
    write_termination_message(Result(stage=Stage.TRAIN, outcome=Outcome.SUCCEEDED))
    assert list(tmp_path.iterdir()) == []
