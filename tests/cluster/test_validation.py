"""The API server's judgement of FineTuneJobs, by the table that `finetune run` is tested with too."""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.constants import GROUP, PLURAL, VERSION, Phase
from finetune_api.rules import parse_job
from kubernetes import client, config

from tests.cluster import kit
from tests.spec_updates import UPDATES, Update
from tests.specs import CLASSIFICATION, VALID, Invalid, Valid, manifest
from tests.specs_against_rules import INVALID, UNKNOWN_FIELDS
from tests.statuses import full_status


class Judge:
    """Asks the API server; nothing is stored unless a method says so."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._api = client.CustomObjectsApi(config.new_client_from_config())
        self._where = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}

    def create(self, job: dict[str, Any], dry_run: bool = True) -> dict[str, Any]:
        options = {"dry_run": "All"} if dry_run else {}
        return self._api.create_namespaced_custom_object(**self._where, body=job, field_validation="Strict", **options)

    def store(self, job: dict[str, Any]) -> str:
        """Really creates the job, under a name of its own."""
        name = f"job-{secrets.token_hex(4)}"
        self.create({**job, "metadata": {**job["metadata"], "name": name}}, dry_run=False)
        return name

    def update(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        patch = [{"op": "add", "path": "/spec", "value": job["spec"]}]
        patch += [
            {"op": "add", "path": f"/metadata/{key}", "value": value}
            for key, value in job["metadata"].items()
            if key != "name"
        ]
        return self._api.patch_namespaced_custom_object(
            **self._where, name=name, body=patch, dry_run="All", _content_type="application/json-patch+json"
        )

    def report(self, name: str, status: dict[str, Any], **others: Any) -> dict[str, Any]:
        """Writes to the status subresource."""
        return self._api.patch_namespaced_custom_object_status(
            **self._where, name=name, body={"status": status, **others}, dry_run="All", field_validation="Strict"
        )

    def refusal(self, **request: Any) -> list[tuple[str, str]]:
        """Fields and messages of the answer to a request that must fail: the name of a method and its arguments."""
        ((method, arguments),) = request.items()
        with pytest.raises(client.ApiException) as caught:
            getattr(self, method)(*arguments)
        assert caught.value.status in (400, 422)
        answer = json.loads(caught.value.body)
        causes = (answer.get("details") or {}).get("causes") or [{"message": answer["message"]}]
        return [(cause.get("field", ""), cause["message"]) for cause in causes]


@pytest.fixture(scope="module")
def judge(crd: None) -> Iterator[Judge]:
    name = f"validation-{secrets.token_hex(2)}"
    kit.apply(kit.restricted_namespace(name))
    yield Judge(name)
    kit.kubectl("delete", "namespace", name, "--wait=false")


def by_name(case: Valid | Update) -> str:
    return case.name


@pytest.mark.parametrize("case", VALID, ids=by_name)
def test_a_valid_job_is_accepted_and_gets_the_defaults_of_finetune_run(judge: Judge, case: Valid) -> None:
    stored = judge.create(case.manifest)["spec"]
    if case.name != "numbers for quantities":  # which we read as strings
        assert stored == parse_job(case.manifest).spec.to_dict()


@pytest.mark.parametrize("case", INVALID, ids=by_name)
def test_an_invalid_job_is_refused_with_field_and_reason(judge: Judge, case: Invalid) -> None:
    findings = judge.refusal(create=[case.manifest])
    place = case.servers_field or case.field
    assert any(field == place and case.words in message for field, message in findings), findings


@pytest.mark.parametrize("case", UNKNOWN_FIELDS, ids=by_name)
def test_an_unknown_field_is_refused_rather_than_dropped(judge: Judge, case: Invalid) -> None:
    assert any(case.words in message for _, message in judge.refusal(create=[case.manifest]))


@pytest.mark.parametrize("case", UPDATES, ids=by_name)
def test_after_creation_only_suspend_and_limits_change(judge: Judge, case: Update) -> None:
    at_rest = {"suspend": True}  # an operator that is there shall not start all these jobs
    name = judge.store(manifest(CLASSIFICATION, {**at_rest, **case.before}))
    after = manifest(CLASSIFICATION, {**at_rest, **case.after})
    if case.field:
        findings = judge.refusal(update=[name, after])
        refused = [field for field, message in findings if "cannot be changed after creation" in message]
        assert refused == [case.field], findings
    else:
        judge.update(name, after)


def test_several_mistakes_are_told_at_once(judge: Judge) -> None:
    changes = {"method": {"type": "Full", "lora": {}}, "training": {"epochs": 1, "maxSteps": 1}, "model.uri": "gpt2"}
    fields = {field for field, _ in judge.refusal(create=[manifest(CLASSIFICATION, changes)])}
    assert {"spec.method.lora", "spec.training.maxSteps", "spec.model.uri"} <= fields


def test_spec_and_status_are_written_apart(judge: Judge) -> None:
    name = judge.store(manifest(CLASSIFICATION, {"suspend": True}))
    status = full_status().to_dict()
    reported = judge.report(name, status, spec={"suspend": False})
    assert reported["status"] == status
    assert reported["spec"]["suspend"] is True
    created = judge.create(manifest(CLASSIFICATION, {".status": {"phase": Phase.SUCCEEDED}}))
    assert created["status"] == {"observedGeneration": -1}, "to tools that wait, nothing is done yet"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("phase", "Done", "Unsupported value"),
        ("progress.percentage", 101, "less than or equal to 100"),
        ("metrics.trainingLoss", 0.5, "must be of type string"),
        ("metrics.trainingLoss", "high", "should match"),
        ("startTime", "yesterday", "should match"),
        ("failure.reason", "BadLuck", "Unsupported value"),
        ("message", "x" * 2049, "may not be more than 2048 bytes"),
    ],
)
def test_a_status_that_programs_could_not_read_is_refused(judge: Judge, path: str, value: Any, words: str) -> None:
    name = judge.store(manifest(CLASSIFICATION, {"suspend": True}))
    status = manifest({}, {f".status.{key}": part for key, part in full_status().to_dict().items()})["status"]
    status = manifest({}, {".status": status, f".status.{path}": value})["status"]
    findings = judge.refusal(report=[name, status])
    assert any(field == f"status.{path}" and words in message for field, message in findings), findings


def test_one_condition_of_each_type(judge: Judge) -> None:
    name = judge.store(manifest(CLASSIFICATION, {"suspend": True}))
    status = full_status().to_dict()
    status["conditions"] *= 2
    assert any("Duplicate value" in message for _, message in judge.refusal(report=[name, status]))


def test_kubectl_shows_the_job(judge: Judge) -> None:
    name = judge.store(manifest(CLASSIFICATION, {"suspend": True, "resources.gpus": 1}))

    def table(*arguments: str) -> list[str]:
        return kit.kubectl("-n", judge.namespace, "get", *arguments).splitlines()

    header, row = table("ftj", name)
    assert header.split() == ["NAME", "PHASE", "PROGRESS", "METRIC", "ETA", "AGE"]
    assert row.split()[0] == name
    header, row = table("finetunejob", name, "-o", "wide")
    columns = ["NAME", "PHASE", "PROGRESS", "METRIC", "ETA", "MODEL", "METHOD", "ATTEMPT", "GPUS", "MESSAGE", "AGE"]
    assert header.split() == columns
    assert CLASSIFICATION["model"]["uri"] in row.split()
    assert f"finetunejob.{GROUP}/{name}" in table("all", "-o", "name")


def test_kubectl_explains_every_field(crd: None) -> None:
    def explained(path: str) -> str:
        return kit.kubectl("explain", f"ftj.{path}")

    assert "<empty>" not in kit.kubectl("explain", "ftj", "--recursive")
    text = explained("spec.method.type")
    for part in ("small adapters beside frozen weights", "ENUM:\n    LoRA\n    Full\n    Head"):
        assert part in text
    assert "Rank of the update matrices" in explained("spec.method.lora")
    assert "Dropout on the adapter's input" in explained("spec.method.lora.dropout")
    assert "Why the job failed" in explained("status")
