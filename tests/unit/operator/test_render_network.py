"""What the NetworkPolicies of a stage allow its pods together: they add up."""

import re
from typing import Any

import pytest
from finetune_api.constants import Stage
from finetune_api.rules import parse_spec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.layout import PodLayout
from finetune_operator.observed import Key, Manifest, Resource, manifest_hash_of
from finetune_operator.plans import build_plan
from finetune_operator.render import render_stage
from finetune_operator.settings import Settings

SETTINGS = Settings(operator_namespace="operators")
TELEMETRY = [{"port": 9400}]
OPERATOR = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "operators"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "finetune-operator"}},
}


def render(stage: Stage, where: Settings = SETTINGS, name: str = "demo", nodes: int = 1) -> list[Manifest]:
    spec: Manifest = {
        "task": "Classification",
        "model": {"uri": "hf://owner/name"},
        "dataset": {"sources": [{"uri": "s3://bucket/data.jsonl"}]},
        "resources": {"gpus": 4, "nodes": nodes},
        "workspace": {"claimName": "team-disk"},
    }
    resource = Resource(Key("team", name), f"uid of {name}", 1, False, spec, FineTuneJobStatus())
    parsed, layout = parse_spec(spec), PodLayout()
    return render_stage(resource, parsed, build_plan(resource, parsed, stage, layout), where, layout, suspended=False)


def policies(stage: Stage, **arguments: Any) -> dict[str, Manifest]:
    """By name."""
    children = render(stage, **arguments)
    return {child["metadata"]["name"]: child for child in children if child["kind"] == "NetworkPolicy"}


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for expression in selector.get("matchExpressions", ()):
        value = labels.get(expression["key"])
        if value is None or (expression["operator"] == "In" and value not in expression["values"]):
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def allowed(stage: Stage, direction: str, **arguments: Any) -> list[Manifest]:
    """The rules for the stage's pod, of all the policies that select it; one at least denies what none allows."""
    children = render(stage, **arguments)
    labels = children[-1]["spec"]["template"]["metadata"]["labels"]
    specs = [child["spec"] for child in children if child["kind"] == "NetworkPolicy"]
    mine = [spec for spec in specs if direction.title() in spec["policyTypes"] and selects(spec["podSelector"], labels)]
    assert mine, "without a policy everything is allowed"
    return [rule for spec in mine for rule in spec[direction]]


@pytest.mark.parametrize("stage", list(Stage))
def test_the_operator_reads_the_telemetry_and_nobody_else_reaches_a_pod(stage: Stage) -> None:
    assert allowed(stage, "ingress") == [{"from": [OPERATOR], "ports": TELEMETRY}]


@pytest.mark.parametrize("stage", list(Stage))
def test_prometheus_reads_the_telemetry_if_the_installation_has_one(stage: Stage) -> None:
    where = Settings(operator_namespace="operators", prometheus_namespace="monitoring")
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert allowed(stage, "ingress", where=where) == [{"from": [OPERATOR, prometheus], "ports": TELEMETRY}]


def test_a_train_pod_reaches_nothing() -> None:
    assert allowed(Stage.TRAIN, "egress") == []


def test_train_pods_of_several_nodes_reach_each_other_and_the_dns() -> None:
    own = {"podSelector": {"matchLabels": {"finetune-operator.io/job": "demo", "finetune-operator.io/stage": "train"}}}
    pods = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    ports = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    assert allowed(Stage.TRAIN, "egress", nodes=2) == [{"to": [own]}, {"to": [pods], "ports": ports}]
    assert allowed(Stage.TRAIN, "ingress", nodes=2) == [{"from": [OPERATOR], "ports": TELEMETRY}, {"from": [own]}]
    where = Settings(dns_cidrs=("169.254.20.10/32",))
    _, dns = allowed(Stage.TRAIN, "egress", nodes=2, where=where)
    assert dns["to"] == [pods, {"ipBlock": {"cidr": "169.254.20.10/32"}}]


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.PUBLISH])
def test_the_cpu_stages_reach_the_world_but_not_the_nodes_credentials(stage: Stage) -> None:
    ((pods, world, world6),) = [rule["to"] for rule in allowed(stage, "egress", nodes=2)]
    assert pods == {"namespaceSelector": {}}
    assert (world["ipBlock"]["cidr"], world6["ipBlock"]["cidr"]) == ("0.0.0.0/0", "::/0")
    assert "169.254.169.254/32" in world["ipBlock"]["except"]


@pytest.mark.parametrize("stage", list(Stage))
def test_jobs_of_a_namespace_share_their_policies(stage: Stage) -> None:
    one, other = policies(stage), policies(stage, name="other")
    assert one == other
    for name, policy in one.items():
        assert not re.search("-(prepare|train|publish|workspace)$", name), "no job's own child is called so"
        assert policy["metadata"]["namespace"] == "team"
        assert "ownerReferences" not in policy["metadata"], "it stays when the job goes"
        assert "finetune-operator.io/job" not in policy["metadata"]["labels"]


def test_those_of_several_nodes_have_one_of_their_own_which_goes_with_the_job() -> None:
    own = policies(Stage.TRAIN, nodes=2).keys() - policies(Stage.TRAIN).keys()
    assert own == {"demo-train"}
    assert policies(Stage.TRAIN, nodes=2)["demo-train"]["metadata"]["ownerReferences"][0]["uid"] == "uid of demo"
    assert policies(Stage.PREPARE, nodes=2) == policies(Stage.PREPARE)


def test_the_hash_tells_a_policy_of_another_installation() -> None:
    before = policies(Stage.PREPARE)
    after = policies(Stage.PREPARE, where=Settings(operator_namespace="operators", prometheus_namespace="monitoring"))
    changed = [name for name in before if manifest_hash_of(before[name]) != manifest_hash_of(after[name])]
    assert changed == ["finetune-trainers"]
