"""The chart on a real cluster: it installs, runs with few rights, and leaves the resource behind when it goes."""

import json
import subprocess

from tests.cluster import install, kit

JOB = {
    "apiVersion": "finetune-operator.io/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "kept"},
    "spec": {
        "task": "Classification",
        "model": {"uri": "pvc://models/encoder"},
        "dataset": {
            "sources": [{"uri": "configmap://headlines/train.csv"}],
            "validation": {"fraction": 0.1},
            "test": {"fraction": 0.1},
        },
        "suspend": True,
    },
}


def crd_uid() -> str:
    name = "finetunejobs.finetune-operator.io"
    return kit.kubectl("get", "crd", name, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")


def may(verb: str, resource: str, namespace: str) -> bool:
    """Whether the operator's service account may do that; a subresource stands after a slash."""
    account = f"system:serviceaccount:{kit.SYSTEM_NAMESPACE}:{install.RELEASE}"
    resource, _, subresource = resource.partition("/")
    command = ["kubectl", "auth", "can-i", verb, resource, "-n", namespace, f"--as={account}"]
    command += [f"--subresource={subresource}"] if subresource else []
    answer = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert not answer.stderr, answer.stderr  # a resource that does not exist
    return answer.stdout.strip() == "yes"


def test_one_of_two_ready_replicas_leads(operator: str) -> None:
    deployment = kit.get("deployment", install.RELEASE, operator)
    assert deployment is not None
    assert deployment["status"]["readyReplicas"] == 2
    names = {pod["metadata"]["name"] for pod in kit.operator_pods()}

    def leader() -> str | None:
        lease = kit.get("lease", install.RELEASE, operator)
        holder = lease["spec"].get("holderIdentity") if lease else None
        return holder if holder in names else None

    kit.wait_until(leader, 60, "a leader among the replicas", kit.describe_operator)
    assert {pod["status"]["containerStatuses"][0]["restartCount"] for pod in kit.operator_pods()} == {0}


def test_metrics_and_health_are_served(operator: str) -> None:
    for pod in kit.operator_pods():
        with kit.port_forward(operator, pod["metadata"]["name"], 8080) as url:
            assert kit.fetch(url + "/healthz")
            assert kit.fetch(url + "/readyz")
            assert "finetune_operator_leader" in kit.fetch(url + "/metrics")


def test_the_operator_may_not_read_secrets_or_run_pods(operator: str, namespace: str) -> None:
    for verb, resource in (("create", "jobs.batch"), ("update", "finetunejobs/status"), ("list", "pods")):
        assert may(verb, resource, namespace), f"{verb} {resource}"
    for verb, resource in (
        ("get", "secrets"),
        ("create", "pods"),
        ("create", "pods/exec"),
        ("delete", "persistentvolumeclaims"),
        ("create", "rolebindings.rbac.authorization.k8s.io"),
        ("patch", "finetunejobs"),
    ):
        assert not may(verb, resource, namespace), f"{verb} {resource}"


def test_explain_teaches_the_resource(operator: str) -> None:
    assert "The foundation model to start from." in kit.kubectl("explain", "finetunejob.spec")
    assert "ENUM" in kit.kubectl("explain", "ftj.spec.task")


def test_uninstall_keeps_the_resource_and_its_objects(operator: str, namespace: str) -> None:
    kit.apply(JOB, namespace)
    uids = crd_uid(), kit.get_job(namespace, "kept")["metadata"]["uid"]
    try:
        kit.run("helm", "uninstall", install.RELEASE, "-n", operator, "--wait", "--timeout", "2m", timeout=180)
        left = kit.kubectl(
            "-n", operator, "get", "deploy,svc,sa,role,netpol,pdb", "-l", kit.OPERATOR_SELECTOR, "-o", "json"
        )
        assert json.loads(left)["items"] == []
        assert (crd_uid(), kit.get_job(namespace, "kept")["metadata"]["uid"]) == uids
        kit.wait_until(lambda: not kit.items("pods", operator, kit.OPERATOR_SELECTOR), 60, "no operator")
        kit.kubectl("-n", operator, "delete", "lease", install.RELEASE)  # no part of the release: the operator made it
    finally:
        install.install_operator()
    assert (crd_uid(), kit.get_job(namespace, "kept")["metadata"]["uid"]) == uids
