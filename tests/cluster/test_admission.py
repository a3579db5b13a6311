"""The chart's admission policy on a real API server: what it refuses is not created, and the user is told why."""

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.cluster import kit
from tests.specs import CLASSIFICATION, Changes, manifest
from tests.unit.chart.test_admission import LAWFUL, POLICY
from tests.unit.chart.test_chart import render

NAMESPACE = "admission"


@pytest.fixture(scope="module")
def policy(operator: str) -> Iterator[None]:
    """Only the policy, under a name of its own, for one namespace."""
    selector = {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}
    objects = render({"admission": POLICY | {"namespaceSelector": selector}, "fullnameOverride": "bounds"})
    wanted = [one for (kind, _), one in objects.items() if kind.startswith("ValidatingAdmission")]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": wanted})
    kit.kubectl("create", "namespace", NAMESPACE)
    try:
        apply(text)
        yield
    finally:
        subprocess.run(["kubectl", "delete", "-f", "-"], input=text, text=True, check=False, capture_output=True)
        kit.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def apply(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["kubectl", "apply", "-f", "-", *options]
    return subprocess.run(command, input=text, text=True, check=False, capture_output=True, timeout=60)


def create(changes: Changes) -> str:
    """What the API server says of a job that nothing is stored of."""
    job = manifest(CLASSIFICATION, LAWFUL | changes)
    done = apply(json.dumps(job), "-n", NAMESPACE, "--dry-run=server", "--validate=strict")
    return done.stderr if done.returncode else ""


def test_the_policy_compiles_and_decides(policy: None) -> None:
    deadline = time.monotonic() + 30
    while not (said := create({"model.uri": "hf://stranger/encoder"})) and time.monotonic() < deadline:
        time.sleep(0.5)  # a new policy takes a moment
    assert "spec.model: hf://stranger/encoder is not allowed in this cluster" in said
    assert "begins with hf://our-company/ or pvc://models/" in said
    assert create({}) == ""
    assert "spec.dataset: s3://us-data/b" in create({"dataset.sources": [{"uri": "s3://us-data/b"}]})
    assert "spec.output: s3://us-results/x" in create({"output": {"uri": "s3://us-results/x"}})
    assert "spec.model.trustRemoteCode" in create({"model.trustRemoteCode": True})
    assert "16 GPUs on all nodes together" in create(
        {"resources": {"gpuMemory": "80Gi", "nodes": 2}, "workspace": {"claimName": "c"}}
    )
    warnings = kit.kubectl("get", "validatingadmissionpolicy", "bounds", "-o", "jsonpath={.status.typeChecking}")
    assert "expressionWarnings" not in warnings, warnings


def test_other_namespaces_are_free(policy: None) -> None:
    job = manifest(CLASSIFICATION, {"model.uri": "hf://stranger/encoder"})
    assert apply(json.dumps(job), "-n", "default", "--dry-run=server", "--validate=strict").returncode == 0
