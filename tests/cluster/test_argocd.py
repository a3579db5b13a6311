"""FineTuneJobs from git, by a real Argo CD: nothing drifts, and its health tells how far a job is (docs/gitops.md)."""

import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.constants import JOB_LABEL

from tests.cluster import argocd, install, kit
from tests.cluster.argocd import Application, Repository, verdict
from tests.cluster.workbench import HEADLINES, Workbench, config_map, fine_tune_job, jsonl, tiny_classification
from tests.statuses import MOMENTS, Moment
from tests.unit.chart.test_admission import POLICY

SERVER_SIDE = "ServerSideApply=true"
IMPOSSIBLE_GATE = {"gate": {"metric": "loss", "maximum": 0}}


@pytest.fixture(scope="module", autouse=True)
def argo_cd(cluster_tool: str) -> Iterator[None]:
    argocd.start(cluster_tool)
    yield
    argocd.stop_watching()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository")


def job_with_data(name: str, **spec: Any) -> tuple[kit.Manifest, kit.Manifest]:
    """A FineTuneJob and the ConfigMap that it reads, with a label that tools put on what they apply."""
    data = config_map(f"{name}-data", {"train.jsonl": jsonl(HEADLINES)})
    whole = tiny_classification(**spec)
    whole["dataset"] = {**whole["dataset"], "sources": [{"uri": f"configmap://{name}-data/train.jsonl"}]}
    job = fine_tune_job(name, whole)
    return data, {**job, "metadata": {**job["metadata"], "labels": {"app.kubernetes.io/instance": name}}}


@pytest.mark.parametrize(
    ("spec", "sync_options", "phases"),
    [
        ({}, [], ["Preparing", "Training", "Publishing", "Succeeded"]),
        ({"evaluation": IMPOSSIBLE_GATE}, [SERVER_SIDE], ["Preparing", "Training", "Failed"]),
    ],
    ids=["client-side apply, to success", "server-side apply, to failure"],
)
def test_a_job_is_in_sync_in_every_phase_and_healthy_only_in_the_last(
    workbench: Workbench,
    repository: Repository,
    spec: dict[str, Any],
    sync_options: list[str],
    phases: list[str],
) -> None:
    *working, end = phases
    health = {"Succeeded": "Healthy", "Failed": "Degraded"}[end]
    name = f"git-{secrets.token_hex(3)}"
    repository.commit(*job_with_data(name, **spec))
    application = Application.create(repository.source, workbench.namespace, *sync_options)
    seen: list[tuple[str, str, str]] = []

    def look() -> bool:
        """Notes what Argo CD says, and the phase thereafter; whether it has said the last word."""
        if phase_of(workbench.namespace, name):
            seen.append((*verdict(application.refresh()), phase_of(workbench.namespace, name)))
        return bool(seen) and seen[-1][1] == health

    kit.wait_until(look, 240, health, lambda: f"{seen}\n{kit.describe(workbench.namespace, name)}")
    ended = ("wait", f"finetunejob/{name}", "--for=jsonpath={.status.completionTime}", "--timeout=10s")
    kit.kubectl("-n", workbench.namespace, *ended)
    application.delete()
    workbench.delete(name)
    assert {sync for sync, _, _ in seen} == {"Synced"}
    assert {(said, phase) for _, said, phase in seen} >= {("Progressing", phase) for phase in working}
    assert {said for _, said, phase in seen if phase != end} == {"Progressing"}


def phase_of(namespace: str, name: str) -> str:
    """Empty before the operator has seen the job."""
    job = kit.get("finetunejob", name, namespace)
    return job.get("status", {}).get("phase", "") if job else ""


@pytest.mark.parametrize("sync_options", [[], [SERVER_SIDE]], ids=["client-side apply", "server-side apply"])
def test_what_git_says_again_or_may_not_say_changes_nothing(
    operator: str, namespace: str, repository: Repository, sync_options: list[str]
) -> None:
    data, job = job_with_data("headlines", suspend=True)
    repository.commit(data, job)
    application = Application.create(repository.source, namespace, *sync_options)
    status = application.wait("Synced", "Suspended")
    assert argocd.ORPHANS not in {one["type"] for one in status.get("conditions", [])}, "children are the job's"
    assert {(one["kind"], one["name"]) for one in status["resources"]} == {
        ("ConfigMap", "headlines-data"),
        ("FineTuneJob", "headlines"),
    }, "what the job makes is not taken for something that git should have"

    before = at_rest("headlines", namespace)
    assert application.sync()["operationState"]["phase"] == "Succeeded"
    assert everything_of("headlines", namespace) == before

    repository.commit({**job, "spec": {**job["spec"], "training": {"maxSteps": 60}}})
    status = application.wait_for_words("training cannot be changed after creation")
    assert "create a new FineTuneJob" in status["operationState"]["message"]
    assert verdict(status) == ("OutOfSync", "Suspended")
    repository.commit(job)
    application.wait("Synced", "Suspended")
    assert everything_of("headlines", namespace) == before
    application.delete()


def at_rest(name: str, namespace: str) -> dict[str, str]:
    """`everything_of` a suspended job when all that its creation sets off is over."""
    seen: list[dict[str, str]] = [{}]

    def look() -> bool:
        seen.append(everything_of(name, namespace))
        return seen[-1] == seen[-2]

    kit.wait_until(look, 30, f"{name} at rest", lambda: kit.describe(namespace, name))
    return seen[-1]


def everything_of(name: str, namespace: str) -> dict[str, str]:
    """The job and its children, by kind and name, and the version of each; none of them has what is the job's own."""
    job = kit.get_job(namespace, name)
    children = kit.items("jobs,configmaps,pvc", namespace, f"{JOB_LABEL}={name}")
    children += kit.items("networkpolicies", namespace)
    assert {one["kind"] for one in children} == {"Job", "ConfigMap", "NetworkPolicy", "PersistentVolumeClaim"}
    for one in children:
        for field in ("labels", "annotations"):
            assert not job["metadata"][field].keys() & one["metadata"][field].keys(), one["metadata"]
    return {f"{one['kind']}/{one['metadata']['name']}": one["metadata"]["resourceVersion"] for one in (job, *children)}


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
def test_the_health_of_a_status(tmp_path: Path, moment: Moment) -> None:
    job = fine_tune_job("x", {}) | {
        "metadata": {"name": "x", "generation": moment.generation},
        "status": moment.status.to_dict(),
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    settings = kit.kubectl("-n", argocd.NAMESPACE, "get", "configmap", "argocd-cm", "-o", "json")
    (tmp_path / "argocd-cm.yaml").write_text(settings)
    command = ("argocd", "admin", "settings", "resource-overrides", "health", str(tmp_path / "job.yaml"))
    said = kit.run(*command, "--argocd-cm-path", str(tmp_path / "argocd-cm.yaml"))
    assert f"STATUS: {moment.health}\n" in said
    assert moment.words in said


def test_the_installed_operator_is_in_sync_with_its_chart(operator: str, repository: Repository) -> None:
    shutil.copytree(install.CHART, repository.folder, dirs_exist_ok=True)
    repository.commit()
    helm = {"releaseName": install.RELEASE, "valuesObject": install.chart_values()}
    application = Application.create({**repository.source, "helm": helm}, operator, automated=False)
    application.sync()
    status = application.wait("Synced", "Healthy")
    assert "CustomResourceDefinition" in {one["kind"] for one in status["resources"]}
    application.delete()


def test_so_is_one_with_all_options_and_it_leaves_nothing(
    operator: str, namespace: str, repository: Repository
) -> None:
    shutil.copytree(install.CHART, repository.folder, dirs_exist_ok=True)
    repository.commit()
    values = install.chart_values(
        crds={"install": False},
        rbac={"aggregateToUserRoles": False},
        watchNamespaces=[namespace],
        admission=POLICY,
        monitoring={"dashboards": {"enabled": True}},
    )
    application = Application.create({**repository.source, "helm": {"valuesObject": values}}, namespace, SERVER_SIDE)
    status = application.wait("Synced", "Healthy")
    assert {"ValidatingAdmissionPolicy", "ConfigMap"} <= {one["kind"] for one in status["resources"]}
    application.delete(cascade=True)
    policies = kit.kubectl("get", "validatingadmissionpolicies,clusterroles", "-o", "name")
    assert application.name not in policies
