"""Fixtures of the cluster tests. They use the cluster of KUBECONFIG, and only of that variable."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from finetune_api.constants import GROUP, PLURAL

from tests.cluster import install, kit
from tests.cluster.rights import RightsWatch
from tests.cluster.workbench import Workbench, make_workbench

REQUIRED = os.environ.get("FINETUNE_REQUIRE_CLUSTER") == "1"
reasons: set[str] = set()


@dataclass(frozen=True)
class Images:
    operator: str
    trainer: str


def unavailable(reason: str) -> NoReturn:
    """Skips the test, or fails it where a cluster is a must."""
    if REQUIRED:
        pytest.fail(f"FINETUNE_REQUIRE_CLUSTER=1, but {reason}", pytrace=False)
    reasons.add(reason)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")
    items.sort(key=lambda item: item.path.name == "test_rights.py")  # it judges what all others have done


def pytest_unconfigure() -> None:
    for reason in reasons:  # after pytest's own summary: the last thing to read
        print(f"The cluster tests were skipped: {reason}")


@pytest.fixture(scope="session")
def cluster() -> None:
    """A reachable test cluster, marked as one, with kubectl and helm."""
    if not os.environ.get("KUBECONFIG"):
        unavailable("KUBECONFIG is not set")
    for program in ("kubectl", "helm"):
        if not shutil.which(program):
            unavailable(f"{program} is not on PATH")
    try:
        kit.kubectl("get", "--raw=/readyz", "--request-timeout=10s")
    except kit.CommandError:
        unavailable("the cluster of KUBECONFIG does not answer")
    if reason := install.claim_cluster():
        unavailable(reason)


@pytest.fixture(scope="module")
def crd(cluster: None) -> None:
    """The resource of this tree. Other modules' may have come in between."""
    kit.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(kit.ROOT / "crds" / "finetunejobs.yaml"))
    for wanted in ("jsonpath={.status.conditions}", "condition=Established"):  # kubectl fails while there is no list
        kit.kubectl("wait", f"--for={wanted}", f"crd/{PLURAL}.{GROUP}", "--timeout=30s")


@pytest.fixture(scope="session")
def cluster_tool(cluster: None) -> str:
    """The script that starts other programs on the test cluster."""
    if tool := os.environ.get(install.CLUSTER_TOOL):
        return tool
    unavailable(f"{install.CLUSTER_TOOL} is not set")


@pytest.fixture(scope="session")
def images(cluster: None) -> Images:
    """Both images of this tree, on the nodes. A change of the code costs about two minutes."""
    if reason := install.missing_builder():
        unavailable(reason)
    return Images(install.build_and_load(install.OPERATOR_IMAGE), install.build_and_load(install.TRAINER_IMAGE))


@pytest.fixture(scope="session")
def rights(cluster: None) -> Iterator[RightsWatch]:
    """The rights that the operator uses from now on."""
    with RightsWatch() as watch:
        yield watch


@pytest.fixture(scope="session")
def operator(images: Images, rights: RightsWatch) -> str:
    """The installed operator with two ready replicas; its namespace. It stays when the tests end."""
    install.install_operator()
    return kit.SYSTEM_NAMESPACE


@pytest.fixture
def namespace(cluster: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace that enforces the Pod Security level `restricted`; gone after the test."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_")).strip("-")
    name = f"{words[:40].strip('-')}-{secrets.token_hex(2)}"
    kit.apply(kit.restricted_namespace(name))
    yield name
    kit.kubectl("delete", "namespace", name, "--wait=false")  # from here on nothing new is made in it
    kit.kubectl("-n", name, "delete", "pods", "--all", "--grace-period=1")


@pytest.fixture(scope="session")
def workbench(operator: str, images: Images) -> Iterator[Workbench]:
    """A namespace (`restricted`) with models and data, shared by the tests; each submits jobs of its own name."""
    name = f"workbench-{secrets.token_hex(2)}"
    kit.apply(kit.restricted_namespace(name))
    yield make_workbench(name, images.trainer)
    kit.kubectl("delete", "namespace", name, "--wait=false")
