"""`finetune`: what it prints, what it refuses and with which exit code."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from finetune_operator import cli, local_job
from finetune_operator.manifest_file import ManifestFileError, read_job

from tests import fake_trainer, specs
from tests.processes import start_finetune, wait_until

MANIFEST = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata:
  name: demo
spec:
  task: Classification
  model:
    uri: hf://acme/encoder
  dataset:
    sources:
      - uri: file://train.jsonl
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(MANIFEST)
    return path


def problems(tmp_path: Path, text: str) -> list[str]:
    """What is wrong with a manifest, without the folder."""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ManifestFileError) as caught:
        read_job(path)
    return [problem.removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


class TestManifestFile:
    def test_a_manifest_is_read(self, file):
        job = read_job(file)
        assert job.metadata == {"name": "demo"}
        assert job.spec.dataset.sources[0].uri == "file://train.jsonl"

    def test_numbers_are_those_of_kubernetes(self, tmp_path):
        path = tmp_path / "job.yaml"
        path.write_text(MANIFEST + "  training: {learningRate: 1e-3, weightDecay: .1, epochs: 2, warmupRatio: 0}\n")
        training = read_job(path).spec.training
        assert (training.learning_rate, training.weight_decay, training.epochs) == (1e-3, 0.1, 2)

    def test_digits_are_a_number_with_a_nought_before_them_too(self, tmp_path):
        found = problems(tmp_path, MANIFEST + "    labels: [0199, '0200']\n")
        assert found == ["job.yaml:12: spec.dataset.labels[0]: input should be a valid string, found 199; quote it"]

    def test_a_date_stays_text(self, tmp_path):
        path = tmp_path / "job.yaml"
        path.write_text(MANIFEST + "    labels: [2024-01-01, 2024-01-02]\n")
        assert read_job(path).spec.dataset.labels == ["2024-01-01", "2024-01-02"]

    def test_every_finding_has_its_line(self, tmp_path):
        text = MANIFEST.replace("Classification", "Translation") + "  training:\n    epochs: -1\n    speed: 3\n"
        found = problems(tmp_path, text)
        assert [re.match(r"job.yaml:(\d+): ([\w.]+): ", problem).groups() for problem in found] == [
            ("6", "spec.task"),
            ("13", "spec.training.epochs"),
            ("14", "spec.training.speed"),
        ]

    def test_a_finding_in_a_list_has_its_line(self, tmp_path):
        text = MANIFEST + "      - uri: file://b.jsonl\n        format: CSV\n"
        assert problems(tmp_path, text)[0].startswith("job.yaml:13: spec.dataset.sources[1].format: ")

    def test_what_is_missing_points_to_where_it_belongs(self, tmp_path):
        found = problems(tmp_path, MANIFEST.replace("    uri: hf://acme/encoder\n", "    revision: main\n"))
        assert found == ["job.yaml:7: spec.model.uri: is required"]

    def test_a_broken_rule_is_found(self, tmp_path):
        found = problems(tmp_path, MANIFEST + "  training: {epochs: 1, maxSteps: 5}\n")
        assert found == ["job.yaml:12: spec.training.maxSteps: give either epochs or maxSteps, not both"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("spec: [1, 2", "job.yaml:1: not valid YAML: "),
            (MANIFEST + "\t\n", "job.yaml:12: not valid YAML: "),
            (MANIFEST + "  task: Generation\n", "job.yaml:12: not valid YAML: 'task' is given twice"),
            (MANIFEST + "  bad: !python/name:os.system x\n", "job.yaml:12: not valid YAML: "),
            (MANIFEST + "---\n" + MANIFEST, "job.yaml:13: a second document begins here"),
            ("", "job.yaml: this is not a Kubernetes manifest"),
            ("- 1\n", "job.yaml: this is not a Kubernetes manifest"),
            (MANIFEST.replace("FineTuneJob", "Job"), "job.yaml: this is a finetune-operator.io/v1alpha1 Job; expected"),
            (MANIFEST.replace("v1alpha1", "v2"), "job.yaml: this is a finetune-operator.io/v2 FineTuneJob; expected"),
            ("spec: {}\n", "job.yaml: this is a (none) (none); expected"),
            (MANIFEST.replace("  name: demo", "  labels: {}"), "job.yaml:3: metadata.name: is required"),
            (MANIFEST.replace("  name: demo", "  name: 7"), "job.yaml:4: metadata.name: is required"),
            (MANIFEST.replace("name: demo", "name: Demo"), "job.yaml:4: metadata.name: the name must be"),
        ],
    )
    def test_what_is_no_job_is_told_why(self, tmp_path, text, message):
        assert problems(tmp_path, text)[0].startswith(message)

    def test_a_lone_separator_is_no_document(self, tmp_path):
        path = tmp_path / "job.yaml"
        path.write_text("---\n" + MANIFEST + "---\n")
        assert read_job(path).metadata["name"] == "demo"

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path):
        with pytest.raises(ManifestFileError, match=r"none.yaml: No such file"):
            read_job(tmp_path / "none.yaml")
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ManifestFileError, match=r"binary.yaml: .*UTF-8"):
            read_job(tmp_path / "binary.yaml")


class TestCheck:
    def test_a_valid_manifest(self, file, capsys):
        file.write_text(MANIFEST.replace("file://", "pvc://data/"))
        assert cli.main(["check", str(file)]) == 0
        assert capsys.readouterr().out == f"{file}: demo is valid\n"

    def test_what_only_a_cluster_would_refuse_is_told_with_its_place(self, file, capsys):
        assert cli.main(["check", str(file)]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"{file}: demo is valid for `finetune run`; a cluster would refuse it:"
        assert second.startswith(f"{file}:11: spec.dataset.sources[0].uri: file:// works only with `finetune run`")

    def test_all_files_are_checked(self, file, tmp_path, capsys):
        bad = tmp_path / "bad.yaml"
        bad.write_text(MANIFEST.replace("Classification", "Translation"))
        file.write_text(MANIFEST.replace("file://", "pvc://data/"))
        assert cli.main(["check", str(bad), str(file)]) == 64
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{bad}:6: spec.task: ")
        assert lines[-1] == f"{file}: demo is valid"

    @pytest.mark.parametrize("valid", specs.VALID, ids=lambda example: example.name)
    def test_what_a_cluster_accepts_is_accepted(self, tmp_path, valid):
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps(valid.manifest))  # JSON is YAML
        assert cli.main(["check", str(path)]) == 0

    @pytest.mark.parametrize(
        "command", [["check"], ["validate"], ["validate", "-o", "json"], ["validate", "-o", "yaml"]]
    )
    def test_a_manifest_has_no_power_over_the_terminal(self, tmp_path, capsys, command):
        path = tmp_path / "job.yaml"
        hostile = {"\x1b[2J": 1, "\x9b31m": 1, "a\njob.yaml is valid": 1}
        path.write_text(json.dumps(specs.manifest(specs.CLASSIFICATION, {"training": hostile, "task": "\x1b]0;x\x07"})))
        assert cli.main([command[0], str(path), *command[1:]]) == 64
        output = capsys.readouterr().out
        assert not {"\x1b", "\x9b", "\x07"} & set(output)
        assert not re.search(r"^job.yaml is valid", output, re.MULTILINE)


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "x", "--volume", "name"], ["run", "x", "--secret", "a=/no"]]
)
def test_a_wrong_call_is_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def documents(output: str) -> dict:
    """The YAML document in the output."""
    start = output.index("apiVersion: ")
    return yaml.safe_load(output[start : output.index("\n\n", start)])


class TestRun:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr(local_job, "FIRST_BACK_OFF", 0.05)
        monkeypatch.setattr(cli, "TURN_SECONDS", 0.02)

    def test_a_job_runs_to_its_end(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch)
        assert cli.main(["run", str(file)]) == 0
        output = capsys.readouterr().out
        assert "\x1b" not in output
        phases = re.findall(r"^\d\d:\d\d:\d\d  (\w+) ", output, re.MULTILINE)
        assert phases[-1] == "Succeeded"
        assert [phase for phase in phases if phase in ("Preparing", "Training", "Publishing")] == sorted(
            {"Preparing", "Training", "Publishing"} & set(phases), key=phases.index
        )
        document = documents(output)
        assert document["kind"] == "FineTuneJob"
        assert document["metadata"]["uid"]
        assert document["spec"]["model"] == {"uri": "hf://acme/encoder", "trustRemoteCode": False, "allowPickle": False}
        status = document["status"]
        assert (status["phase"], status["progress"]["percentage"]) == ("Succeeded", 100)
        assert status["result"]["scores"] == [{"metric": "macroF1", "value": "0.91", "baseline": "0.33"}]
        assert re.search(r"accuracy\W+0.875", output)
        assert re.search(r"F1 good\W+0.800", output)
        assert re.search(r"good\W+3\W+17", output)
        assert "Adapter: " in output

    def test_the_run_lies_beside_the_manifest(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch)
        cli.main(["run", str(file)])
        run = tmp_path / "runs" / "demo"
        assert {path.name for path in run.iterdir()} >= {"job.json", "plans", "logs", "workspace"}

    def test_a_finished_run_is_shown_again_and_not_run(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch)
        cli.main(["run", str(file)])
        first = documents(capsys.readouterr().out)
        fake_trainer.install(tmp_path, monkeypatch, prepare=["refuse"])
        assert cli.main(["run", str(file)]) == 0
        output = capsys.readouterr().out
        assert "already ended" in output
        assert documents(output) == first
        assert cli.main(["run", str(file), "--fresh"]) == 64

    def test_a_users_error_is_64_and_names_its_place(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch, prepare=["refuse"])
        assert cli.main(["run", str(file)]) == 64
        output = capsys.readouterr().out
        assert "Failed: prepare: train.jsonl line 3: no label\n" in output
        failure = documents(output)["status"]["failure"]
        assert failure == {
            "stage": "prepare",
            "reason": "DataInvalid",
            "message": "train.jsonl line 3: no label",
            "exitCode": 64,
        }
        log = Path(re.search(r"^Log: (.*)$", output, re.MULTILINE).group(1))
        assert log.is_file()

    def test_another_failure_is_1_and_may_be_tried_again(self, file, tmp_path, monkeypatch, capsys):
        file.write_text(MANIFEST + "  limits: {retries: 0}\n")
        fake_trainer.install(tmp_path, monkeypatch, train=["crash", "succeed"])
        assert cli.main(["run", str(file), "--output", str(tmp_path / "out")]) == 1
        assert documents(capsys.readouterr().out)["status"]["failure"]["exitCode"] == 1
        assert cli.main(["run", str(file), "--output", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "workspace" / "tries-prepare").read_text() == "1"

    def test_a_retry_is_told(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch, train=["killed", "succeed"])
        assert cli.main(["run", str(file)]) == 0
        assert re.search(r"Warning +StageFailed: attempt 1 of train failed: .*137 \(SIGKILL\)", capsys.readouterr().out)

    def test_a_cluster_only_uri_names_field_and_option(self, file, capsys):
        file.write_text(MANIFEST.replace("file://train", "pvc://store/train"))
        assert cli.main(["run", str(file)]) == 64
        error = capsys.readouterr().err
        assert error.startswith(f"{file}:11: spec.dataset.sources[0].uri: pvc://store/train.jsonl is only in a cluster")
        assert "--volume store=FOLDER" in error

    def test_a_suspended_job_is_not_waited_for(self, file, capsys):
        file.write_text(MANIFEST + "  suspend: true\n")
        assert cli.main(["run", str(file)]) == 64
        assert "spec.suspend is true" in capsys.readouterr().err

    def test_nor_is_one_of_another_controller(self, file, capsys):
        file.write_text(MANIFEST + "  managedBy: example.com/fleet\n")
        assert cli.main(["run", str(file)]) == 64
        assert "spec.managedBy is example.com/fleet" in capsys.readouterr().err

    def test_another_spec_in_the_same_folder_is_refused(self, file, tmp_path, monkeypatch, capsys):
        fake_trainer.install(tmp_path, monkeypatch)
        cli.main(["run", str(file)])
        file.write_text(MANIFEST + "  training: {epochs: 9}\n")
        assert cli.main(["run", str(file)]) == 64
        assert "another spec (changed: training)" in capsys.readouterr().err


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_stopped_run_says_how_to_go_on_and_does(self, file, tmp_path, monkeypatch, number, capsys):
        fake_trainer.install(tmp_path, monkeypatch, train=["work", "succeed"])
        workspace = tmp_path / "out" / "workspace"
        with start_finetune("run", file, "--output", tmp_path / "out") as process:
            wait_until((workspace / "working").exists, process)
            refused = start_finetune("run", file, "--output", tmp_path / "out")
            assert "another `finetune run` is at work" in refused.communicate()[1]
            assert refused.returncode == 64
            process.send_signal(number)
            said = "".join(process.communicate(timeout=60))
        assert process.returncode == 75
        program = f"{sys.executable} -m finetune_operator.cli"
        assert f"Go on with:\n  {program} run {file} --output {tmp_path / 'out'}\n" in said
        assert cli.main(["run", str(file), "--output", str(tmp_path / "out")]) == 0
        assert (workspace / "tries-prepare").read_text() == "1"
        assert (workspace / "tries-train").read_text() == "2"

    @pytest.mark.parametrize("on_path", [True, False])
    def test_the_command_to_go_on_with_is_found_by_a_shell(self, tmp_path, monkeypatch, on_path):
        program = tmp_path / "bin" / "finetune"
        program.parent.mkdir()
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom finetune_operator.cli import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
        if on_path:
            monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        fake_trainer.install(tmp_path, monkeypatch, train=["work"])
        (tmp_path / "job.yaml").write_text(MANIFEST)
        command = ["finetune" if on_path else "bin/finetune", "run", "job.yaml"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        ) as process:
            wait_until((tmp_path / "runs" / "demo" / "workspace" / "working").exists, process)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        assert output.endswith(f"Go on with:\n  {' '.join(command)}\n")

    def test_the_second_signal_does_not_wait(self, file, tmp_path, monkeypatch):
        fake_trainer.install(tmp_path, monkeypatch, train=["stubborn"])
        with start_finetune("run", file) as process:
            wait_until((tmp_path / "runs" / "demo" / "workspace" / "working").exists, process)
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
        assert process.returncode == 75
