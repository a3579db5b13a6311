"""Many jobs at once, on nodes that do not exist: all succeed, nothing is written in vain, and then there is quiet.

`benchmarks/operator` measures the same with a thousand jobs.
"""

import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from finetune_api.constants import Stage
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.operator.fake_nodes import fake_nodes, make_stages
from benchmarks.operator.jobs import make_job
from tests.cluster import install, kit
from tests.cluster.conftest import unavailable

JOBS = 20
CLAIM = "workspaces"
QUIET_SECONDS = 15
REQUESTS = "finetune_operator_api_requests_total"


@pytest.fixture
def busy(operator: str, namespace: str) -> Iterator[str]:
    """A namespace with a claim for the workspaces, and nodes on which each stage takes a second."""
    if not os.environ.get(install.CLUSTER_TOOL):
        unavailable(f"{install.CLUSTER_TOOL} does not name a tool that makes fake nodes")
    name = f"{CLAIM}-{namespace}"
    size = {"storage": "1Gi"}
    shared = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {
        **shared,
        "capacity": size,
        "hostPath": {"path": "/nowhere"},
        "claimRef": {"name": CLAIM, "namespace": namespace},
    }
    claim = {**shared, "resources": {"requests": size}, "volumeName": name}
    kit.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume})
    kit.apply(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM}, "spec": claim}, namespace
    )
    try:
        with fake_nodes(3, make_stages(dict.fromkeys(Stage, 1.0))):
            yield namespace
            kit.kubectl("-n", namespace, "delete", "ftj,jobs,pods", "--all", "--grace-period=0", "--force")
    finally:
        kit.kubectl("delete", "pv", name, "--wait=false")


def requests() -> Counter[tuple[str, str]]:
    """Verb and resource -> how many requests all replicas have made that were granted."""
    found: Counter[tuple[str, str]] = Counter()
    for pod in kit.operator_pods():
        text = kit.http_get(kit.SYSTEM_NAMESPACE, pod["metadata"]["name"], 8080, "/metrics")
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == REQUESTS and sample.labels["code"].startswith("2"):
                    found[sample.labels["verb"], sample.labels["resource"]] += int(sample.value)
    return found


@contextmanager
def changes_of_jobs() -> Iterator[list[str]]:
    """A list that has, after the `with`, a line for each change of any FineTuneJob."""
    changes: list[str] = []
    command = ["kubectl", "get", "ftj", "-A", "--watch-only", "--output-watch-events", "--no-headers"]
    with tempfile.TemporaryFile("w+") as file, subprocess.Popen(command, stdout=file) as watch:
        time.sleep(2)  # until it watches
        try:
            yield changes
            time.sleep(2)
        finally:
            watch.terminate()
            watch.wait()
        file.seek(0)
        changes += [line for line in file if line.startswith("MODIFIED")]


def phases(namespace: str) -> Counter[str]:
    return Counter(job["status"].get("phase", "") for job in kit.items("ftj", namespace))


def test_many_jobs_succeed_and_nothing_is_written_in_vain(busy: str) -> None:
    before = requests()
    with changes_of_jobs() as changes:
        jobs = [make_job(number) for number in range(JOBS)]
        kit.apply([job | {"spec": job["spec"] | {"workspace": {"claimName": CLAIM}}} for job in jobs], busy)
        kit.wait_until(lambda: phases(busy)["Succeeded"] == JOBS, 240, "all succeed", lambda: str(phases(busy)))
        time.sleep(3)
    end = requests()
    time.sleep(QUIET_SECONDS)
    quiet = requests() - end

    made = end - before
    assert made["update", "finetunejobs.finetune-operator.io/status"] == len(changes) > 3 * JOBS
    assert made["create", "jobs.batch"] == len(Stage) * JOBS
    assert quiet.total() < 2 * QUIET_SECONDS, quiet
    assert {verb for verb, resource in quiet if "leases" not in resource} <= {"watch"}, quiet
