"""`finetune run` judges a manifest as the API server does: tests/cluster/test_validation.py has the same table."""

import copy
import datetime
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from finetune_api.rules import InvalidManifestError, local_only, parse_job, parse_spec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.specs import CLASSIFICATION, EVERYTHING, VALID, Invalid, Valid, manifest
from tests.specs_against_rules import INVALID, UNKNOWN_FIELDS


def by_name(case: Valid) -> str:
    return case.name


def findings(job: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(InvalidManifestError) as caught:
        parse_job(job)
    return [(finding.field, finding.message) for finding in caught.value.findings]


@pytest.mark.parametrize("case", VALID, ids=by_name)
def test_valid(case: Valid) -> None:
    job = parse_job(case.manifest)
    assert parse_job(job.to_dict()) == job
    assert parse_spec(job.spec.to_dict()) == job.spec


@pytest.mark.parametrize("case", [c for c in INVALID + UNKNOWN_FIELDS if not c.cluster_only], ids=by_name)
def test_invalid(case: Invalid) -> None:
    found = findings(case.manifest)
    assert any(
        (case.field == field or case.field.startswith(f"{field}[")) and (case.our_words or case.words) in message
        for field, message in found
    ), found


@pytest.mark.parametrize("case", [c for c in INVALID if c.cluster_only], ids=by_name)
def test_local_files_are_for_local_runs(case: Invalid) -> None:
    assert parse_job(case.manifest).spec.task == "Classification"


def test_several_mistakes_are_told_at_once() -> None:
    assert findings(manifest(CLASSIFICATION, {"training": {"epochs": "three", "lr": 1}, "task": "Chat"})) == [
        ("spec.task", "input should be 'Classification' or 'Generation', found \"Chat\""),
        ("spec.training.epochs", 'input should be a valid number, found "three"'),
        ("spec.training.lr", "unknown field; `kubectl explain ftj.spec.training` tells those that exist"),
    ]
    changes = {"method": {"type": "Full", "lora": {}}, "training": {"epochs": 1, "maxSteps": 1}, "model.uri": "gpt2"}
    fields = [field for field, _ in findings(manifest(CLASSIFICATION, changes))]
    assert sorted(fields) == ["spec.method.lora", "spec.model.uri", "spec.training.maxSteps"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.uri": "owner/name"}, r'^found "owner/name", expected one of hf://.*; did you mean hf://owner/name\?$'),
        ({"dataset.sources": [{"uri": "data/a.csv"}]}, r'^found "data/a.csv", expected one of .*to the manifest$'),
        ({"dataset.labels": [False, "yes"]}, "found false; quote it: YAML reads no as false$"),
        ({"dataset.labels": ["no", True]}, "found true; quote it: YAML reads yes as true$"),
        ({"dataset.labels": [199, "200"]}, "found 199; quote it$"),
        ({"resources.limits": {"cpu": 1.5}}, "^expected a Kubernetes quantity such as 500m or 16Gi, found 1.5; quote it$"),
        ({"dataset.sources": [{"uri": "s3://a/b", "format": "jsonl"}]}, "the file type follows from the name$"),
        ({"dataset.sources": "s3://a/b"}, '^expected a list, found "s3://a/b"$'),
        ({"dataset.sources": ["s3://a/b"]}, '^expected a mapping, found "s3://a/b"; write {uri: s3://a/b}$'),
        ({"resources.limits": ["4Gi"]}, r'^expected a mapping, found \["4Gi"\]$'),
        ({"training.batchSize": 16}, "^expected a mapping, found 16; write {sequences: 16}$"),
        ({"dataset.validation": 0.1}, "^expected a mapping, found 0.1; write {fraction: 0.1}$"),
        ({"method": "Full"}, '^expected a mapping, found "Full"; write {type: Full}$'),
        ({"training.learning_rate": 1}, r"^unknown field; did you mean learningRate\?$"),
        ({"dataset.sources": [{"uri": "s3://a/b", "colums": {}}]}, r"^unknown field; did you mean columns\?$"),
        ({"dataset.sources": [{"uri": "s3://a/b", "xyz": {}}]}, "^unknown field; `kubectl explain ftj.spec.dataset.sources`"),
        ({".specification": {}}, "^unknown field; "),
        ({"task": "a\u202eb"}, r'found "a\\u202eb"$'),
    ],
)  # fmt: skip
def test_a_message_says_what_was_meant(changes: dict[str, Any], message: str) -> None:
    ((_, found),) = findings(manifest(CLASSIFICATION, changes))
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "changes",
    [
        {"model.uri": "ftp://me:hush@host/file"},
        {"model": "https://me:hush@host/file"},
        {"model.uri": "https://me:hush@host/" + "x" * 1024},
        {"model.secretRef": "hush"},
        {"model.secretRef": {"hush": 1}},
        {"model.secretRef.name": "Secret: hush"},
    ],
)
def test_no_message_repeats_a_secret(changes: dict[str, Any]) -> None:
    messages = [message for _, message in findings(manifest(CLASSIFICATION, changes))]
    assert "hush" not in "".join(messages)


def test_what_a_cluster_would_refuse_is_told_by_field() -> None:
    job = parse_job(
        manifest(CLASSIFICATION, {"model.uri": "file://m", "dataset.test.sources": [{"uri": "file://t.csv"}]})
    )
    assert [finding.field for finding in local_only(job)] == ["spec.model.uri", "spec.dataset.test.sources[0].uri"]
    assert all("in a cluster use pvc://" in finding.message for finding in local_only(job))
    assert local_only(parse_job(WHOLE)) == []


def test_a_finding_reads_as_a_sentence() -> None:
    with pytest.raises(InvalidManifestError, match=r"^spec\.model: is required$"):
        parse_job({**manifest(CLASSIFICATION, {}), "spec": {k: v for k, v in CLASSIFICATION.items() if k != "model"}})


@pytest.mark.parametrize("metadata", [{}, {"name": 7}, {"name": ""}, {"generateName": "a-"}])
def test_a_job_needs_a_name(metadata: dict[str, Any]) -> None:
    ((field, message),) = findings({**manifest(CLASSIFICATION, {}), "metadata": metadata})
    assert field == "metadata.name"
    assert "the name must begin with a letter" in message


@pytest.mark.parametrize("key", ["apiVersion", "kind"])
def test_another_kind_of_object(key: str) -> None:
    assert [field for field, _ in findings({**manifest(CLASSIFICATION, {}), key: "v1"})] == [key]


def test_values_as_yaml_gives_them() -> None:
    changes = {"training": {"maxSteps": 100.0, "weightDecay": 0}, "model.revision": datetime.date(2026, 11, 24)}
    spec = parse_job(manifest(CLASSIFICATION, changes)).spec
    assert (spec.training.max_steps, spec.training.weight_decay) == (100, 0.0)
    assert spec.model.revision == "2026-11-24"


def test_a_status_in_the_manifest_is_ignored() -> None:
    assert parse_job({**manifest(CLASSIFICATION, {}), "status": {"phase": "Nonsense"}}).status is None


def test_a_stored_spec_of_another_version_is_told_apart() -> None:
    with pytest.raises(InvalidManifestError, match=r"spec\.teacher: unknown field"):
        parse_spec({**CLASSIFICATION, "teacher": {}})


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[key], (*path, key))


WHOLE = manifest(CLASSIFICATION, EVERYTHING)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def any_verdict(examples: int) -> Callable[[], None]:
    """A test that puts so many random values into places of a manifest."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(place=st.sampled_from(list(_places(WHOLE))), value=JSON)
    @example(place=("metadata", "name"), value=2**63)
    @example(place=("metadata", "name"), value=10**400)
    def answer(place: tuple[Any, ...], value: Any) -> None:
        job = copy.deepcopy(WHOLE)
        parent = job
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        try:
            parse_job(job)
        except InvalidManifestError as error:
            assert error.findings
            assert all(finding.message for finding in error.findings)

    return answer


def test_whatever_is_written_in_a_field_the_answer_is_a_verdict() -> None:
    any_verdict(150)()


@pytest.mark.long
def test_the_answer_to_very_many_values_is_a_verdict() -> None:
    any_verdict(10_000)()
