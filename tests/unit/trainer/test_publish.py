"""The publish stage: artifacts that plain peft and transformers load, with the trained model's own logits."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.plan import JobReference
from finetune_api.progress import Outcome, Result
from finetune_api.spec import LoraVariant, OutputFormat
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.publish.run import run
from finetune_trainer.telemetry import Telemetry
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.models import save_tiny_bert, save_tiny_gpt2, save_tiny_llama
from tests.unit.trainer.trained_workspace import GENERATION, LABELS, REVISION, make_trained

TEXTS = ["profit rises", "shares fall on a loss that was wider than expected"]
MERGED = {"output": {"format": "Merged"}}


@pytest.fixture
def telemetry():
    return Telemetry(Stage.PUBLISH, JobReference(namespace="team", name="sentiment", uid="1"), port=0)


def logits(model, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def stored_types(file: Path) -> set[str]:
    with safe_open(file, "pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118  (not a dict)


def save_in_bf16(save, folder: Path) -> None:
    save(folder)
    kind = AutoModelForCausalLM if save is save_tiny_llama else AutoModelForSequenceClassification
    kind.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


class TestAdapter:
    def test_of_a_classifier_loads_in_plain_peft_with_its_head(self, tmp_path, telemetry):
        plan, trained = make_trained(tmp_path)
        run(plan, telemetry)
        artifacts = tmp_path / "artifacts"
        config = AutoConfig.from_pretrained(artifacts, subfolder="base_config")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", config=config)
        untuned = logits(base.eval(), artifacts)
        model = PeftModel.from_pretrained(base, artifacts).eval()
        expected = logits(trained, tmp_path / "model")
        assert difference(logits(model, artifacts), expected) < 1e-6
        assert difference(untuned, expected) > 0.1
        assert config.id2label == dict(enumerate(LABELS))

    def test_of_a_decoder_that_classifies_finds_the_last_token(self, tmp_path, telemetry):
        save_tiny_llama(tmp_path / "model")
        plan, trained = make_trained(tmp_path)
        run(plan, telemetry)
        artifacts = tmp_path / "artifacts"
        config = AutoConfig.from_pretrained(artifacts, subfolder="base_config")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", config=config)
        model = PeftModel.from_pretrained(base, artifacts).eval()
        assert difference(logits(model, artifacts), logits(trained, tmp_path / "model")) < 1e-6

    def test_of_a_generator_loads_in_plain_peft(self, tmp_path, telemetry):
        plan, trained = make_trained(tmp_path, **GENERATION)
        run(plan, telemetry)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        model = PeftModel.from_pretrained(base, tmp_path / "artifacts").eval()
        expected = logits(trained, tmp_path / "model")
        assert difference(logits(model, tmp_path / "artifacts"), expected) < 1e-6

    def test_that_names_its_base_loads_by_transformers_alone(self, tmp_path, telemetry):
        plan, trained = make_trained(tmp_path, **GENERATION)
        run(plan, telemetry)
        settings_file = tmp_path / "artifacts" / "adapter_config.json"
        settings = json.loads(settings_file.read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/base", REVISION)
        settings |= {"base_model_name_or_path": str(tmp_path / "model"), "revision": None}  # no hub here
        settings_file.write_text(json.dumps(settings))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifacts").eval()
        expected = logits(trained, tmp_path / "model")
        assert difference(logits(model, tmp_path / "artifacts"), expected) < 1e-6

    @pytest.mark.parametrize(
        ("uri", "name"),
        [
            ("hf://owner/base", "owner/base"),
            ("pvc://models/llama", "pvc://models/llama"),
            ("https://user:password@host/model?signature=1", "https://host/model"),
        ],
    )
    def test_names_its_base_as_the_user_does(self, tmp_path, telemetry, uri, name):
        plan, _ = make_trained(tmp_path, model={"location": {"uri": uri}})
        run(plan, telemetry)
        settings = json.loads((tmp_path / "artifacts" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == name

    def test_is_written_in_the_same_order_every_time(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path)
        run(plan, telemetry)
        settings = json.loads((tmp_path / "artifacts" / "adapter_config.json").read_text())
        assert settings["target_modules"] == sorted(settings["target_modules"])
        assert settings["modules_to_save"] == sorted(set(settings["modules_to_save"]))

    def test_of_a_bf16_base_stays_as_precise_as_it_was_trained(self, tmp_path, telemetry):
        save_in_bf16(save_tiny_bert, tmp_path / "model")
        plan, _ = make_trained(tmp_path)
        run(plan, telemetry)
        assert stored_types(tmp_path / "artifacts" / "adapter_model.safetensors") == {"F32"}
        config = AutoConfig.from_pretrained(tmp_path / "artifacts", subfolder="base_config")
        assert config.dtype == torch.bfloat16


class TestCompleteModel:
    @pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_llama])
    @pytest.mark.parametrize("method", ["LoRA", "Full", "Head"])
    def test_of_a_classifier_loads_in_plain_transformers(self, tmp_path, telemetry, method, save):
        save(tmp_path / "model")
        lora = {} if method == "LoRA" else {"lora": None}
        plan, trained = make_trained(tmp_path, method=method, **lora, **MERGED)
        run(plan, telemetry)
        artifacts = tmp_path / "artifacts"
        model = AutoModelForSequenceClassification.from_pretrained(artifacts).eval()
        assert difference(logits(model, artifacts), logits(trained, tmp_path / "model")) < 1e-4
        assert model.config.id2label == dict(enumerate(LABELS))
        assert model.config.label2id == {label: number for number, label in enumerate(LABELS)}
        assert not (artifacts / "adapter_config.json").exists()

    @pytest.mark.parametrize("method", ["LoRA", "Full"])
    def test_of_a_generator_loads_in_plain_transformers(self, tmp_path, telemetry, method):
        lora = {} if method == "LoRA" else {"lora": None}
        plan, trained = make_trained(tmp_path, method=method, **lora, **GENERATION, **MERGED)
        run(plan, telemetry)
        artifacts = tmp_path / "artifacts"
        model = AutoModelForCausalLM.from_pretrained(artifacts).eval()
        assert difference(logits(model, artifacts), logits(trained, tmp_path / "model")) < 1e-4
        assert model.generation_config.max_new_tokens == 32

    @pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_gpt2, save_tiny_llama])
    @pytest.mark.parametrize("variant", list(LoraVariant))
    def test_and_the_adapter_answer_as_the_trained_model_with_every_variant_of_lora(
        self, tmp_path, telemetry, variant, save
    ):
        save(tmp_path / "model")
        task = {} if save is save_tiny_bert else GENERATION
        lora = {"variant": variant, "rank": 4, "alpha": 4}
        plan, trained = make_trained(tmp_path, lora=lora, **task)
        expected = logits(trained, tmp_path / "model")
        artifacts = tmp_path / "artifacts"
        run(plan, telemetry)
        kind, options = AutoModelForCausalLM, {}
        if not task:
            kind = AutoModelForSequenceClassification
            options = {"config": AutoConfig.from_pretrained(artifacts, subfolder="base_config")}
        base = kind.from_pretrained(tmp_path / "model", **options)
        assert difference(logits(base.eval(), tmp_path / "model"), expected) > 0.1
        assert difference(logits(PeftModel.from_pretrained(base, artifacts).eval(), artifacts), expected) < 1e-5
        assert f"{variant} (rank 4, alpha 4)" in (artifacts / "README.md").read_text()
        run(
            plan.model_copy(update={"output": plan.output.model_copy(update={"format": OutputFormat.MERGED})}),
            telemetry,
        )
        assert difference(logits(kind.from_pretrained(artifacts).eval(), artifacts), expected) < 1e-4

    @pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_llama])
    def test_is_merged_in_fp32_and_rounded_once_to_the_type_of_its_base(self, tmp_path, telemetry, save):
        save_in_bf16(save, tmp_path / "model")
        plan, trained = make_trained(tmp_path, **MERGED)
        run(plan, telemetry)
        artifacts = tmp_path / "artifacts"
        assert stored_types(artifacts / "model.safetensors") == {"BF16"}
        model = AutoModelForSequenceClassification.from_pretrained(artifacts).eval()
        assert model.dtype == torch.bfloat16
        whole = trained.merge_and_unload().state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, whole[name].to(torch.bfloat16)), name
        # computed in fp32, so that the difference is that of the rounded weights alone
        found, expected = logits(model.float(), artifacts), logits(trained.get_base_model(), tmp_path / "model")
        assert 0 < difference(found, expected) < 0.02
        assert "stored as bfloat16" in (artifacts / "README.md").read_text()

    def test_has_the_tokenizer_beside_it(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path, **GENERATION, **MERGED)
        run(plan, telemetry)
        ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("artifacts", "model"))
        assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids
        assert ours.chat_template == theirs.chat_template
        assert "local_files_only" not in (tmp_path / "artifacts" / "tokenizer_config.json").read_text()


class TestArtifacts:
    def test_are_described_by_the_result(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path)
        result = run(plan, telemetry)
        artifacts = tmp_path / "artifacts"
        assert result.outcome is Outcome.SUCCEEDED
        artifact = result.publish.artifact
        assert (artifact.uri, artifact.format) == ("pvc://sentiment/artifacts", "Adapter")
        assert artifact.sha256 == hashlib.sha256((artifacts / "SHA256SUMS").read_bytes()).hexdigest()
        assert artifact.size_bytes == sum(file.stat().st_size for file in artifacts.rglob("*") if file.is_file())
        assert telemetry.progress.fraction == 1

    def test_are_verified_by_sha256sum(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path)
        run(plan, telemetry)
        check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        good = subprocess.run(check, cwd=tmp_path / "artifacts", capture_output=True, text=True, check=True)
        listed = [line.removesuffix(": OK") for line in good.stdout.splitlines()]
        assert listed == sorted(listed)
        assert {"README.md", "adapter_model.safetensors", "base_config/config.json", "tokenizer.json"} <= set(listed)
        (tmp_path / "artifacts" / "README.md").write_text("other")
        bad = subprocess.run(check, cwd=tmp_path / "artifacts", capture_output=True, text=True, check=False)
        assert bad.returncode == 1
        assert "README.md: FAILED" in bad.stdout

    def test_do_not_tell_where_the_workspace_was(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path, **MERGED)
        run(plan, telemetry)
        for file in (tmp_path / "artifacts").rglob("*"):
            assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file

    def test_of_a_second_run_replace_those_of_the_first(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path)
        first = run(plan, telemetry).publish.artifact
        (tmp_path / "artifacts" / "left.txt").touch()
        assert run(plan, telemetry).publish.artifact == first
        assert not (tmp_path / "artifacts" / "left.txt").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "artifacts",
            "checkpoints",
            "data",
            "model",
            "report",
        ]

    def test_of_a_run_that_was_stopped_are_the_old_ones(self, tmp_path, telemetry):
        plan, _ = make_trained(tmp_path)
        first = run(plan, telemetry).publish.artifact
        telemetry.stop_requested.set()
        with pytest.raises(Interrupted):
            run(plan, telemetry)
        assert hashlib.sha256((tmp_path / "artifacts" / "SHA256SUMS").read_bytes()).hexdigest() == first.sha256
        assert not list(tmp_path.glob(".artifacts*"))

    @pytest.mark.parametrize(
        ("missing", "remedy"),
        [
            ("report/data.json", "run the earlier stages again"),
            ("report/evaluation.json", "run the earlier stages again"),
            ("checkpoints/best/best.json", "run train first"),
            ("data/manifest.json", "run prepare first"),
        ],
    )
    def test_need_what_the_earlier_stages_wrote(self, tmp_path, telemetry, missing, remedy):
        plan, _ = make_trained(tmp_path)
        (tmp_path / missing).unlink()
        with pytest.raises(StageError, match=remedy) as raised:
            run(plan, telemetry)
        assert raised.value.reason is Reason.STAGE_FAILED
        assert not (tmp_path / "artifacts").exists()


def test_the_command_publishes_to_a_folder(tmp_path):
    output = {"location": {"uri": "file://models/sentiment", "path": str(tmp_path / "models" / "sentiment")}}
    plan, _ = make_trained(tmp_path / "workspace", output=output)
    (tmp_path / "plan.json").write_text(plan.to_json())
    environment = os.environ | {
        "FINETUNE_TERMINATION_LOG": str(tmp_path / "log"),
        "FINETUNE_TELEMETRY_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "finetune_trainer", "publish", "--plan", str(tmp_path / "plan.json")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    for line in process.stdout.splitlines():
        assert json.loads(line)["level"] in ("info", "warning")
    artifact = Result.model_validate_json((tmp_path / "log").read_text()).publish.artifact
    assert artifact.uri == "file://models/sentiment"
    sums = (tmp_path / "models" / "sentiment" / "SHA256SUMS").read_bytes()
    assert hashlib.sha256(sums).hexdigest() == artifact.sha256
