"""What goes wrong is told: which field or file and line, what the cluster said, and what to do."""

import json

from tests.cluster import kit
from tests.cluster.test_jobs import wait_until_gone
from tests.cluster.workbench import Workbench, config_map, jsonl, tiny_classification


def stages_with_jobs(workbench: Workbench, name: str) -> set[str]:
    jobs = kit.items("jobs", workbench.namespace, f"finetune-operator.io/job={name}")
    return {job["metadata"]["labels"]["finetune-operator.io/stage"] for job in jobs}


def test_bad_data_fails_in_prepare_with_file_and_line(workbench: Workbench) -> None:
    secret = "the-text-of-a-customer"
    rows = [{"text": f"row {i} rises", "label": "good"} for i in range(30)]
    rows += [{"text": f"row {i} falls", "label": "bad"} for i in range(30)]
    rows[41] = {"text": secret, "label": 7.5}
    workbench.apply(config_map("bad-data", {"rows.jsonl": jsonl(rows)}))
    spec = tiny_classification()
    spec["dataset"] = {**spec["dataset"], "sources": [{"uri": "configmap://bad-data/rows.jsonl"}]}
    name = workbench.submit(spec)
    job = workbench.wait(name, "Failed")
    failure = job["status"]["failure"]
    assert (failure["stage"], failure["reason"], failure["exitCode"]) == ("prepare", "DataInvalid", 64)
    assert "rows.jsonl" in failure["message"] and "42" in failure["message"]
    assert kit.condition(job, "DataReady")["status"] == "False"
    assert stages_with_jobs(workbench, name) == {"prepare"}, "no GPU was ever asked for"
    assert len(kit.pods(workbench.namespace, name)) == 1, "a user's error is not tried again"
    everything = json.dumps(job) + json.dumps(kit.events(workbench.namespace, name))
    everything += kit.logs(workbench.namespace, kit.pods(workbench.namespace, name)[0]["metadata"]["name"])
    assert secret not in everything
    workbench.delete(name)


def test_a_missing_accelerator_is_a_failure_unless_allowed(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(resources={"gpus": 1}))
    failure = workbench.wait(name, "Failed")["status"]["failure"]
    assert (failure["stage"], failure["reason"]) == ("train", "AcceleratorMissing")
    assert "allowCpuFallback" in failure["message"]
    workbench.delete(name)


def test_a_model_that_does_not_exist_is_named(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(model={"uri": "pvc://models/no-such-model"}))
    failure = workbench.wait(name, "Failed")["status"]["failure"]
    assert failure["reason"] == "ModelNotFound"
    assert "no-such-model" in failure["message"]
    workbench.delete(name)


def test_out_of_memory_is_reported_as_such(workbench: Workbench) -> None:
    resources = {"prepare": {"limits": {"memory": "120Mi"}}}
    name = workbench.submit(tiny_classification(resources=resources, limits={"retries": 0}))
    failure = workbench.wait(name, "Failed")["status"]["failure"]
    assert (failure["stage"], failure["reason"]) == ("prepare", "OOMKilled")
    assert "120Mi" in failure["message"] and "resources.prepare.limits.memory" in failure["message"]
    workbench.delete(name)


def test_a_training_that_cannot_fit_its_memory_is_never_begun(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(resources={"limits": {"memory": "120Mi"}}))
    job = workbench.wait(name, "Failed")
    assert kit.condition(job, "MemoryFits")["reason"] == job["status"]["failure"]["reason"] == "InsufficientMemory"
    assert "raise resources.limits.memory to 1Gi" in job["status"]["failure"]["message"]
    workbench.delete(name)


def test_a_pod_that_cannot_be_scheduled_tells_the_schedulers_words(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(scheduling={"nodeSelector": {"no-such": "label"}}))

    def unschedulable(job: dict[str, object]) -> bool:
        return kit.condition(job, "Running").get("reason") == "Unschedulable"

    job = kit.wait_for(workbench.namespace, name, unschedulable, 60, "Running=False, Unschedulable")
    assert "node" in job["status"]["message"] and "available" in job["status"]["message"]
    assert job["status"]["phase"] == "Pending"
    kit.wait_for_events(workbench.namespace, name, {"Unschedulable"}, "Warning")
    workbench.delete(name)


def test_a_pod_that_the_cluster_refuses_tells_the_clusters_words(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification(scheduling={"priorityClassName": "no-such-class"}))

    def told(job: dict[str, object]) -> bool:
        return kit.condition(job, "Running").get("reason") == "PodRefused"

    job = kit.wait_for(workbench.namespace, name, told, 60, "Running=False, PodRefused")
    assert "no-such-class" in job["status"]["message"]
    workbench.delete(name)


def test_a_source_that_does_not_exist_tells_the_kubelets_words(workbench: Workbench) -> None:
    spec = tiny_classification()
    spec["dataset"] = {**spec["dataset"], "sources": [{"uri": "configmap://not-there/rows.jsonl"}]}
    name = workbench.submit(spec)

    def told(job: dict[str, object]) -> bool:
        return kit.condition(job, "Running").get("reason") == "ContainerConfigError"

    job = kit.wait_for(workbench.namespace, name, told, 90, "Running=False, ContainerConfigError")
    assert "not-there" in job["status"]["message"]
    workbench.delete(name)


def test_a_foreign_job_of_the_same_name_fails_this_one_only(workbench: Workbench) -> None:
    foreign = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "clash-prepare"},
        "spec": {
            "suspend": True,
            "template": {
                "spec": {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]},
            },
        },
    }
    workbench.apply(foreign)
    before = kit.get("job", "clash-prepare", workbench.namespace)
    workbench.submit(tiny_classification(), "clash")
    failure = workbench.wait("clash", "Failed", 60)["status"]["failure"]
    assert failure["reason"] == "NameClash"
    assert "clash-prepare" in failure["message"]
    after = kit.get("job", "clash-prepare", workbench.namespace)
    assert before is not None and after is not None
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])
    workbench.delete("clash")
    kit.kubectl("-n", workbench.namespace, "delete", "job", "clash-prepare")


def test_a_child_that_the_api_server_refuses_fails_the_job_with_its_words(workbench: Workbench) -> None:
    toleration = {"key": "dedicated", "operator": "Exists", "value": "gpu"}
    name = workbench.submit(tiny_classification(scheduling={"tolerations": [toleration]}))
    failure = workbench.wait(name, "Failed", 60)["status"]["failure"]
    assert failure["reason"] == "InvalidSpec"
    assert "tolerations" in failure["message"] and "Exists" in failure["message"]
    workbench.set(name, limits={"ttlSecondsAfterFinished": 0})
    wait_until_gone(workbench.namespace, name)
