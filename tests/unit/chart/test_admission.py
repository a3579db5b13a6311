"""The chart's admission policy: which jobs it lets in, by its own expressions, and what it says of the others."""

from typing import Any

import celpy
import pytest

from tests.specs import CLASSIFICATION, EVERYTHING, GENERATION, Changes, manifest
from tests.unit.chart.test_chart import helm, needs_helm, render

pytestmark = needs_helm

POLICY = {
    "enabled": True,
    "modelUris": ["hf://our-company/", "pvc://models/"],
    "dataUris": ["s3://eu-data/", "configmap://"],
    "outputUris": ["s3://eu-results/"],
    "remoteCode": False,
    "maxGpus": 8,
}
LAWFUL: Changes = {
    "model": {"uri": "hf://our-company/encoder"},
    "dataset": {"sources": [{"uri": "s3://eu-data/train.csv"}, {"uri": "configmap://rows/a.csv"}]},
}


def policy(**changes: Any) -> dict[str, Any]:
    objects = render({"admission": POLICY | changes})
    return objects["ValidatingAdmissionPolicy", "finetune-operator"]["spec"]


def evaluate(expression: str, activation: dict[str, Any]) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions={"join": _join}).evaluate(activation)


def _join(parts: Any, between: Any) -> Any:
    """Of Kubernetes' CEL library, which celpy has not."""
    return celpy.celtypes.StringType(str(between).join(map(str, parts)))


def refusals(spec: dict[str, Any], job: dict[str, Any]) -> list[str]:
    """What the API server would say."""
    variables: Any = celpy.celtypes.MapType()
    activation = {"object": celpy.json_to_cel(job), "variables": variables}
    for one in spec["variables"]:
        variables[celpy.celtypes.StringType(one["name"])] = evaluate(one["expression"], activation)
    return [
        str(one.get("message") or evaluate(one["messageExpression"], activation))
        for one in spec["validations"]
        if not evaluate(one["expression"], activation)
    ]


def test_jobs_within_the_bounds_are_let_in() -> None:
    assert refusals(policy(), manifest(CLASSIFICATION, LAWFUL)) == []
    assert refusals(policy(), manifest(GENERATION, LAWFUL | {"resources": {"gpus": 4, "nodes": 2}})) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.uri": "hf://stranger/encoder"}, "spec.model: hf://stranger/encoder is not allowed in this cluster"),
        ({"model.uri": "hf://our-company-of-thieves/x"}, "begins with hf://our-company/ or pvc://models/"),
        ({"model.adapter": {"uri": "s3://elsewhere/adapter"}}, "spec.model: s3://elsewhere/adapter"),
        ({"dataset.sources": [{"uri": "s3://eu-data/a"}, {"uri": "s3://us-data/b"}]}, "spec.dataset: s3://us-data/b"),
        ({"dataset.validation": {"sources": [{"uri": "https://host/v.csv"}]}}, "spec.dataset: https://host/v.csv"),
        ({"dataset.test": {"sources": [{"uri": "https://host/t.csv"}]}}, "spec.dataset: https://host/t.csv"),
        ({"dataset.review": {"decisions": [{"uri": "https://host/r.csv"}]}}, "spec.dataset: https://host/r.csv"),
        ({"output": {"uri": "s3://us-results/x"}}, "spec.output: s3://us-results/x"),
        ({"model.trustRemoteCode": True}, "spec.model.trustRemoteCode: code of models"),
        ({"model.allowPickle": True}, "spec.model.allowPickle: pickle files"),
        ({"resources": {"gpus": 5, "nodes": 2}}, "spec.resources: 10 GPUs on all nodes together"),
        ({"resources": {"gpuMemory": "80Gi", "nodes": 2}}, "spec.resources: 16 GPUs"),
    ],
)
def test_what_is_out_of_bounds_is_refused_and_named(changes: Changes, words: str) -> None:
    (said,) = refusals(policy(), manifest(CLASSIFICATION, LAWFUL | changes))
    assert words in said


def test_a_bound_that_is_not_set_is_none() -> None:
    free = policy(modelUris=[], dataUris=[], outputUris=[], remoteCode=True, maxGpus=0)
    assert refusals(free, manifest(CLASSIFICATION, EVERYTHING)) == []
    assert len(free["validations"]) == 3


def test_it_holds_where_the_operator_works_and_is_off_by_default() -> None:
    assert not any(kind.startswith("ValidatingAdmission") for kind, _ in render())
    binding = "ValidatingAdmissionPolicyBinding", "finetune-operator"
    watched = render({"admission": POLICY, "watchNamespaces": ["a", "b"]})[binding]["spec"]
    assert watched["validationActions"] == ["Deny"]
    (expression,) = watched["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert expression["values"] == ["a", "b"]
    labelled = {"namespaceSelector": {"matchLabels": {"region": "eu"}}, "actions": ["Warn", "Audit"]}
    chosen = render({"admission": POLICY | labelled})[binding]["spec"]
    assert chosen["matchResources"]["namespaceSelector"] == labelled["namespaceSelector"]
    assert chosen["validationActions"] == ["Warn", "Audit"]


@pytest.mark.parametrize(
    "changes",
    [
        {"modelUris": ["hf://our-company"]},
        {"dataUris": ["ftp://host/"]},
        {"outputUris": ['s3://"]/']},
        {"actions": ["Deny", "Warn"]},
        {"maxGpus": -1},
    ],
)
def test_values_that_would_not_do_what_they_seem_to_are_refused(changes: dict[str, Any]) -> None:
    assert "admission" in helm("template", "x", values={"admission": POLICY | changes}).stderr
