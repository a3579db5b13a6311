"""`finetune run` judges a manifest as the API server does: tests/cluster/test_validation.py has the same table."""

import copy
import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.rules import InvalidManifestError, parse_job, parse_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.specs import CLASSIFICATION, EVERYTHING, INVALID, UNKNOWN_FIELDS, VALID, Invalid, Valid, manifest


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
        ("spec.training.lr", "unknown field; see `kubectl explain ftj --recursive` for those that exist"),
    ]
    changes = {"method": {"type": "Full", "lora": {}}, "training": {"epochs": 1, "maxSteps": 1}, "model.uri": "gpt2"}
    fields = [field for field, _ in findings(manifest(CLASSIFICATION, changes))]
    assert sorted(fields) == ["spec.method.lora", "spec.model.uri", "spec.training.maxSteps"]


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(list(_places(WHOLE))), value=JSON)
def test_whatever_is_written_in_a_field_the_answer_is_a_verdict(place: tuple[Any, ...], value: Any) -> None:
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
