"""The model card: the evidence in words that people, the hub and Python understand."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from finetune_api.constants import Stage
from finetune_api.plan import JobReference
from finetune_api.report import ConflictReport, DecisionReport, LabellingReport, ReviewReport
from finetune_api.status import GateResult
from finetune_trainer.publish.card import model_card, software_versions
from finetune_trainer.publish.run import run
from finetune_trainer.telemetry import Telemetry
from hypothesis import given
from hypothesis import strategies as st

from tests.plans import make_plan
from tests.unit.trainer.trained_workspace import (
    GENERATION,
    LABELS,
    REVISION,
    data_report,
    evaluation_report,
    make_trained,
)

VERSIONS = {"python": "3.11.1", "torch": "2.13.0"}


def card(labels=LABELS, *, scores=None, dtype=torch.float32, labelling=None, review=None, found=None, **changes) -> str:
    plan = make_plan(Path("/workspace"), Stage.PUBLISH, **changes)
    data = data_report(labels).model_copy(update={"labelling": labelling, "review": review})
    assert data.model is not None
    evaluation = scores or evaluation_report(labels)
    return model_card(plan, data, evaluation, model=found or data.model, best_step=20, dtype=dtype, versions=VERSIONS)


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


class TestMetadata:
    def test_of_an_adapter(self):
        assert metadata(card()) == {
            "base_model": "owner/base",
            "library_name": "peft",
            "pipeline_tag": "text-classification",
            "metrics": ["f1", "accuracy"],
            "tags": ["finetune-operator", "lora"],
        }

    def test_of_a_complete_generator(self):
        text = card(None, method="Full", lora=None, output={"format": "Merged"}, **GENERATION)
        assert metadata(text) == {
            "base_model": "owner/base",
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "metrics": ["perplexity"],
            "tags": ["finetune-operator"],
        }

    def test_names_no_base_that_the_hub_does_not_have(self):
        text = card(model={"location": {"uri": "pvc://models/bert"}})
        assert "base_model" not in metadata(text)
        assert "`pvc://models/bert`" in text


class TestContent:
    def test_says_which_labels_no_person_gave_and_which_contradict_each_other(self):
        conflicts = ConflictReport(groups=2, rows=1234, held_out_rows=0, rows_dropped=0)
        text = card(
            labelling=LabellingReport(weak_rows={"test": 7, "validation": 0, "train": 4010}, conflicts=conflicts)
        )
        assert "given by rules and not by people: 7 of test, 4,010 of train." in text
        assert "1,234 rows have a text that stands there with another label, too." in text
        sound = LabellingReport(conflicts=ConflictReport(groups=0, rows=0, held_out_rows=0, rows_dropped=0))
        assert card(labelling=sound) == card()

    def test_says_what_became_of_wrong_labels(self):
        found = ReviewReport(judged_rows=9000, suspicious_rows=1234, exported_rows=1000)
        assert "label is probably wrong: 1,234; they count like others." in card(review=found)
        decisions = DecisionReport(files={}, corrected=1500, confirmed=3, dropped=2, held_out=0, unknown=0, undecided=0)
        text = card(review=found.model_copy(update={"suspect_weight": 0.25, "decisions": decisions}))
        assert "they count 0.25 in the loss. People corrected 1,500 labels and dropped 2 rows." in text

    def test_says_which_weights_were_trained(self):
        head_first = {"epochs": 0.5, "learning_rate": 0.001}
        settings = rows(card(method="Full", lora=None, last_layers=2, head_first=head_first))
        assert ["method", "Full"] in settings
        assert ["trained layers", "the last 2, the final norm and the head"] in settings
        assert ["head alone first", "0.5 epochs, learning rate 0.001"] in settings
        names = [row[0] for row in rows(card())]
        assert not {"trained layers", "head alone first", "early stopping"} & set(names)

    def test_says_that_it_was_tuned_to_preferences(self):
        text = card(None, **GENERATION | {"dpo": {"beta": 0.25}, "evaluation": {"metrics": ["rewardAccuracy", "loss"]}})
        assert metadata(text)["tags"] == ["finetune-operator", "lora", "dpo"]
        assert metadata(text)["metrics"] == [], "the hub knows none of them"
        assert ["preference loss", "DPO, beta 0.25"] in rows(text)
        assert "rewardAccuracy is the share of pairs whose better answer has the higher reward" in text

    def test_says_that_it_was_trained_beside_quantised_weights(self):
        text = card(lora={"quantization": "NF4"})
        assert ["quantization while training", "NF4"] in rows(text)
        assert "trained and scored beside foundation weights in NF4" in text
        assert "NF4" not in card()

    def test_says_which_adapter_it_went_on_from(self):
        text = card(model={"adapter": {"uri": "https://me:hush@host/adapter?signature=hush"}})
        assert ["started from the adapter", "`https://host/adapter`"] in rows(text)
        assert "hush" not in text

    def test_says_when_training_would_end_early(self):
        settings = {"patience": 3, "minimum_improvement": 0.01}
        text = card(training={"early_stopping": settings})
        assert ["early stopping", "patience 3, minimum improvement 0.01"] in rows(text)

    def test_says_what_it_is(self):
        text = card()
        assert "# sentiment\n" in text
        assert f"`owner/base` at revision `{REVISION}` (BertModel, 1,234,567 parameters)" in text
        assert "LoRA (rank 4, alpha 8)" in text

    def test_compares_the_scores_with_the_baseline(self):
        text = card()
        assert "On the test split (99 rows)." in text
        assert ["macroF1", "0.9123", "0.25"] in rows(text)
        assert ["Metric", "Tuned", "Baseline (majority class)"] in rows(text)
        assert ["negative", "0.9", "0.8", "0.847", "33"] in rows(text)
        assert "Gate passed: macroF1 0.9123 is at least 0.8" in text

    def test_shows_the_confusion_matrix_with_true_classes_as_rows(self):
        table = rows(card())
        start = table.index(["", *LABELS])
        assert table[start + 2] == ["negative", "30", "0", "0"]
        assert table[start + 4] == ["positive", "2", "2", "30"]

    def test_leaves_a_confusion_matrix_that_nobody_could_read_to_the_report(self):
        many = [f"label {number}" for number in range(40)]
        text = card(many)
        assert "confusion matrix of the 40 classes is in `evaluation.json`" in text
        assert ["", *many] not in rows(text)
        assert [many[39], "0.9", "0.8", "0.847", "33"] in rows(text)

    def test_traces_the_data_to_its_files(self):
        text = card()
        source = ["dataset.sources\\[0\\]", "`s3://bucket/train.csv`", "LabelledText", "105", "5", f"`{'b' * 64}`"]
        assert source in rows(text)
        assert f"`{'f' * 64}`" in text
        assert ["train", "90"] in rows(text)
        assert not any(row[0] == "test" for row in rows(text))
        assert ["neutral", "30", "0"] in rows(text)
        assert ["no label", "3"] in rows(text)

    def test_lists_every_setting_that_makes_the_weights(self):
        settings = dict(row for row in rows(card()) if len(row) == 2)
        expected = {
            "LoRA dropout": "0.0",
            "LoRA target modules": "all linear layers of the transformer blocks",
            "epochs": "2.0",
            "published step": "20",
            "learning rate": "0.001",
            "schedule": "Cosine",
            "warm-up ratio": "0.1",
            "batch size": "8 sequences",
            "longest row in tokens": "64",
            "precision": "fp32",
            "weight decay": "0.01",
            "gradient clipping norm": "1.0",
            "seed": "7",
            "torch": "2.13.0",
        }
        assert expected.items() <= settings.items()
        assert "maximum steps" not in settings

    def test_shows_other_settings_where_they_are_set(self):
        training = {"epochs": None, "max_steps": 500, "batch_sequences": None, "batch_tokens": 4096}
        settings = dict(
            row for row in rows(card(training=training, lora={"target_modules": ["q_proj", "v_proj"]})) if len(row) == 2
        )
        assert settings["maximum steps"] == "500"
        assert settings["batch size"] == "4096 tokens"
        assert settings["LoRA target modules"] == "q\\_proj, v\\_proj"
        assert "epochs" not in settings

    def test_says_that_the_scores_are_those_before_rounding(self):
        merged = {"output": {"format": "Merged"}}
        assert "stored as bfloat16" in card(dtype=torch.bfloat16, **merged)
        assert "before they were rounded" in card(dtype=torch.bfloat16, **merged)
        assert "rounded" not in card(**merged)

    def test_says_that_a_gate_was_missed(self):
        missed = evaluation_report(LABELS).model_copy(update={"gate": GateResult(passed=False, message="too low")})
        assert "Gate not passed: too low" in card(scores=missed)

    def test_is_the_same_every_time(self):
        assert card() == card()

    @given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=4, unique=True))
    def test_keeps_its_tables_whatever_the_labels_are(self, labels):
        text = card(labels)
        assert metadata(text)["base_model"] == "owner/base"
        plain = card([f"label{number}" for number in range(len(labels))])
        assert [len(row) for row in rows(text)] == [len(row) for row in rows(plain)]
        assert text.count("\n## ") == plain.count("\n## ")

    def test_shows_markup_in_a_label_as_text(self):
        text = card(["<b>", "a|b", "`code`\n# head"])
        assert "\\<b\\>" in text
        assert "a\\|b" in text
        assert "\n# head" not in text

    def test_shows_text_of_others_as_text_and_nothing_of_it_is_hidden(self):
        model = data_report(LABELS).model.model_copy(update={"architecture": "<img src=x>[a](javascript:b)"})
        text = card(["&lt;b&gt;", "a\x1b[31m", "b\u202ea"], found=model)
        assert "(\\<img src=x\\>\\[a\\](javascript:b), " in text
        assert "\\&lt;b\\&gt;" in text
        assert not {"\x1b", "\u202e"} & set(text)

    def test_its_python_takes_a_name_for_no_more_than_a_name(self):
        name = 'owner/x");__import__("os").abort();("'
        text = card(model={"location": {"uri": f"hf://{name}"}})
        code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
        assert code is not None
        calls = [node for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Call)]
        assert not {"__import__", "abort"} & {
            getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls
        }
        assert name in [node.value for call in calls for node in call.args if isinstance(node, ast.Constant)]


def test_the_measured_memory_stands_beside_what_was_expected():
    device = {"estimated_memory_bytes": 3 * 2**30, "peak_memory_bytes": 5 * 2**29}
    assert "Training held at most 2.50 GiB; 3.00 GiB were expected." in card(device=device)
    assert "GiB" not in card()


def test_versions_are_those_that_are_installed():
    versions = software_versions()
    assert versions["torch"] == torch.__version__
    assert {"python", "finetune-operator", "transformers", "peft", "tokenizers", "safetensors"} <= set(versions)


@pytest.mark.parametrize("output", ["Adapter", "Merged"])
@pytest.mark.parametrize("task", [{}, GENERATION])
def test_its_python_loads_the_model(tmp_path, monkeypatch, output, task):
    plan, trained = make_trained(tmp_path, output={"format": output}, **task)
    run(plan, Telemetry(Stage.PUBLISH, JobReference(namespace="team", name="sentiment", uid="1"), port=0))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "artifacts" / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "artifacts"))
    code = code.replace("owner/base", str(tmp_path / "model"))  # no hub here
    names: dict = {}
    exec(code, names)
    batch = names["tokenizer"](["profit rises"], return_tensors="pt")
    with torch.no_grad():
        found, expected = (model(input_ids=batch["input_ids"]).logits for model in (names["model"], trained))
    assert torch.allclose(found, expected, atol=1e-4)


def test_quotes_the_reports_that_lie_beside_it(tmp_path):
    plan, _ = make_trained(tmp_path)
    run(plan, Telemetry(Stage.PUBLISH, JobReference(namespace="team", name="sentiment", uid="1"), port=0))
    evaluation = json.loads((tmp_path / "artifacts" / "evaluation.json").read_text())
    assert evaluation == evaluation_report(LABELS).to_dict()
    assert "0.9123" in (tmp_path / "artifacts" / "README.md").read_text()
