"""Brings this tree into the cluster: builds both images, loads them, installs the chart."""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune_api.constants import GROUP, PLURAL

from tests.cluster.kit import (
    ROOT,
    SYSTEM_NAMESPACE,
    CommandError,
    Manifest,
    apply,
    describe_operator,
    get,
    kubectl,
    restricted_namespace,
    run,
)

CHART = ROOT / "helm" / "finetune-operator"
CRD = ROOT / "crds" / "finetunejobs.yaml"
RELEASE = "finetune-operator"
CLUSTER_TOOL = "FINETUNE_CLUSTER_TOOL"
"""Variable with the path of a script that builds and loads images (`build -t NAME ...`, `load NAME`, `base-image`) and
starts what some tests need beside the cluster (`argocd`)."""

TESTS_LABEL = f"{GROUP}/tests"
"""On the operator's namespace, if the tests made it: they replace what is installed there."""

CPU_TORCH = "TORCH_INDEX=https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Image:
    """An image of this tree: the tag is a hash of what it is made of, so an unchanged tree is not built again."""

    repository: str
    folder: str

    @cached_property
    def tag(self) -> str:
        sources = [ROOT / "pyproject.toml", ROOT / "requirements.lock", ROOT / "LICENSE", ROOT / ".dockerignore"]
        for folder in (ROOT / "crds", ROOT / self.folder):
            sources += [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        digest = hashlib.sha256()
        for path in sorted(sources):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:12]

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def on_the_nodes(self) -> bool:
        nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
        return any(self.name in (i.get("names") or []) for n in nodes for i in n["status"].get("images", []))


OPERATOR_IMAGE = Image("localhost/finetune-operator", "operator")
TRAINER_IMAGE = Image("localhost/finetune-trainer", "trainer-image")


def missing_builder() -> str | None:
    """Why images cannot be built and loaded here, if so."""
    if os.environ.get(CLUSTER_TOOL) or (shutil.which("docker") and _kind_cluster()):
        return None
    return f"no way to give the cluster images: neither {CLUSTER_TOOL} nor docker with a kind cluster"


def build_and_load(image: Image) -> str:
    """Builds the image with a CPU torch, makes it available to pods, and returns its name."""
    name = image.name
    if image.on_the_nodes:
        return name
    source = ["-t", name, "-f", f"{image.folder}/Dockerfile"]
    if tool := os.environ.get(CLUSTER_TOOL):  # where its pip finds a CPU torch by itself
        run("bash", tool, "base-image", timeout=600)
        run("bash", tool, "build", *source, ".", timeout=1500)
        run("bash", tool, "load", name, timeout=600)
    else:
        torch = ["--build-arg", CPU_TORCH] if image is TRAINER_IMAGE else []
        run("docker", "build", *source, *torch, ".", timeout=1500)
        run("kind", "load", "docker-image", "--name", _kind_cluster(), name, timeout=600)
    return name


def _kind_cluster() -> str:
    """Name of the kind cluster that kubectl talks to, empty if it is none."""
    context = kubectl("config", "current-context").strip()
    return context.removeprefix("kind-") if context.startswith("kind-") and shutil.which("kind") else ""


def claim_cluster() -> str | None:
    """Marks the cluster as one for these tests, or says why it is not."""
    crd = f"{PLURAL}.{GROUP}"
    reason = foreign_object(get("namespace", SYSTEM_NAMESPACE, "default"), get("crd", crd, "default"))
    if reason is None:
        apply(_system_namespace())
    return reason


def foreign_object(namespace: Manifest | None, crd: Manifest | None) -> str | None:
    """What somebody else has installed, given the operator's namespace and the CustomResourceDefinition.

    What earlier tests left is theirs by the namespace's label; they make it before anything else.
    """
    if namespace is not None and namespace["metadata"].get("labels", {}).get(TESTS_LABEL) == "true":
        return None
    advice = (
        "The tests replace the operator of a cluster, so they want a test cluster; "
        f"if this is one: kubectl create namespace {SYSTEM_NAMESPACE}; "
        f"kubectl label namespace {SYSTEM_NAMESPACE} {TESTS_LABEL}=true"
    )
    if namespace is not None:
        return f"the cluster of KUBECONFIG has a namespace {SYSTEM_NAMESPACE} that is not from these tests. {advice}"
    if crd is not None:
        by = crd["metadata"].get("annotations", {}).get("meta.helm.sh/release-namespace")
        where = f", installed from namespace {by}," if by else ""
        return f"the cluster of KUBECONFIG has a CRD {crd['metadata']['name']}{where} that is not from these tests. {advice}"
    return None


def _system_namespace() -> Manifest:
    namespace = restricted_namespace(SYSTEM_NAMESPACE)
    namespace["metadata"]["labels"][TESTS_LABEL] = "true"
    return namespace


def dns_outside_pods() -> list[str]:
    """Addresses of the cluster's DNS that are no pod's, as CIDRs."""
    selector = ("-l", "kubernetes.io/service-name=kube-dns", "-o", "json")
    slices = json.loads(kubectl("-n", "kube-system", "get", "endpointslices", *selector))["items"]
    found = [end for each in slices for end in each.get("endpoints") or () if "targetRef" not in end]
    return [f"{address}/{128 if ':' in address else 32}" for end in found for address in end["addresses"]]


def can_have_kueue() -> bool:
    """Whether the tests of queues can run: Kueue is there, or can be installed."""
    return bool(os.environ.get(CLUSTER_TOOL)) or get("crd", "workloads.kueue.x-k8s.io", "default") is not None


def chart_values(**values: Any) -> dict[str, Any]:
    """Values for this tree's images on the test cluster."""
    return {
        "image": {"repository": OPERATOR_IMAGE.repository, "tag": OPERATOR_IMAGE.tag},
        "trainer": {
            "image": {"repository": TRAINER_IMAGE.repository, "tag": TRAINER_IMAGE.tag},
            "dnsCidrs": dns_outside_pods(),
        },
        "resources": {"requests": {"cpu": "20m", "memory": "96Mi"}, "limits": {"memory": "384Mi"}},
        "pollSeconds": 2,
        "kueue": {"enabled": can_have_kueue()},
        "logLevel": "debug",
        **values,
    }


def install_operator(release: str = RELEASE, namespace: str = SYSTEM_NAMESPACE, **values: Any) -> None:
    """Installs or upgrades the chart with this tree's images and waits until all replicas are ready."""
    if namespace == SYSTEM_NAMESPACE:
        apply(_system_namespace())
    if get("crd", f"{PLURAL}.{GROUP}", "default"):  # perhaps applied by hand, and then Helm refuses to change it
        kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD))
    command = ["helm", "upgrade", "--install", release, str(CHART), "-n", namespace, "--wait", "--timeout", "2m"]
    command.append("--take-ownership")  # of the CRD, likewise
    try:
        run(*command, "-f", "-", input=json.dumps(chart_values(**values)), timeout=180)
    except (CommandError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"the chart was not installed: {error}\n{describe_operator()}") from None
