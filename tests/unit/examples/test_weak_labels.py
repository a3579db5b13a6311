"""The example of weak labels: its rules, on its data, do what its page says."""

import json
import re
from pathlib import Path

import pytest
from finetune_api.constants import Stage
from finetune_api.dataset import DataFormat
from finetune_api.plan import JobReference
from finetune_api.status import FineTuneJobStatus
from finetune_operator.local import LocalLayout
from finetune_operator.manifest_file import read_job
from finetune_operator.observed import Key, Resource
from finetune_operator.plans import build_plan
from finetune_trainer.data.decide import decide
from finetune_trainer.data.label_rules import LabelRules
from finetune_trainer.data.labelling import elected, label_rules
from finetune_trainer.data.pipeline import Rows, Survey, open_sources, read_all
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.spool import Spool
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch

EXAMPLES = Path(__file__).parents[3] / "examples"
EXAMPLE = EXAMPLES / "weak-labels"
DEMO = EXAMPLES / "financial-sentiment" / "data"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    spec = read_job(EXAMPLE / "finetunejob.yaml").spec
    resource = Resource(Key("default", "weak-labels"), "0001", 1, False, {}, FineTuneJobStatus())
    return build_plan(resource, spec, Stage.PREPARE, LocalLayout(tmp_path_factory.mktemp("run"), EXAMPLE)).dataset


@pytest.fixture(scope="module")
def prepared(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    watch = Watch(Telemetry(Stage.PREPARE, JobReference(namespace="n", name="j", uid="u")), "Reading", 0, 1)
    survey = Survey()
    with Spool(folder / "spool") as spool, Quarantine(folder / "quarantine.jsonl") as quarantine:
        rows = Rows(open_sources(dataset, [DataFormat.LABELLED_TEXT], folder, watch), spool)
        read_all(rows, dataset, quarantine, survey, watch)
        decide(rows, dataset, quarantine, survey)
    return survey, quarantine.counts


def read_page() -> str:
    return " ".join((EXAMPLE / "README.md").read_text().replace(",", "").split())


def labelled(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / f"{split}.jsonl").read_text().splitlines()]


def test_the_headlines_are_those_of_the_demo():
    assert (EXAMPLE / "headlines.txt").read_text().splitlines() == [row["text"] for row in labelled("train")]


def test_the_page_has_the_figures_of_the_report(prepared):
    survey, _ = prepared
    table = re.findall(r"^\| ([a-z-]+) \| (\d.*) \|$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    found = {
        name: [str(value) for value in rule.to_dict().values()]
        for name, rule in survey.log.labelling.rules.report().items()
    }
    assert {name: cells.split(" | ") for name, cells in table} == found


def test_the_page_says_what_the_rules_label(prepared):
    survey, left_out = prepared
    labels = survey.labels["train"]
    assert set(survey.labels["train"]) == {"negative", "neutral", "positive"}
    page = read_page()
    assert f"{labels.total()} of the 1797 headlines get one: {labels['negative']} negative" in page
    assert (
        f"{labels['neutral']} neutral {labels['positive']} positive. For {left_out['no rule labels it']} no rule votes"
        in page
    )
    assert f"and {left_out['rules disagree']} times two labels" in page
    assert survey.weak == {"train": labels.total(), "validation": 0, "test": 0}


def test_the_page_says_how_good_the_rules_are_on_test(dataset):
    rules = LabelRules(label_rules(dataset))
    given = [(elected(rules.votes(row["text"], {})), row["label"]) for row in labelled("test")]
    found = [(label, truth) for label, truth in given if isinstance(label, str)]
    right = sum(label == truth for label, truth in found)
    assert f"a label for {len(found)} of the test headlines and it is right for {right} of these" in read_page()
