"""Every example, those of the documents too, is what a cluster or `finetune run` accepts."""

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from finetune_api.constants import API_VERSION, KIND, Stage
from finetune_api.dataset import DatasetSpec
from finetune_api.rules import local_only, parse_job
from finetune_operator.layout import storage_used
from finetune_operator.manifest_file import read_job
from finetune_operator.render.pod import USER

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
QUICKSTART = EXAMPLES / "quickstart"
DATA = EXAMPLES / "financial-sentiment" / "data"
JOBS = [path for path in sorted(EXAMPLES.rglob("*.yaml")) if f"kind: {KIND}" in path.read_text()]

FRAGMENTS = [
    (page.name, block)
    for page in sorted((ROOT / "docs").glob("*.md"))
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]

CONFIG_MAP_BYTES = 2**20


def relative(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def test_there_are_examples_for_both_places():
    assert {relative(path) for path in JOBS} >= {"financial-sentiment/finetunejob.yaml", "quickstart/finetunejob.yaml"}


@pytest.mark.parametrize("path", JOBS, ids=relative)
def test_an_example_is_valid(path):
    job = read_job(path)
    in_cluster = local_only(job) == []
    assert in_cluster == ("file://" not in path.read_text())


def test_the_quickstart_needs_only_the_hub_and_its_config_map():
    spec = read_job(QUICKSTART / "finetunejob.yaml").spec
    assert spec.resources.gpus == 0
    used = [place for stage in Stage for place in storage_used(spec, stage)]
    assert len(used) == 4
    assert {secret for _, secret in used} == {None}
    sources = [*spec.dataset.sources, *spec.dataset.validation.sources, *spec.dataset.test.sources]
    assert [source.uri for source in sources] == [
        f"configmap://headlines/{name}.jsonl" for name in ("train", "validation", "test")
    ]
    files = list(DATA.iterdir())
    assert {f"configmap://headlines/{file.name}" for file in files} == {source.uri for source in sources}
    assert sum(file.stat().st_size for file in files) < CONFIG_MAP_BYTES
    labels = {json.loads(line)["label"] for file in files for line in file.read_text().splitlines()}
    assert labels == set(spec.dataset.labels)


def test_the_pod_for_copying_finds_the_workspace_of_the_quickstart():
    pod = yaml.safe_load((QUICKSTART / "artifact-pod.yaml").read_text())
    (volume,) = pod["spec"]["volumes"]
    job = read_job(QUICKSTART / "finetunejob.yaml").metadata["name"]
    assert volume["persistentVolumeClaim"] == {"claimName": f"{job}-workspace"}
    assert pod["spec"]["securityContext"]["runAsUser"] == USER


def test_the_readme_shows_a_job_that_a_cluster_accepts(tmp_path):
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"(?:^    .*\n|^\n)*^    kind: FineTuneJob\n(?:^    .*\n|^\n)*", text, re.MULTILINE)
    path = tmp_path / "readme.yaml"
    path.write_text(dedent(block))
    job = read_job(path)
    assert local_only(job) == []
    for place in (*job.spec.dataset.sources, job.spec.output):
        assert place.secret_ref is not None, f"{place.uri} asks for credentials"


@pytest.mark.parametrize(("page", "block"), FRAGMENTS)
def test_what_the_documents_show_of_a_spec_fits_one(page, block):
    shown = yaml.safe_load(block)
    dataset = {"sources": [{"uri": "s3://team/rows.jsonl"}], **shown.pop("dataset", {})}
    spec = {"task": "Classification", "model": {"uri": "hf://acme/encoder"}, "dataset": dataset, **shown}
    parse_job({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "shown"}, "spec": spec})


def test_the_documents_show_all_that_a_dataset_has():
    shown = {key for _, block in FRAGMENTS for key in yaml.safe_load(block).get("dataset", {})}
    names = {field.alias for field in DatasetSpec.model_fields.values()}
    assert names - shown == {"sources", "maxRejected"}  # they stand in the README
