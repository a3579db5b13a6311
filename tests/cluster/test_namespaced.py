"""A release of the chart that serves one namespace: it has no right outside of it, needs none, and touches nothing."""

import secrets
from collections.abc import Iterator

import pytest
from finetune_api.constants import TELEMETRY_PORT

from tests.cluster import install, kit
from tests.cluster.rights import Rights
from tests.cluster.test_faults import operator_away, step_of
from tests.cluster.test_isolation import expect
from tests.cluster.workbench import Workbench, fine_tune_job, long_classification

RELEASE = "team"
NAME = f"{RELEASE}-finetune-operator"


@pytest.fixture
def monitoring(workbench: Workbench, namespace: str) -> Iterator[Workbench]:
    """A namespace with the pod `prometheus`."""
    bench = Workbench(namespace, workbench.image)
    with bench.helper("prometheus", {}):
        yield bench


@pytest.fixture
def release(workbench: Workbench, monitoring: Workbench) -> Iterator[str]:
    """Namespace of a release for the workbench alone, while the one for all namespaces is away."""
    namespace = f"{RELEASE}-{secrets.token_hex(2)}"
    kit.apply(kit.restricted_namespace(namespace))
    scraper = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": monitoring.namespace}}}
    try:
        with operator_away():
            install.install_operator(
                RELEASE,
                namespace,
                replicaCount=1,
                watchNamespaces=[workbench.namespace],
                crds={"install": False},
                rbac={"aggregateToUserRoles": False},
                monitoring={"prometheusNamespace": monitoring.namespace},
                networkPolicy={"ingressFrom": [scraper]},
            )
            yield namespace
            kit.run("helm", "uninstall", RELEASE, "-n", namespace, "--wait", "--timeout", "1m")
    finally:
        kit.kubectl("delete", "namespace", namespace, "--wait=false")


def rights_in(namespace: str, account: str) -> list[str]:
    """Resources on which a service account may do anything there, besides asking for its own rights."""
    rows = kit.kubectl("auth", "can-i", "--list", "--no-headers", "-n", namespace, f"--as={account}").splitlines()
    resources = [row.split()[0] for row in rows if not row.startswith(" ")]  # other rows are of paths, not resources
    return [name for name in resources if not name.startswith("selfsubject")]


def test_a_release_for_one_namespace_works_there_and_nowhere_else(
    release: str, workbench: Workbench, monitoring: Workbench
) -> None:
    account = f"system:serviceaccount:{release}:{NAME}"
    assert "jobs.batch" in rights_in(workbench.namespace, account)
    assert rights_in(monitoring.namespace, account) == rights_in("default", account) == []
    assert rights_in(release, account) == ["leases.coordination.k8s.io"] * 2

    elsewhere = fine_tune_job("elsewhere", long_classification(steps=1))
    kit.apply(elsewhere, monitoring.namespace)
    name = workbench.submit(long_classification(steps=100_000))
    kit.wait_for(workbench.namespace, name, lambda job: step_of(job) > 0, 150, "training, and the operator told of it")
    assert "phase" not in kit.get_job(monitoring.namespace, "elsewhere")["status"]
    assert not kit.items("jobs", monitoring.namespace)

    (pod,) = kit.items("pods", release, kit.OPERATOR_SELECTOR)
    rights = Rights()
    rights.add(kit.http_get(release, pod["metadata"]["name"], 8080, "/metrics"))
    assert "create jobs.batch" in rights.used
    assert rights.missing == set()

    train = workbench.running_pod(name, "train")
    scraped = {
        "operator's metrics": (pod["status"]["podIP"], 8080),
        "trainer's metrics": (train["status"]["podIP"], TELEMETRY_PORT),
    }
    expect(monitoring, "prometheus", scraped, set(scraped))
    with workbench.helper("curious", {}) as curious:
        expect(workbench, curious, scraped, set())
    workbench.delete(name)
