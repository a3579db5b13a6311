"""The chart as its users see it: what it renders for their values, and which values it refuses."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.crd import custom_resource_definition
from finetune_operator.kube import PLURALS, REPLACEABLE
from finetune_operator.metrics import Metrics
from finetune_operator.request_counter import RequestCounter
from finetune_operator.settings import OPERATOR_LABELS, Settings
from finetune_operator.store import KINDS, Store
from finetune_trainer.telemetry.telemetry import METRICS
from prometheus_client import generate_latest

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm" / "finetune-operator"
HELM = shutil.which("helm")
REQUIRED = os.environ.get("FINETUNE_REQUIRE_CLUSTER") == "1"

Values = dict[str, Any]
Objects = dict[tuple[str, str], dict[str, Any]]

needs_helm = pytest.mark.skipif(not HELM and not REQUIRED, reason="helm is not on PATH")

EVERYTHING: Values = {
    "watchNamespaces": ["team-a", "team-b"],
    "image": {"repository": "registry.example:5000/ops/operator", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "mirror"}],
    "trainer": {
        "image": {"repository": "registry.example:5000/ops/trainer", "tag": "1.2.3"},
        "imagePullPolicy": "Always",
        "imagePullSecrets": [{"name": "mirror"}, {"name": "gpu-mirror"}],
        "dnsCidrs": ["169.254.20.10/32", "10.96.0.10/32"],
    },
    "logLevel": "debug",
    "pollSeconds": 2.5,
    "kueue": {"enabled": True},
    "serviceAccount": {"name": "tuner", "annotations": {"example.com/role": "x"}},
    "podDisruptionBudget": {"maxUnavailable": "50%"},
    "networkPolicy": {
        "ingressFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "apiServer": {"ports": [6443], "cidrs": ["10.0.0.1/32"]},
    },
    "monitoring": {
        "prometheusNamespace": "monitoring",
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True, "interval": "30s"},
        "alerts": {"enabled": True, "stalledMinutes": 45},
        "dashboards": {"enabled": True},
    },
    "commonLabels": {"team": "ml"},
    "podLabels": {"sidecar": "no"},
    "podAnnotations": {"note": "true"},
    "priorityClassName": "high",
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "ops", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    "fullnameOverride": "tuning",
}


def helm(*arguments: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
    assert HELM, "FINETUNE_REQUIRE_CLUSTER=1, but helm is not on PATH"
    command = [HELM, *arguments, str(CHART), "-f", "-"]
    return subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True, check=False)


def render(values: Values | None = None, release: str = "finetune-operator") -> Objects:
    """All objects by (kind, name); fails on one that comes twice."""
    done = helm("template", release, "--namespace", "ops", values=values)
    assert done.returncode == 0, done.stderr
    objects: Objects = {}
    for one in yaml.safe_load_all(done.stdout):
        if one is not None:
            place = one["metadata"].get("namespace", "")
            key = (one["kind"], f"{place}/{one['metadata']['name']}".lstrip("/"))
            assert key not in objects, f"{key} comes twice"
            objects[key] = one
    return objects


def environment(objects: Objects) -> dict[str, str]:
    """The operator's variables with a fixed value."""
    (deployment,) = (one for (kind, _), one in objects.items() if kind == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {e["name"]: e.get("value", "pod's") for e in container["env"]}


def pod(objects: Objects) -> dict[str, Any]:
    return next(one for (kind, _), one in objects.items() if kind == "Deployment")["spec"]["template"]


def allowed(role: dict[str, Any]) -> set[tuple[str, str]]:
    return {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}


@needs_helm
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_lint_is_clean(values: Values) -> None:
    done = helm("lint", "--strict", values=values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@needs_helm
def test_defaults_render_what_an_operator_needs_and_nothing_that_needs_other_operators() -> None:
    objects = render()
    assert sorted(kind for kind, _ in objects) == [
        "ClusterRole",
        "ClusterRole",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ]
    assert objects["Deployment", "ops/finetune-operator"]["spec"]["replicas"] == 2


@needs_helm
def test_crd_is_the_generated_one_kept_on_uninstall() -> None:
    crd = render()["CustomResourceDefinition", "finetunejobs.finetune-operator.io"]
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd["metadata"].pop("labels")["app.kubernetes.io/managed-by"] == "Helm"
    assert crd == custom_resource_definition()
    assert not any(kind == "CustomResourceDefinition" for kind, _ in render({"crds": {"install": False}}))


@needs_helm
def test_cluster_scope_has_one_cluster_role_with_the_rights_that_the_code_needs() -> None:
    """Told before the cluster tests prove it (`tests/cluster/test_rights.py`)."""
    objects = render()
    needed = {(kind.plural, verb) for kind in KINDS for verb in ("list", "watch")}
    needed |= {(plural, verb) for plural in PLURALS.values() for verb in ("create", "get")}  # get: whose is it?
    needed |= {(PLURALS[kind], "update") for kind in REPLACEABLE}
    needed |= {("jobs", "patch"), ("jobs", "delete"), ("finetunejobs", "delete"), ("finetunejobs/status", "update")}
    needed |= {("events", "list"), ("events", "create")}
    assert allowed(objects["ClusterRole", "finetune-operator"]) == needed
    assert environment(objects)["FINETUNE_WATCH_NAMESPACES"] == ""


@needs_helm
@pytest.mark.parametrize("namespaces", [[], ["team-a"]], ids=["everywhere", "in a namespace"])
def test_kueues_workloads_are_read_where_the_values_say_so_and_nowhere_else(namespaces: list[str]) -> None:
    role = ("Role", "team-a/finetune-operator") if namespaces else ("ClusterRole", "finetune-operator")
    for enabled in (True, False):
        objects = render({"watchNamespaces": namespaces, "kueue": {"enabled": enabled}})
        assert (("workloads", "list") in allowed(objects[role])) == enabled
        assert Settings.from_environment(environment(objects)).kueue is enabled


@needs_helm
def test_namespace_scope_has_no_right_outside_its_namespaces() -> None:
    values = {"watchNamespaces": ["team-a", "team-b", "team-a"], "rbac": {"aggregateToUserRoles": False}}
    objects = render(values)
    assert not any(kind.startswith("ClusterRole") for kind, _ in objects)
    roles = {name for kind, name in objects if kind == "Role"}
    assert roles == {"team-a/finetune-operator", "team-b/finetune-operator", "ops/finetune-operator-leader"}
    assert roles == {name for kind, name in objects if kind == "RoleBinding"}
    everywhere = render()["ClusterRole", "finetune-operator"]["rules"]
    assert objects["Role", "team-a/finetune-operator"]["rules"] == everywhere
    assert objects["Role", "team-b/finetune-operator"]["rules"] == everywhere
    assert environment(objects)["FINETUNE_WATCH_NAMESPACES"] == "team-a,team-b"


@needs_helm
@pytest.mark.parametrize(
    ("release", "name"), [("finetune-operator", "finetune-operator"), ("prod", "prod-finetune-operator")]
)
def test_the_only_lease_it_may_touch_is_the_one_that_it_uses(release: str, name: str) -> None:
    objects = render(release=release)
    assert environment(objects)["FINETUNE_LEASE_NAME"] == name
    changing = [r for r in objects["Role", f"ops/{name}-leader"]["rules"] if r["verbs"] != ["create"]]
    assert [(r["resources"], r["resourceNames"]) for r in changing] == [(["leases"], [name])]


@needs_helm
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_every_binding_leads_from_a_role_of_the_chart_to_the_pods_account(values: Values) -> None:
    objects = render(values)
    account = pod(objects)["spec"]["serviceAccountName"]
    assert ("ServiceAccount", f"ops/{account}") in objects
    for (kind, _), binding in objects.items():
        if kind in ("RoleBinding", "ClusterRoleBinding"):
            place = binding["metadata"].get("namespace", "")
            role = binding["roleRef"]
            assert (role["kind"], f"{place}/{role['name']}".lstrip("/")) in objects
            assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "ops"}]


@needs_helm
def test_account_and_rights_may_come_from_elsewhere() -> None:
    objects = render({"serviceAccount": {"create": False, "name": "given"}, "rbac": {"create": False}})
    assert pod(objects)["spec"]["serviceAccountName"] == "given"
    kinds = {kind for kind, _ in objects}
    assert not kinds & {"ServiceAccount", "Role", "RoleBinding", "ClusterRoleBinding"}


@needs_helm
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_pods_satisfy_the_restricted_pod_security_level(values: Values) -> None:
    spec = pod(render(values))["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert [set(volume) - {"name"} for volume in spec["volumes"]] == [{"emptyDir"}]
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


@needs_helm
def test_selectors_find_the_pods_and_ports_that_there_are() -> None:
    objects = render(EVERYTHING)
    template = pod(objects)
    labels = template["metadata"]["labels"].items()
    assert labels >= OPERATOR_LABELS.items(), "the trainers' NetworkPolicies would refuse the operator"
    selectors = [
        objects["Deployment", "ops/tuning"]["spec"]["selector"]["matchLabels"],
        objects["Service", "ops/tuning"]["spec"]["selector"],
        objects["PodDisruptionBudget", "ops/tuning"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy", "ops/tuning"]["spec"]["podSelector"]["matchLabels"],
        *(c["labelSelector"]["matchLabels"] for c in pod(render())["spec"]["topologySpreadConstraints"]),
    ]
    assert all(labels >= selector.items() for selector in selectors[:-1])
    assert selectors[-1].items() <= pod(render())["metadata"]["labels"].items()
    service_labels = objects["Service", "ops/tuning"]["metadata"]["labels"].items()
    assert service_labels >= objects["ServiceMonitor", "ops/tuning"]["spec"]["selector"]["matchLabels"].items()
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["http"]) == environment(objects)["FINETUNE_HTTP_PORT"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports


@needs_helm
def test_values_reach_the_operator_through_its_settings() -> None:
    settings = Settings.from_environment(environment(render(EVERYTHING)))
    assert settings.trainer_image == "registry.example:5000/ops/trainer:1.2.3"
    assert settings.trainer_pull_policy == "Always"
    assert settings.trainer_pull_secrets == ("mirror", "gpu-mirror")
    assert settings.dns_cidrs == ("169.254.20.10/32", "10.96.0.10/32")
    assert settings.watch_namespaces == ("team-a", "team-b")
    assert settings.prometheus_namespace == "monitoring"
    assert settings.lease_name == "tuning"
    assert settings.poll_seconds == 2.5
    assert settings.log_level == "DEBUG"
    assert settings.http_port == 8080
    defaults = Settings.from_environment(environment(render()))
    assert defaults.trainer_pull_secrets == defaults.watch_namespaces == defaults.dns_cidrs == ()
    assert defaults.prometheus_namespace == ""


@needs_helm
def test_values_reach_the_pods() -> None:
    template = pod(render(EVERYTHING))
    spec = template["spec"]
    assert spec["containers"][0]["image"] == "registry.example:5000/ops/operator@sha256:" + "0" * 64
    for value, field in (
        ("imagePullSecrets", "imagePullSecrets"),
        ("priorityClassName", "priorityClassName"),
        ("nodeSelector", "nodeSelector"),
        ("tolerations", "tolerations"),
        ("affinity", "affinity"),
        ("topologySpreadConstraints", "topologySpreadConstraints"),
    ):
        assert spec[field] == EVERYTHING[value]
    assert template["metadata"]["labels"].items() >= {"team": "ml", "sidecar": "no"}.items()
    assert template["metadata"]["annotations"]["note"] == "true"


@needs_helm
def test_common_labels_are_on_every_object() -> None:
    objects = render(EVERYTHING)
    assert len(objects) > 15
    assert {one["metadata"]["labels"].get("team") for one in objects.values()} == {"ml"}


@needs_helm
def test_network_policy_narrows_to_what_it_is_told() -> None:
    policy = render(EVERYTHING)["NetworkPolicy", "ops/tuning"]["spec"]
    assert policy["ingress"] == [
        {"ports": [{"port": "http", "protocol": "TCP"}], "from": EVERYTHING["networkPolicy"]["ingressFrom"]}
    ]
    api_server, dns, trainers = policy["egress"]
    assert api_server == {
        "ports": [{"port": 6443, "protocol": "TCP"}],
        "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
    }
    assert {port["port"] for port in dns["ports"]} == {53}
    assert [port["port"] for port in trainers["ports"]] == [9400]
    (peer,) = trainers["to"]
    assert peer["namespaceSelector"]["matchExpressions"][0]["values"] == ["team-a", "team-b"]
    assert not any(kind == "NetworkPolicy" for kind, _ in render({"networkPolicy": {"enabled": False}}))


@needs_helm
def test_monitors_keep_the_labels_of_the_jobs() -> None:
    objects = render(EVERYTHING)
    (endpoint,) = objects["ServiceMonitor", "ops/tuning"]["spec"]["endpoints"]
    trainers = objects["PodMonitor", "ops/tuning-trainers"]["spec"]
    (pod_endpoint,) = trainers["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is pod_endpoint["honorLabels"] is True
    assert pod_endpoint["interval"] == "30s"
    first = {"key": "batch.kubernetes.io/job-completion-index", "operator": "In", "values": ["0"]}
    assert first in trainers["selector"]["matchExpressions"], "several nodes would tell the same series"
    assert trainers["namespaceSelector"] == {"matchNames": ["team-a", "team-b"]}
    assert objects["ServiceMonitor", "ops/tuning"]["metadata"]["labels"]["release"] == "prometheus"


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replicas": 3}, "replicas"),
        ({"image": {"repository": "x", "tga": "1"}}, "tga"),
        ({"image": {"repository": "operator:latest"}}, "image"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"trainer": {"imagePullSecrets": ["mirror"]}}, "imagePullSecrets"),
        ({"monitoring": {"serviceMonitor": {"enable": True}}}, "enable"),
        ({"networkPolicy": {"apiServer": {"ports": []}}}, "ports"),
        ({"trainer": {"dnsCidrs": ["10.96.0.10"]}}, "dnsCidrs"),
        ({"logLevel": "verbose"}, "logLevel"),
        ({"pollSeconds": 0}, "pollSeconds"),
        ({"watchNamespaces": "team-a"}, "watchNamespaces"),
        ({"commonLabels": {"team": 3}}, "team"),
        ({"resources": {"limit": {}}}, "limit"),
        ({"monitoring": {"podMonitor": {"enabled": True}}}, "monitoring.prometheusNamespace"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused_by_name(values: Values, words: str) -> None:
    done = helm("template", "finetune-operator", values=values)
    assert done.returncode != 0
    assert words in done.stderr


@needs_helm
def test_works_as_a_part_of_another_chart() -> None:
    assert render({"global": {"registry": "of the parent"}}) == render()


def test_every_value_is_explained() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r" *[a-zA-Z]+:", line)
        and not before.lstrip().startswith("#")
        and not re.match(r" *(requests|limits|cpu|memory|grafana_dashboard):", line)
    ]
    assert bare == []


def test_chart_and_package_have_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_dashboards_and_alerts_ask_for_metrics_that_there_are() -> None:
    files = [*(CHART / "files" / "dashboards").glob("*.json"), CHART / "templates" / "alerts.yaml"]
    asked = {name for file in files for name in re.findall(r"finetune_(?:operator|trainer)_\w+", file.read_text())}
    operator = Metrics(Store(), lambda: True, lambda: 0, lambda: {"pods": 0.0}, RequestCounter()).registry
    served = set(re.findall(r"^# TYPE (\w+)", generate_latest(operator).decode(), re.MULTILINE))
    served |= {f"finetune_trainer_{name}" for name in METRICS}
    assert asked
    assert {name.removesuffix("_bucket") for name in asked} <= served
