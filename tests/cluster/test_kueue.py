"""Trainings in a real Kueue's queue: they wait with its words, give way to others, and go on where they were."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.constants import JOB_LABEL, STAGE_LABEL

from tests.cluster import kit
from tests.cluster.conftest import unavailable
from tests.cluster.install import CLUSTER_TOOL, can_have_kueue
from tests.cluster.test_faults import step_of
from tests.cluster.workbench import Workbench, long_classification, tiny_classification

Job = dict[str, Any]

GPU = "nvidia.com/gpu"
FLAVOR = {
    "nodeLabels": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "example.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
}


def kueue_object(kind: str, name: str, **fields: Any) -> kit.Manifest:
    return {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": kind, "metadata": {"name": name}, **fields}


def cluster_queue(name: str, gpus: int) -> kit.Manifest:
    flavor = {"name": "finetune-tests", "resources": [{"name": GPU, "nominalQuota": gpus}]}
    spec = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": [GPU], "flavors": [flavor]}],
    }
    return kueue_object("ClusterQueue", name, spec=spec)


@pytest.fixture(scope="module")
def queues(workbench: Workbench) -> Iterator[Workbench]:
    """Queues `one-gpu` and `no-gpu` in the workbench, and ranks `low` and `high`."""
    if not can_have_kueue():
        unavailable(f"the cluster has no Kueue, and {CLUSTER_TOOL} is not set to install it")
    if kit.get("crd", "workloads.kueue.x-k8s.io", "default") is None:
        kit.run("bash", os.environ[CLUSTER_TOOL], "kueue", timeout=400)
    cluster = [
        kueue_object("ResourceFlavor", "finetune-tests", spec=FLAVOR),
        *(cluster_queue(f"finetune-tests-{name}", gpus) for name, gpus in (("one-gpu", 1), ("no-gpu", 0))),
        *(kueue_object("WorkloadPriorityClass", name, value=value) for name, value in (("low", 1), ("high", 9))),
    ]
    local = [
        kueue_object("LocalQueue", name, spec={"clusterQueue": f"finetune-tests-{name}"})
        for name in ("one-gpu", "no-gpu")
    ]
    kit.apply(cluster)
    workbench.apply(*local)
    yield workbench
    for manifest in [*cluster[1:], cluster[0]]:
        kit.kubectl("delete", manifest["kind"], manifest["metadata"]["name"], "--wait=false", "--ignore-not-found")


def queued(spec: Job, queue: str, rank: str) -> Job:
    scheduling = {"queueName": queue, "workloadPriorityClassName": rank}
    return spec | {"resources": {"gpus": 1, "allowCpuFallback": True}, "scheduling": scheduling}


@pytest.fixture(scope="module")
def endless(queues: Workbench) -> str:
    """A training that has the only GPU and does not end by itself."""
    return queues.submit(queued(long_classification(steps=100_000), "one-gpu", "low"))


@pytest.fixture(scope="module")
def hopeless(queues: Workbench) -> str:
    """One for which there is no quota anywhere."""
    return queues.submit(queued(tiny_classification(), "no-gpu", "low"))


@pytest.fixture(scope="module")
def second(queues: Workbench, endless: str) -> str:
    """One that comes after the endless one has the GPU."""
    wait_for_training(queues, endless, 0)
    return queues.submit(queued(tiny_classification(), "one-gpu", "low"))


def job_of(bench: Workbench, name: str, stage: str) -> Job:
    (job,) = kit.items("jobs", bench.namespace, f"{JOB_LABEL}={name},{STAGE_LABEL}={stage}")
    return job


def wait_for_training(bench: Workbench, name: str, beyond: int) -> Job:
    what = f"{name} training beyond step {beyond}"
    return kit.wait_for(bench.namespace, name, lambda job: step_of(job) > beyond, 300, what)


def wait_for_words(bench: Workbench, name: str, words: str, timeout: float = 240) -> Job:
    """The job once it is Queued and says these words of Kueue's."""

    def says(job: Job) -> bool:
        return job["status"].get("phase") == "Queued" and words in job["status"].get("message", "")

    return kit.wait_for(bench.namespace, name, says, timeout, f"{name} queued: {words}")


def test_training_alone_queues_and_without_quota_it_says_why(queues: Workbench, endless: str, hopeless: str) -> None:
    wait_for_training(queues, endless, 50)
    wait_for_words(queues, hopeless, "in queue no-gpu: ")
    for name in (endless, hopeless):
        labels = {stage: job_of(queues, name, stage)["metadata"]["labels"] for stage in ("prepare", "train")}
        assert labels["train"]["kueue.x-k8s.io/priority-class"] == "low"
        assert not any("kueue" in label for label in labels["prepare"])


def test_a_training_gives_way_to_one_of_higher_rank_and_goes_on_at_its_step(
    queues: Workbench, endless: str, second: str
) -> None:
    admitted = job_of(queues, endless, "train")
    wait_for_words(queues, second, "insufficient unused quota")
    before = kit.get_job(queues.namespace, endless)
    urgent = queues.submit(queued(tiny_classification(), "one-gpu", "high"))

    def is_told(job: Job) -> bool:
        return bool(job["status"].get("lastInterruption", {}).get("reason") == "Preempted")

    kit.wait_for(queues.namespace, endless, is_told, 240, "preemption")
    wait_for_words(queues, endless, "in queue one-gpu: ")

    def goes_on(job: Job) -> bool:
        return "lostSteps" in job["status"]["lastInterruption"]

    status = kit.wait_for(queues.namespace, endless, goes_on, 300, "training that goes on")["status"]
    assert status["lastInterruption"]["resumedFromStep"] >= step_of(before)
    assert status["lastInterruption"]["lostSteps"] == 0, "it had time to save"
    assert (status["attempt"], status["disruptions"]) == (1, 1), "no retry was spent"
    assert job_of(queues, endless, "train")["metadata"]["uid"] == admitted["metadata"]["uid"]
    pod = queues.running_pod(endless, "train")["spec"]
    assert pod["nodeSelector"] == FLAVOR["nodeLabels"], "what Kueue puts into the Job stays there"
    assert FLAVOR["tolerations"][0] in pod["tolerations"]
    queues.wait(urgent, "Succeeded")


def test_a_suspended_training_leaves_its_gpu_to_the_next_and_goes_on(
    queues: Workbench, endless: str, second: str, hopeless: str
) -> None:
    wait_for_training(queues, endless, 50)
    queues.set(endless, suspend=True)
    queues.wait(endless, "Suspended", 60)
    queues.wait(second, "Succeeded")
    assert not kit.pods(queues.namespace, endless, "train")
    suspended = kit.get_job(queues.namespace, endless)
    queues.set(endless, suspend=False)
    wait_for_training(queues, endless, step_of(suspended))
    log = kit.logs(queues.namespace, queues.running_pod(endless, "train")["metadata"]["name"])
    assert "Going on from the checkpoint of step" in log
    wait_for_words(queues, hopeless, "maximum capacity (0)", 1)  # all this time
    for name in (endless, second, hopeless):
        queues.delete(name)
