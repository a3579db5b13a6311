"""`finetune validate`: findings, exit codes, what it prints where, and that it leaves nothing behind."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest
import yaml
from finetune_api.constants import ExitCode
from finetune_api.report import Remark
from finetune_api.validation import Validation, ValidationFinding
from finetune_operator import cli, validate

from tests import fake_trainer
from tests.models import save_tiny_bert
from tests.processes import start_finetune, wait_until

MANIFEST = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata:
  name: demo
spec:
  task: Classification
  model:
    uri: file://model
  dataset:
    sources:
      - uri: file://train.jsonl
    maxRejected: 0.05
"""
LABELS = ["bad", "good"]
CLUSTER_ONLY = [
    ("Warning", "ClusterOnly", "spec.model.uri", 8),
    ("Warning", "ClusterOnly", "spec.dataset.sources[0].uri", 11),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job with good data; temporary files go to tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "model").symlink_to(model)
    write_rows(tmp_path, [{"text": f"profit {n} rises", "label": LABELS[n % 2]} for n in range(200)])
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST)
    return path


def write_rows(folder: Path, rows: list) -> None:
    (folder / "train.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def told(output: str) -> list[tuple]:
    return [
        (found.level, found.reason, found.field, found.line)
        for found in Validation.model_validate_json(output).findings
    ]


class TestWithTheTrainer:
    """Each call starts it, which takes seconds."""

    def command(self, file: Path, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "finetune_operator.cli", "validate", str(file), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    def test_a_valid_job_as_json(self, file, tmp_path):
        before = sorted(tmp_path.iterdir())
        done = self.command(file, "--sample", "60", "-o", "json")
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        jsonschema.validate(document, Validation.model_json_schema(by_alias=True, mode="serialization"))
        assert told(done.stdout) == CLUSTER_ONLY
        assert (document["manifest"], document["job"], document["valid"]) == (str(file), "demo", True)
        data = document["data"]
        assert data["sample"] == {"rowsPerSource": 60, "complete": False}
        assert data["summary"]["rowsRead"] == data["summary"]["rowsKept"] == 60
        assert data["lengths"]["p50"] > 3
        assert sorted(tmp_path.iterdir()) == before
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_bad_data_as_a_table_and_the_reports_in_a_folder(self, file, tmp_path):
        write_rows(
            tmp_path, [*({"text": f"profit {n} rises", "label": LABELS[n % 2]} for n in range(90)), *["{oops"] * 10]
        )
        done = self.command(file, "--sample", "all", "--report", str(tmp_path / "out" / "report"))
        assert (done.returncode, done.stderr) == (64, "")
        lines = done.stdout.splitlines()
        assert lines[0].startswith(f"{file}:11: Error: spec.dataset.sources[0]: train.jsonl line 91: invalid JSON")
        assert lines[1].startswith(f"{file}:8: Warning: spec.model.uri: a cluster would refuse it")
        assert lines[3] == f"{file}: demo is not valid: 1 error, 2 warnings"
        assert "100 rows read, 90 kept" in lines
        assert [line for line in lines if line.startswith("Left out (file and line of each: quarantine.jsonl")]
        assert "\x1b" not in done.stdout
        names = {path.name for path in (tmp_path / "out" / "report").iterdir()}
        assert names == {"data.json", "data.html", "quarantine.jsonl"}
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_a_model_that_does_not_fit_the_job_is_found(self, file, tmp_path, capsys):
        file.write_text(MANIFEST.replace("Classification", "Generation"))
        write_rows(tmp_path, [{"prompt": f"is {n} good?", "completion": "yes"} for n in range(50)])
        assert cli.main(["validate", str(file), "-o", "json"]) == 64
        document = capsys.readouterr().out
        assert told(document)[0] == ("Error", "ModelInvalid", "spec.model.uri", 8)

    def test_a_model_only_in_a_cluster_is_a_warning(self, file, capsys):
        file.write_text(MANIFEST.replace("file://model", "pvc://models/base"))
        assert cli.main(["validate", str(file), "-o", "json"]) == 0
        document = capsys.readouterr().out
        assert told(document) == [("Warning", "ModelUnreachable", "spec.model.uri", 8), CLUSTER_ONLY[1]]
        assert "lengths" not in json.loads(document)["data"]

    def test_what_only_later_stages_need_is_not_asked_for(self, file, tmp_path, capsys):
        extra = "  output: {uri: pvc://results/demo}\n  resources: {nodes: 2}\n  workspace: {claimName: disk}\n  suspend: true\n"
        file.write_text(MANIFEST.replace("file://train", "pvc://store/train") + extra)
        (tmp_path / "disk").mkdir()
        places = ["--volume", f"store={tmp_path}", "--volume", f"disk={tmp_path / 'disk'}"]
        assert cli.main(["validate", str(file), *places, "-o", "json"]) == 0
        assert told(capsys.readouterr().out) == [CLUSTER_ONLY[0]]
        assert list((tmp_path / "disk").iterdir()) == []

    def test_warnings_fail_a_strict_pipeline(self, file, capsys):
        assert cli.main(["validate", str(file), "--strict", "-o", "yaml"]) == 64
        document = yaml.safe_load(capsys.readouterr().out)
        assert document["valid"] is True
        assert len(document["findings"]) == 2


class TestManifest:
    """No data is read for these."""

    @pytest.fixture(autouse=True)
    def no_process(self, monkeypatch):
        monkeypatch.setattr(validate.subprocess, "Popen", None)

    def test_mistakes_in_the_spec_are_findings(self, file, capsys):
        file.write_text(MANIFEST.replace("Classification", "Translation") + "  training: {epochs: -1}\n")
        assert cli.main(["validate", str(file), "-o", "json"]) == 64
        output = capsys.readouterr()
        assert told(output.out) == [
            ("Error", "InvalidSpec", "spec.task", 6),
            ("Error", "InvalidSpec", "spec.training.epochs", 13),
        ]
        assert output.err == ""

    @pytest.mark.parametrize(("text", "line"), [("a: [", 1), ("kind: Pod\n", None)])
    def test_what_is_no_job_is_a_finding_too(self, file, capsys, text, line):
        file.write_text(text)
        assert cli.main(["validate", str(file), "-o", "json"]) == 64
        document = capsys.readouterr().out
        assert told(document) == [("Error", "InvalidSpec", None, line)]
        assert "job" not in json.loads(document)

    def test_a_source_without_a_place_names_the_option(self, file, capsys):
        file.write_text(MANIFEST.replace("file://train", "pvc://store/train"))
        assert cli.main(["validate", str(file)]) == 64
        line = capsys.readouterr().out.splitlines()[0]
        assert line.startswith(
            f"{file}:11: Error: spec.dataset.sources[0].uri: pvc://store/train.jsonl is only in a cluster"
        )
        assert line.endswith("--volume store=FOLDER")


class TestEnds:
    """How the process ends, with a trainer that does as it is told."""

    def wait_for_work(self, folder: Path, process: subprocess.Popen[str]) -> int:
        """The trainer's process id."""
        working, *_ = wait_until(lambda: [*folder.glob("tmp/finetune-validate-*/workspace/working")], process)
        return int((working.parent / "pid").read_text())

    def test_a_crash_is_1_and_shows_the_log(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["crash"])
        assert cli.main(["validate", str(file), "-o", "json"]) == 1
        output = capsys.readouterr()
        assert told(output.out)[0] == ("Error", "StageFailed", None, None)
        assert "exit code 1" in json.loads(output.out)["findings"][0]["message"]
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_a_kill_is_1(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["killed"])
        assert cli.main(["validate", str(file)]) == 1
        assert "SIGKILL" in capsys.readouterr().out

    def test_a_refusal_without_a_report_is_64(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["refuse"])
        assert cli.main(["validate", str(file), "-o", "json"]) == 64
        found = json.loads(capsys.readouterr().out)["findings"][0]
        assert (found["reason"], found["message"]) == ("DataInvalid", "train.jsonl line 3: no label")

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_stop_ends_all_and_leaves_nothing(self, file, tmp_path, monkeypatch, number):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["work"])
        with start_finetune("validate", file, "-o", "json") as process:
            trainer = self.wait_for_work(tmp_path, process)
            process.send_signal(number)
            output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (75, "", "finetune: stopped\n")
        assert not Path(f"/proc/{trainer}").exists()
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_the_second_ctrl_c_does_not_wait(self, file, tmp_path, monkeypatch):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["stubborn"])
        with start_finetune("validate", file) as process:
            trainer = self.wait_for_work(tmp_path, process)
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=5)
        assert process.returncode == 75
        assert not Path(f"/proc/{trainer}").exists()
        assert list((tmp_path / "tmp").iterdir()) == []

    def test_the_trainer_dies_with_a_killed_command(self, file, tmp_path, monkeypatch):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["work"])
        with start_finetune("validate", file) as process:
            trainer = self.wait_for_work(tmp_path, process)
            process.kill()
        wait_until(lambda: not Path(f"/proc/{trainer}").exists(), seconds=10)


@pytest.mark.parametrize("arguments", [[], ["x", "--sample", "-1"], ["x", "--sample", "some"], ["x", "-o", "xml"]])
def test_a_wrong_call_is_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", *arguments])
    assert caught.value.code == 2


def test_a_report_folder_that_cannot_be_made_is_told_before_the_work(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validate.subprocess, "Popen", None)
    (tmp_path / "plain").touch()
    assert cli.main(["validate", str(file), "--report", str(tmp_path / "plain" / "report")]) == 1
    assert "plain" in capsys.readouterr().err


def test_the_document_and_its_constants_are_explained():
    page = (Path(__file__).parents[3] / "docs" / "validate.md").read_text()
    assert [remark for remark in Remark if f"| `{remark}` |" not in page] == []
    assert [field.alias for field in Validation.model_fields.values() if f"`{field.alias}" not in page] == []
    assert [field.alias for field in ValidationFinding.model_fields.values() if f"`{field.alias}`" not in page] == []
    assert [code for code in ExitCode if f"| {code:d} |" not in page] == []
