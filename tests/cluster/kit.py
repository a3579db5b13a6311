"""What the cluster tests say to the cluster: kubectl in, Python values out."""

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from finetune_api.constants import JOB_LABEL, STAGE_LABEL, Phase, Stage

Manifest = Mapping[str, Any]
T = TypeVar("T")

ROOT = Path(__file__).parents[2]
SYSTEM_NAMESPACE = "finetune-system"
OPERATOR_SELECTOR = "app.kubernetes.io/name=finetune-operator"


class CommandError(AssertionError):
    """A command ended with an error; the message is what it said."""


def run(*command: str, input: str | None = None, timeout: float = 120) -> str:
    """Standard output of a command; raises CommandError with both outputs if it fails."""
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)
    if done.returncode:
        raise CommandError(
            f"{' '.join(command)}\nexit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
        )
    return done.stdout


def kubectl(*arguments: str, input: str | None = None, timeout: float = 120) -> str:
    return run("kubectl", *arguments, input=input, timeout=timeout)


def get(kind: str, name: str, namespace: str) -> dict[str, Any] | None:
    """One object, None if there is none."""
    text = kubectl("-n", namespace, "get", kind, name, "--ignore-not-found", "-o", "json")
    return json.loads(text) if text else None


def pod_ip(name: str, namespace: str) -> str:
    """Raises CommandError if there is no such pod."""
    return kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.podIP}")


def items(kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
    return json.loads(kubectl("-n", namespace, "get", kind, "-l", selector, "-o", "json"))["items"]


def apply(manifest: Manifest | Sequence[Manifest] | str, namespace: str | None = None) -> None:
    """`kubectl apply` of one or several objects, or of YAML; server-side, for data may be large.

    Raises CommandError with the API server's words.
    """
    if not isinstance(manifest, str):
        objects = [manifest] if isinstance(manifest, Mapping) else manifest
        manifest = "\n---\n".join(json.dumps(one) for one in objects)
    kubectl(*(["-n", namespace] if namespace else []), "apply", "--server-side", "-f", "-", input=manifest)


def get_job(namespace: str, name: str) -> dict[str, Any]:
    """The FineTuneJob; raises CommandError if there is none. Before its first status it has an empty one."""
    job = json.loads(kubectl("-n", namespace, "get", "finetunejob", name, "-o", "json"))
    return {"status": {}, **job}


def condition(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A condition of a FineTuneJob, empty if it has none of that type."""
    return next((c for c in job["status"].get("conditions", []) if c["type"] == kind), {})


def pods(namespace: str, job: str, stage: Stage | str | None = None) -> list[dict[str, Any]]:
    """Pods of a FineTuneJob, the oldest first."""
    selector = f"{JOB_LABEL}={job}" + (f",{STAGE_LABEL}={stage}" if stage else "")
    return sorted(items("pods", namespace, selector), key=lambda pod: pod["metadata"]["creationTimestamp"])


def operator_pods() -> list[dict[str, Any]]:
    """Pods of the operator that are not on their way out."""
    found = items("pods", SYSTEM_NAMESPACE, OPERATOR_SELECTOR)
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def logs(namespace: str, pod: str, *arguments: str) -> str:
    return kubectl("-n", namespace, "logs", pod, *arguments)


def events(namespace: str, about: str | None = None) -> list[dict[str, Any]]:
    """Events, the oldest first; `about` is the name of the object they are about."""
    found = [e for e in items("events", namespace) if about in (None, e["involvedObject"]["name"])]
    return sorted(found, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")


def wait_until(look: Callable[[], T], timeout: float, what: str, explain: Callable[[], str] | None = None) -> T:
    """Looks once a second until the answer is true, and returns it; raises AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (answer := look()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {timeout:g} s\n{explain() if explain else ''}")
        time.sleep(1)
    return answer


def wait_for_events(namespace: str, about: str, reasons: set[str], kind: str | None = None) -> list[str]:
    """The reasons of all events about it (of that type), once these are among them: events come behind the status."""

    def look() -> list[str] | None:
        found = [event["reason"] for event in events(namespace, about) if kind in (None, event["type"])]
        return found if reasons <= set(found) else None

    found = wait_until(look, 20, f"the events {sorted(reasons)}", lambda: describe(namespace, about))
    assert found is not None
    return found


def wait_for(
    namespace: str, name: str, predicate: Callable[[dict[str, Any]], Any], timeout: float, what: str
) -> dict[str, Any]:
    """The FineTuneJob once it satisfies `predicate`; otherwise an error that shows all there is to know about it."""

    def look() -> dict[str, Any] | None:
        job = get_job(namespace, name)
        return job if predicate(job) else None

    job = wait_until(look, timeout, what, lambda: describe(namespace, name))
    assert job is not None
    return job


def wait_for_phase(namespace: str, name: str, phase: Phase, timeout: float) -> dict[str, Any]:
    """The FineTuneJob once it is in `phase`; fails at once if it ends in another one."""

    def reached(job: dict[str, Any]) -> bool:
        now = job["status"].get("phase")
        if now != phase and now in (Phase.SUCCEEDED, Phase.FAILED):
            raise AssertionError(f"{name} ended in {now}, not in {phase}\n{describe(namespace, name)}")
        return bool(now == phase)

    return wait_for(namespace, name, reached, timeout, f"phase {phase}")


def describe(namespace: str, name: str) -> str:
    """Status, events, children, pods and logs, for the reader of a failed test."""
    parts = [("status", _try(lambda: json.dumps(get_job(namespace, name)["status"], indent=2)))]
    lines = [
        f"{e['type']} {e['involvedObject']['kind']}/{e['involvedObject']['name']} {e['reason']}: {e.get('message')}"
        for e in events(namespace)
    ]
    parts.append(("events", "\n".join(lines[-40:])))
    parts.append(
        ("objects", _try(lambda: kubectl("-n", namespace, "get", "jobs,pods,pvc,cm,svc,netpol", "-o", "wide")))
    )
    for pod in pods(namespace, name):
        pod_name = pod["metadata"]["name"]
        parts.append((f"{pod_name} state", json.dumps(pod["status"].get("containerStatuses"))))
        parts.append((f"{pod_name} log", _try(lambda pod_name=pod_name: logs(namespace, pod_name, "--tail=40"))))
    parts.append(("operator", describe_operator()))
    return "\n".join(f"--- {title}\n{text}" for title, text in parts)


def describe_operator() -> str:
    """State and last words of the operator's pods."""
    parts = [_try(lambda: kubectl("-n", SYSTEM_NAMESPACE, "get", "pods,lease,networkpolicy", "-o", "wide"))]
    for pod in operator_pods():
        name = pod["metadata"]["name"]
        waiting = [status.get("state") for status in pod["status"].get("containerStatuses", [])]
        parts.append(f"{name} {json.dumps(waiting)}")
        parts.append(_try(lambda name=name: logs(SYSTEM_NAMESPACE, name, "--tail=60")))
        parts.append(_try(lambda name=name: "previous: " + logs(SYSTEM_NAMESPACE, name, "--tail=30", "--previous"), ""))
    return "\n".join(filter(None, parts))


def _try(look: Callable[[], str], instead: str | None = None) -> str:
    try:
        return look()
    except (CommandError, subprocess.TimeoutExpired) as error:
        return str(error) if instead is None else instead


@contextmanager
def port_forward(namespace: str, target: str, port: int) -> Iterator[str]:
    """URL of a port of a pod ("name") or Service ("service/name"). The kubelet forwards it, past NetworkPolicies."""
    command = ["kubectl", "-n", namespace, "port-forward", target, f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"127\.0\.0\.1:(\d+)", line)
            assert found, f"{' '.join(command)}: {line}{process.stdout.read()}"
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            process.terminate()


def http_get(namespace: str, target: str, port: int, path: str) -> str:
    """Body of a GET to a pod or Service; raises urllib.error.HTTPError for 4xx and 5xx."""
    with port_forward(namespace, target, port) as url:
        return fetch(url + path)


def fetch(url: str) -> str:
    """Body of a GET; raises urllib.error.HTTPError for 4xx and 5xx."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def restricted_namespace(name: str) -> Manifest:
    """A Namespace that refuses every pod that is not of the Pod Security level `restricted`."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
