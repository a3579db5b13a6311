"""What the tests say to a real Argo CD: repositories, Applications, and what it finds of them."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.cluster import kit

NAMESPACE = "argocd"
SERVER = "https://127.0.0.1:6443"
BRANCH = "main"
PROJECT = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "AppProject",
    "metadata": {"name": "tests", "namespace": NAMESPACE},
    "spec": {
        "sourceRepos": ["*"],
        "destinations": [{"namespace": "*", "server": "*"}],
        "clusterResourceWhitelist": [{"group": "*", "kind": "*"}],
        "orphanedResources": {
            "warn": True,
            "ignore": [{"group": "networking.k8s.io", "kind": "NetworkPolicy", "name": "finetune-*"}],  # docs/gitops.md
        },
    },
}
"""Of all Applications: it warns of objects in their namespace that are not theirs, nor their objects' children."""

ORPHANS = "OrphanedResourceWarning"
GITOPS_PAGE = kit.ROOT / "docs" / "gitops.md"
REFRESH = "argocd.argoproj.io/refresh"


def start(tool: str) -> None:
    """Starts Argo CD and gives it the health check as docs/gitops.md says."""
    kit.run("bash", tool, "argocd", timeout=300)
    kit.apply(PROJECT)
    (command,) = (block for block in _code_blocks(GITOPS_PAGE.read_text()) if "create configmap argocd-cm" in block)
    kit.run("bash", "-euo", "pipefail", "-c", command)


def stop_watching() -> None:
    """Argo CD forgets the cluster, which it would go on watching at the cost of the tests that follow."""
    kit.kubectl("-n", NAMESPACE, "delete", "secret", "-l", "argocd.argoproj.io/secret-type=cluster")


def _code_blocks(page: str) -> list[str]:
    """Indented by four spaces, between paragraphs."""
    return [text for text in page.split("\n\n") if text.startswith("    ")]


@dataclass(frozen=True)
class Repository:
    """A git repository in a folder; what stands in the folder is committed."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Self:
        kit.run("git", "init", "--quiet", f"--initial-branch={BRANCH}", str(folder))
        return cls(folder)

    @property
    def source(self) -> dict[str, Any]:
        return {"repoURL": self.folder.as_uri(), "path": "."}

    def commit(self, *manifests: kit.Manifest) -> None:
        """Writes these, each into a file of its own, and commits the folder."""
        for one in manifests:
            (self.folder / f"{one['kind']}.yaml").write_text(json.dumps(one, indent=2))  # which is YAML, too
        git = ("git", "-C", str(self.folder), "-c", "user.name=tests", "-c", "user.email=tests@example.com")
        kit.run(*git, "add", "--all")
        kit.run(*git, "commit", "--quiet", "--message=change")


@dataclass(frozen=True)
class Application:
    """An Application by name."""

    name: str

    @classmethod
    def create(cls, source: Mapping[str, Any], namespace: str, *sync_options: str, automated: bool = True) -> Self:
        """`automated` applies new commits, prunes, and undoes what others change."""
        spec = {
            "project": PROJECT["metadata"]["name"],
            "source": {"targetRevision": BRANCH, **source},
            "destination": {"server": SERVER, "namespace": namespace},
            "syncPolicy": {
                "syncOptions": list(sync_options),
                **({"automated": {"prune": True, "selfHeal": True}} if automated else {}),
            },
        }
        metadata = {"name": f"test-{secrets.token_hex(3)}", "namespace": NAMESPACE}
        kit.apply({"apiVersion": "argoproj.io/v1alpha1", "kind": "Application", "metadata": metadata, "spec": spec})
        return cls(metadata["name"])

    def refresh(self) -> dict[str, Any]:
        """The status after one more look at git and at the cluster."""
        self._kubectl("annotate", "--overwrite", "application", self.name, f"{REFRESH}=normal")

        def look() -> dict[str, Any] | None:
            application = self._read()
            return application["status"] if REFRESH not in application["metadata"].get("annotations", {}) else None

        return self._wait_until(look, "refreshed")

    def wait(self, sync: str, health: str) -> dict[str, Any]:
        """The status once it is so."""

        def look() -> dict[str, Any] | None:
            status = self.refresh()
            return status if verdict(status) == (sync, health) else None

        return self._wait_until(look, f"{sync} and {health}")

    def wait_for_words(self, words: str) -> dict[str, Any]:
        """The status once a sync has ended with these words."""

        def look() -> dict[str, Any] | None:
            status = self.refresh()
            return status if words in status.get("operationState", {}).get("message", "") else None

        return self._wait_until(look, words)

    def sync(self) -> dict[str, Any]:
        """Applies the newest commit once more; the status after that."""
        mark = {"name": "mark", "value": secrets.token_hex(8)}
        options = self._read()["spec"]["syncPolicy"].get("syncOptions", [])
        operation = json.dumps({"operation": {"info": [mark], "sync": {"syncOptions": options}}})
        self._kubectl("patch", "application", self.name, "--type=merge", "-p", operation)

        def look() -> dict[str, Any] | None:
            status = self.refresh()
            state = status.get("operationState", {})
            return (
                status if mark in state.get("operation", {}).get("info", []) and state["phase"] != "Running" else None
            )

        return self._wait_until(look, "synced")

    def delete(self, cascade: bool = False) -> None:
        """With `cascade`, its objects go too."""
        finalizers = json.dumps({"metadata": {"finalizers": ["resources-finalizer.argocd.argoproj.io"] * cascade}})
        self._kubectl("patch", "application", self.name, "--type=merge", "-p", finalizers)
        self._kubectl("delete", "application", self.name, "--timeout=60s")

    def _read(self) -> dict[str, Any]:
        return json.loads(self._kubectl("get", "application", self.name, "-o", "json"))

    def _wait_until(self, look: Callable[[], dict[str, Any] | None], what: str) -> dict[str, Any]:
        status = kit.wait_until(look, 90, f"{self.name} {what}", lambda: json.dumps(self._read()["status"], indent=2))
        assert status is not None
        return status

    def _kubectl(self, *arguments: str) -> str:
        return kit.kubectl("-n", NAMESPACE, *arguments)


def verdict(status: Mapping[str, Any]) -> tuple[str, str]:
    """Sync and health."""
    return status.get("sync", {}).get("status", ""), status.get("health", {}).get("status", "")
