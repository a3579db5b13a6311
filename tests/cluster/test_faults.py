"""Killed trainers and operators: nothing is lost, nothing happens twice."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from finetune_operator.render.network import GUARD

from tests.cluster import kit
from tests.cluster.test_jobs import wait_until_gone
from tests.cluster.workbench import Workbench, config_map, jsonl, long_classification, tiny_classification


def signal_container(pod: dict[str, Any], number: signal.Signals) -> None:
    """A signal to the container's processes, from the node (inside, the kernel protects the first one)."""
    container = pod["status"]["containerStatuses"][0]["containerID"].split("//")[1]
    sent = False
    for cgroup in Path("/proc").glob("[0-9]*/cgroup"):
        try:
            ours = container in cgroup.read_text()
        except OSError:
            continue
        if ours:
            os.kill(int(cgroup.parent.name), number)
            sent = True
    assert sent, "the container's process was not found on this machine"


def kill_operators() -> None:
    """Both replicas at once, with no time to say good-bye."""
    kit.kubectl(
        "-n",
        kit.SYSTEM_NAMESPACE,
        "delete",
        "pods",
        "-l",
        kit.OPERATOR_SELECTOR,
        "--grace-period=0",
        "--force",
        "--wait=false",
    )


def wait_for_operators() -> None:
    kit.kubectl(
        "-n", kit.SYSTEM_NAMESPACE, "rollout", "status", "deployment/finetune-operator", "--timeout=90s", timeout=100
    )


@contextmanager
def operator_away() -> Iterator[None]:
    """No replica of the operator runs."""
    scale = ["-n", kit.SYSTEM_NAMESPACE, "scale", "deployment/finetune-operator"]
    kit.kubectl(*scale, "--replicas=0")
    kit.wait_until(lambda: not kit.items("pods", kit.SYSTEM_NAMESPACE, kit.OPERATOR_SELECTOR), 60, "no operator")
    try:
        yield
    finally:
        kit.kubectl(*scale, "--replicas=2")
        wait_for_operators()


def leader() -> str:
    lease = kit.get("lease", "finetune-operator", kit.SYSTEM_NAMESPACE)
    return str((lease or {}).get("spec", {}).get("holderIdentity") or "")


def wait_for_a_leader(other_than: str = "") -> str:
    def look() -> str:
        holder = leader()
        return holder if holder != other_than and holder in {p["metadata"]["name"] for p in kit.operator_pods()} else ""

    return kit.wait_until(look, 60, "a leader", kit.describe_operator)


def restart_api_server() -> None:
    """kill -9; all watches of all programs break. The cluster's own tool brings it back, where there is one."""
    tool = os.environ.get("FINETUNE_CLUSTER_TOOL")
    if tool is None:
        return
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if Path(command_line.read_text().split("\0")[0]).name == "kube-apiserver":
                os.kill(int(command_line.parent.name), signal.SIGKILL)

    def is_back() -> bool:
        with suppress(kit.CommandError):
            kit.run(tool, "up")
            return kit.kubectl("get", "--raw=/readyz") == "ok"
        return False

    kit.wait_until(is_back, 90, "the API server")


def step_of(job: dict[str, Any]) -> int:
    return int((job["status"].get("progress") or {}).get("step") or 0)


def job_uids(workbench: Workbench, name: str) -> dict[str, str]:
    jobs = kit.items("jobs", workbench.namespace, f"finetune-operator.io/job={name}")
    return {job["metadata"]["name"]: job["metadata"]["uid"] for job in jobs}


def test_a_killed_trainer_resumes_from_its_checkpoint(workbench: Workbench) -> None:
    name = workbench.submit(long_classification(steps=1000))
    workbench.running_pod(name, "train")
    kit.wait_for(workbench.namespace, name, lambda job: step_of(job) > 150, 90, "training under way")
    signal_container(workbench.running_pod(name, "train"), signal.SIGKILL)
    kit.wait_for(workbench.namespace, name, lambda job: job["status"].get("attempt") == 2, 60, "attempt 2")
    job = workbench.wait(name, "Succeeded")
    pods = kit.pods(workbench.namespace, name, "train")
    assert len(pods) == 2
    log = kit.logs(workbench.namespace, pods[-1]["metadata"]["name"])
    assert "Going on from the checkpoint of step" in log
    assert step_of(job) == 1000
    warnings = [e["message"] for e in kit.events(workbench.namespace, name) if e["type"] == "Warning"]
    assert any("attempt 1 of train failed" in message for message in warnings)
    workbench.delete(name)


def test_a_training_that_hangs_is_told_and_goes_on(workbench: Workbench) -> None:
    name = workbench.submit(long_classification(steps=20_000, limits={"stallSeconds": 60}))
    kit.wait_for(workbench.namespace, name, lambda job: step_of(job) > 50, 90, "training under way")
    pod = workbench.running_pod(name, "train")
    signal_container(pod, signal.SIGSTOP)

    def stalled(job: dict[str, Any]) -> bool:
        return kit.condition(job, "Running").get("reason") == "TrainingStalled"

    kill_operators()  # the next leader knows it too
    job = kit.wait_for(workbench.namespace, name, stalled, 150, "Running, TrainingStalled")
    assert kit.condition(job, "Running")["status"] == "True"
    assert pod["metadata"]["name"] in job["status"]["message"]
    signal_container(pod, signal.SIGCONT)
    kit.wait_for(workbench.namespace, name, lambda job: not stalled(job), 60, "no stall any more")
    assert kit.wait_for_events(workbench.namespace, name, {"TrainingStalled"}).count("TrainingStalled") == 1
    workbench.delete(name)
    wait_for_operators()


PHASES = ["Pending", "Preparing", "Queued", "Training", "Publishing", "Succeeded"]


@pytest.mark.parametrize("phase", PHASES)
def test_operators_killed_in_a_phase_lose_and_double_nothing(workbench: Workbench, phase: str) -> None:
    name = workbench.submit(long_classification(steps=300))
    seen: dict[str, str] = {}

    def reached(job: dict[str, Any]) -> bool:  # or a later one: some phases pass in a moment
        seen.update(job_uids(workbench, name))
        now = job["status"].get("phase")
        return now in PHASES and PHASES.index(now) >= PHASES.index(phase)

    kit.wait_for(workbench.namespace, name, reached, 150, phase)
    kill_operators()
    job = workbench.wait(name, "Succeeded", 240)
    wait_for_operators()
    after = job_uids(workbench, name)
    assert set(after) == {f"{name}-prepare", f"{name}-train", f"{name}-publish"}
    assert all(after[child] == uid for child, uid in seen.items()), "no child was made a second time"
    assert len(kit.pods(workbench.namespace, name)) == 3, "one pod per stage"
    assert job["status"]["attempt"] == 1
    assert job["status"]["result"]["artifact"]["sha256"]
    workbench.delete(name)


def test_what_happened_while_the_operator_was_away_is_not_lost(workbench: Workbench) -> None:
    name = workbench.submit(tiny_classification())
    workbench.running_pod(name, "prepare")
    with operator_away():
        done = "jsonpath={.status.succeeded}"
        kit.wait_until(
            lambda: kit.kubectl("-n", workbench.namespace, "get", "job", f"{name}-prepare", "-o", done) == "1",
            90,
            "prepare",
        )
        late = workbench.submit(tiny_classification())
    workbench.wait(name, "Succeeded", 180)
    workbench.wait(late, "Succeeded", 180)
    workbench.delete(name)
    workbench.delete(late)


def test_deletion_needs_no_operator(workbench: Workbench) -> None:
    name = workbench.submit(long_classification(steps=100000))
    workbench.running_pod(name, "train")
    with operator_away():
        workbench.delete(name)
        wait_until_gone(workbench.namespace, name, timeout=150)


def test_the_other_replica_takes_over(workbench: Workbench) -> None:
    first = wait_for_a_leader()
    kit.kubectl("-n", kit.SYSTEM_NAMESPACE, "delete", "pod", first, "--wait=false")
    wait_for_a_leader(other_than=first)
    name = workbench.submit(tiny_classification())
    workbench.wait(name, "Succeeded", 180)
    workbench.delete(name)
    wait_for_operators()


def test_a_broken_job_disturbs_no_other(workbench: Workbench) -> None:
    workbench.apply(config_map("empty-data", {"rows.jsonl": jsonl([])}))
    broken = tiny_classification()
    broken["dataset"] = {**broken["dataset"], "sources": [{"uri": "configmap://empty-data/rows.jsonl"}]}
    names = [workbench.submit(broken), workbench.submit(tiny_classification()), workbench.submit(broken)]
    workbench.wait(names[1], "Succeeded", 240)
    for name in (names[0], names[2]):
        assert workbench.wait(name, "Failed", 60)["status"]["failure"]["reason"] == "DataInvalid"
    for name in names:
        workbench.delete(name)


def test_one_fault_after_the_other_does_a_training_no_harm(workbench: Workbench) -> None:
    """On the real thing what tests/unit/operator/test_faults.py plays."""
    name = workbench.submit(long_classification(steps=20_000))
    in_namespace = ("-n", workbench.namespace)
    train = f"{name}-train"

    def trains_on(after: int) -> None:
        def look(job: dict[str, Any]) -> bool:
            return bool(job["status"].get("phase") == "Training" and step_of(job) > after)

        kit.wait_for(workbench.namespace, name, look, 90, f"training beyond step {after}")

    def patch(kind: str, which: str, namespace: str, body: dict[str, Any], *options: str) -> None:
        kit.kubectl("-n", namespace, "patch", kind, which, "--type=merge", "-p", json.dumps(body), *options)

    trains_on(after=20)
    uid = job_uids(workbench, name)[train]

    forged = {"phase": "Succeeded", "completionTime": "9999-12-31T23:59:59Z", "conditions": None, "attempt": 7}
    patch("ftj", name, workbench.namespace, {"status": forged}, "--subresource=status")
    trains_on(after=20)
    status = workbench.status(name)
    assert (status["attempt"], status.get("completionTime")) == (1, None)
    assert kit.condition(kit.get_job(workbench.namespace, name), "DataReady")["status"] == "True"

    policy = kit.get("networkpolicy", GUARD, workbench.namespace)
    kit.kubectl(*in_namespace, "delete", "networkpolicy", GUARD)
    remade = kit.wait_until(lambda: kit.get("networkpolicy", GUARD, workbench.namespace), 20, "the policy again")
    assert policy is not None and remade is not None and remade["spec"] == policy["spec"]

    wait_for_a_leader()
    patch("lease", "finetune-operator", kit.SYSTEM_NAMESPACE, {"spec": {"holderIdentity": "nobody-we-know"}})
    wait_for_a_leader(other_than="nobody-we-know")
    leading = next(pod for pod in kit.operator_pods() if pod["metadata"]["name"] == leader())
    signal_container(leading, signal.SIGKILL)
    restart_api_server()
    wait_for_a_leader()
    trains_on(after=step_of(kit.get_job(workbench.namespace, name)))
    assert job_uids(workbench, name)[train] == uid, "it is the same Job all the time"

    workbench.set(name, suspend=True)
    kill_operators()
    workbench.set(name, suspend=False)
    kit.kubectl(*in_namespace, "delete", "job", train, "--wait=false")
    kit.kubectl(*in_namespace, "delete", "configmap", train)
    kit.wait_until(lambda: job_uids(workbench, name).get(train, uid) != uid, 150, "another Job")
    pod = workbench.running_pod(name, "train")
    goes_on = "Going on from the checkpoint of step"
    kit.wait_until(
        lambda: goes_on in kit.logs(workbench.namespace, pod["metadata"]["name"]),
        60,
        "a resumed training",
        lambda: kit.describe(workbench.namespace, name),
    )
    workbench.delete(name)
    wait_for_operators()
