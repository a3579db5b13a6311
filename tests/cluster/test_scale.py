"""Training on two nodes: its pods find each other and nobody else, and the loss of one costs nothing but time.

The test cluster has one node, so both pods are on it; their workspace is a claim of the user's own, which is all that
several nodes need.
"""

import json
import signal
from typing import Any

import pytest
from finetune_api.constants import MASTER_PORT, TELEMETRY_PORT

from tests.cluster import kit
from tests.cluster.test_faults import signal_container, step_of
from tests.cluster.test_isolation import PORT, expect, listening
from tests.cluster.test_jobs import wait_until_gone
from tests.cluster.workbench import Workbench, long_classification, tiny_generation

CLAIM = "shared"
STEPS = 200

ADDRESS = """
import os, socket
name = os.environ['FINETUNE_MASTER_ADDR']
print(os.environ['FINETUNE_NODE_RANK'], name, os.environ['FINETUNE_MASTER_PORT'], socket.gethostbyname(name))
"""


@pytest.fixture(scope="module")
def bench(workbench: Workbench) -> Workbench:
    """The workbench with an empty claim for the workspaces."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    workbench.apply(claim)
    return workbench


def nodes(bench: Workbench, name: str) -> dict[int, dict[str, Any]]:
    """The running train pods by the number of their node."""
    return {
        int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]): pod
        for pod in kit.pods(bench.namespace, name, "train")
        if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
    }


def wait_for_both(bench: Workbench, name: str) -> list[dict[str, Any]]:
    def both() -> bool:
        return len(nodes(bench, name)) == 2

    kit.wait_until(both, 120, "two running train pods", lambda: kit.describe(bench.namespace, name))
    found = nodes(bench, name)
    return [found[0], found[1]]


def test_two_pods_find_each_other_by_name_and_reach_nobody_else(bench: Workbench) -> None:
    spec = long_classification(steps=100_000, resources={"nodes": 2}, workspace={"claimName": CLAIM})
    name = bench.submit(spec)
    first, second = wait_for_both(bench, name)
    master = f"{name}-train-0.{name}-train"
    for rank, pod in enumerate((first, second)):
        found = bench.python(pod["metadata"]["name"], ADDRESS).split()
        assert found == [str(rank), master, str(MASTER_PORT), first["status"]["podIP"]]
    service = kit.get("service", f"{name}-train", bench.namespace)
    assert service is not None and service["spec"]["clusterIP"] == "None"

    api = json.loads(kit.kubectl("get", "service", "kubernetes", "-o", "json"))["spec"]
    with (
        bench.helper("stranger", {}) as stranger,
        listening(bench, stranger, PORT),
        listening(bench, first["metadata"]["name"], PORT),
    ):
        address, peer = kit.pod_ip(stranger, bench.namespace), first["status"]["podIP"]
        others = {
            "peer by its name": (master, PORT),
            "peer's telemetry": (peer, TELEMETRY_PORT),
            "API server": (api["clusterIP"], 443),
            "stranger": (address, PORT),
        }
        expect(bench, second["metadata"]["name"], others, {"peer by its name", "peer's telemetry"})
        theirs = {"itself": (address, PORT), "peer": (peer, PORT), "peer's telemetry": (peer, TELEMETRY_PORT)}
        expect(bench, stranger, theirs, {"itself"})
    bench.delete(name)
    wait_until_gone(bench.namespace, name, timeout=150)


def test_a_lost_pod_changes_nothing_and_two_pods_learn_what_one_learns(bench: Workbench) -> None:
    training = {
        "maxSteps": STEPS,
        "learningRate": 0.001,
        "maxLength": 64,
        "batchSize": {"sequences": 8},
        "checkpointSteps": 20,
        "evaluationSteps": 1,  # so that every step has a line of its own in the log
    }
    spec = tiny_generation(training=training, method={"lora": {"dropout": 0}}, workspace={"claimName": CLAIM})
    alone = bench.submit(spec)
    together = bench.submit({**spec, "resources": {"nodes": 2}})
    kit.wait_for(bench.namespace, together, lambda job: step_of(job) > 40, 180, "training under way")
    _, second = wait_for_both(bench, together)
    signal_container(second, signal.SIGKILL)  # a deletion, even one with no grace, would ask it to stop first
    kit.wait_for(bench.namespace, together, lambda job: job["status"].get("attempt") == 2, 60, "attempt 2")
    jobs = {name: bench.wait(name, "Succeeded", 400) for name in (alone, together)}
    status = jobs[together]["status"]
    assert status["attempt"] == 1, "that of publish"
    assert status["resolved"]["device"].startswith("2 nodes x ")
    assert step_of(jobs[together]) == STEPS

    train = kit.pods(bench.namespace, together, "train")
    last = [p for p in train if p["status"]["phase"] == "Succeeded"]
    assert len(last) == 2 and len(train) >= 3, "the victim of the lost pod began anew too"
    logs = [kit.logs(bench.namespace, pod["metadata"]["name"]) for pod in last]
    assert any("Going on from the checkpoint of step" in log for log in logs)

    expected, found = curve(bench, jobs[alone]), curve(bench, jobs[together])
    assert list(found) == list(expected) == list(range(1, STEPS + 1)), "every step once"
    for step, losses in expected.items():
        assert found[step] == pytest.approx(losses, abs=1e-4), f"training and evaluation loss of step {step}"
    assert expected[STEPS]["evaluation"] < expected[1]["evaluation"]
    for name in jobs:
        bench.delete(name)


def curve(bench: Workbench, job: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Losses of each step, from report/training.jsonl in the workspace."""
    folder = f"{job['metadata']['name']}-{job['metadata']['uid'][:8]}"
    with bench.helper("reader", {CLAIM: "/shared"}) as reader:
        text = bench.python(reader, f"print(open('/shared/{folder}/report/training.jsonl').read())")
    losses: dict[int, dict[str, float]] = {}
    for line in map(json.loads, text.strip().split("\n")):
        step = losses.setdefault(line["step"], {})
        new = (
            {"training": line["trainingLoss"]} if "trainingLoss" in line else {"evaluation": line["evaluation"]["loss"]}
        )
        assert not step.keys() & new.keys(), f"step {line['step']} was done twice"
        step |= new
    return losses
