"""From apply to the end of the time to live: suspended, resumed, drained, limited. Nothing runs twice, nothing is lost."""

import json
import re
from typing import Any

import pytest
from finetune_api.constants import JOB_LABEL

from tests.cluster import kit
from tests.cluster.test_faults import step_of
from tests.cluster.test_jobs import remaining_objects, wait_until_gone
from tests.cluster.workbench import Workbench, long_classification, tiny_classification

Job = dict[str, Any]


@pytest.fixture(scope="module")
def endless(workbench: Workbench) -> str:
    """A training that does not end by itself; it is prepared while the first test runs."""
    return workbench.submit(long_classification(steps=100_000))


def evict(namespace: str, pod: str) -> None:
    """As `kubectl drain` does it, of one pod alone: this cluster may have no other node."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction"
    kit.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))


def children(workbench: Workbench, name: str) -> set[str]:
    """Kinds of the objects that were made for a job."""
    return {re.split(r"[./]", child)[0] for child in remaining_objects(workbench.namespace, name)}


def says_suspended(job: Job) -> list[str]:
    """Where a resource that goes on still says that it is suspended: columns, conditions, phase."""
    places = [kit.kubectl("-n", job["metadata"]["namespace"], "get", "ftj", job["metadata"]["name"], "-o", "wide")]
    for condition in job["status"]["conditions"]:
        if condition["type"] != "Suspended":
            places.append(f"{condition['type']} {condition['reason']} {condition['message']}")
        elif condition["status"] != "False":
            places.append("Suspended")
    return [place for place in places if re.search("suspended|spec.suspend is true", place, re.IGNORECASE)]


def test_suspended_at_creation_it_waits_then_runs_once_and_goes_when_its_time_is_over(
    workbench: Workbench, endless: str
) -> None:
    name = workbench.submit(tiny_classification(suspend=True, limits={"activeDeadlineSeconds": 3600}))
    job = workbench.wait(name, "Suspended", 60)
    assert kit.condition(job, "Suspended")["status"] == "True"
    assert children(workbench, name) == {"job", "configmap", "persistentvolumeclaim"}, "and no pod"
    (child,) = kit.items("jobs", workbench.namespace, f"{JOB_LABEL}={name}")
    assert "startTime" not in child["status"], "its deadline does not tick"

    workbench.set(name, suspend=False)
    job = workbench.wait(name, "Succeeded")
    assert not says_suspended(job)
    before = job["status"]
    for kind in ("jobs", "pods", "configmaps"):
        kit.kubectl("-n", workbench.namespace, "delete", kind, "-l", f"{JOB_LABEL}={name}")
    workbench.set(name, limits={"activeDeadlineSeconds": 3600, "retries": 5})  # something to reconcile for
    job = kit.wait_for(
        workbench.namespace,
        name,
        lambda job: job["status"]["observedGeneration"] == job["metadata"]["generation"],
        30,
        "the edit seen",
    )
    assert {**job["status"], "observedGeneration": 0, "conditions": []} == {
        **before,
        "observedGeneration": 0,
        "conditions": [],
    }, "a job that has finished stays finished"
    assert children(workbench, name) == {"persistentvolumeclaim"}, "and runs no second time"
    workbench.set(name, limits={"ttlSecondsAfterFinished": 1})
    wait_until_gone(workbench.namespace, name)


def test_a_training_is_suspended_drained_and_ended_by_its_deadline(workbench: Workbench, endless: str) -> None:
    namespace, name = workbench.namespace, endless

    def trained_beyond(step: int) -> Job:
        return kit.wait_for(namespace, name, lambda job: step_of(job) > step, 300, f"training beyond step {step}")

    trained_beyond(50)
    workbench.set(name, suspend=True)
    workbench.wait(name, "Suspended", 60)
    kit.wait_until(lambda: not kit.pods(namespace, name, "train"), 60, "no pod while it is suspended")
    suspended = kit.get_job(namespace, name)
    (train,) = kit.items("jobs", namespace, f"{JOB_LABEL}={name},finetune-operator.io/stage=train")
    assert "startTime" not in train["status"], "its deadline does not tick"
    assert train["status"].get("failed", 0) == 0
    workbench.set(name, suspend=False)
    job = trained_beyond(step_of(suspended))
    pod = workbench.running_pod(name, "train")["metadata"]["name"]
    assert resumed_from(namespace, pod) >= step_of(suspended) > 0
    assert not says_suspended(job)
    assert "disruptions" not in job["status"], "it was asked to stop"

    drained = trained_beyond(resumed_from(namespace, pod) + 50)
    evict(namespace, pod)
    kit.wait_for(namespace, name, lambda job: job["status"].get("disruptions") == 1, 60, "a disruption that is told")
    job = kit.wait_for(
        namespace, name, lambda job: "lostSteps" in job["status"]["lastInterruption"], 300, "training that goes on"
    )
    last = job["status"]["lastInterruption"]
    assert (last["stage"], last["reason"], last["podName"]) == ("train", "Evicted", pod)
    assert last["lostSteps"] == 0, "it had time to save"
    assert last["resumedFromStep"] >= step_of(drained)
    status = kit.get_job(namespace, name)["status"]
    assert (status["attempt"], status["disruptions"]) == (1, 1), "no retry was spent"
    assert status["podName"] != pod

    workbench.set(name, limits={"activeDeadlineSeconds": 1})
    failed = workbench.wait(name, "Failed", 60)["status"]["failure"]
    assert (failed["stage"], failed["reason"]) == ("train", "DeadlineExceeded")
    workbench.delete(name)


def resumed_from(namespace: str, pod: str) -> int:
    """The step of the checkpoint that a train pod went on from, by its log."""
    found = re.search(r"Going on from the checkpoint of step (\d+)", kit.logs(namespace, pod))
    assert found, "it has begun anew"
    return int(found[1])
