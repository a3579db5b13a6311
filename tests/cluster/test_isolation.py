"""What pods can reach, and who reaches them, tried from inside: the cluster enforces the NetworkPolicies."""

import http.server
import json
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from finetune_api.constants import TELEMETRY_PORT, Stage
from finetune_operator.render.network import GUARD, METADATA_SERVICES
from finetune_operator.settings import OPERATOR_LABELS

from tests.cluster import kit
from tests.cluster.test_faults import signal_container
from tests.cluster.workbench import Workbench, helper_pod, tiny_classification

Address = tuple[str, int]

PORT = 8000
"""Of servers that no policy knows of."""

PROBE = """
import json, socket
from concurrent.futures import ThreadPoolExecutor
def reach(address):
    try:
        socket.create_connection(address, timeout=3).close()
        return True
    except OSError:
        return False
addresses = json.loads(%r)
with ThreadPoolExecutor() as pool:
    print(json.dumps(dict(zip(addresses, pool.map(reach, addresses.values())))))
"""

LISTEN = """
import http.server, os, sys, threading
for port in %r:
    threading.Thread(target=http.server.HTTPServer(('', port), http.server.BaseHTTPRequestHandler).serve_forever).start()
print('ready', flush=True)
sys.stdin.read()
os._exit(0)
"""

WAIT_FOR_TELEMETRY = f"""
import socket, time
while socket.socket().connect_ex(('127.0.0.1', {TELEMETRY_PORT})):
    time.sleep(0.05)
"""

FORBIDDEN = """
import pathlib
print(pathlib.Path('/var/run/secrets/kubernetes.io').exists())
try:
    pathlib.Path('/opt/x').write_text('x')
except OSError as error:
    print(error.errno)
"""


def probe(bench: Workbench, pod: str, addresses: Mapping[str, Address]) -> dict[str, bool]:
    """Which of these take a TCP connection from that pod."""
    return json.loads(bench.python(pod, PROBE % json.dumps(addresses)))


@contextmanager
def listening(bench: Workbench, pod: str, *ports: int) -> Iterator[None]:
    """Servers in a pod; they end when their input does."""
    command = ["kubectl", "-n", bench.namespace, "exec", "-i", pod, "--", "python", "-c", LISTEN % (ports,)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"no server in {pod}"
        yield


def expect(bench: Workbench, pod: str, addresses: Mapping[str, Address], reached: set[str]) -> None:
    """Of these addresses the pod reaches `reached` and no others; a policy takes a moment."""
    found: dict[str, bool] = {}

    def as_expected() -> bool:
        found.update(probe(bench, pod, addresses))
        return {name for name, is_reached in found.items() if is_reached} == reached

    kit.wait_until(as_expected, 20, f"{pod} reaches {reached or 'nothing'}", lambda: json.dumps(found))


@contextmanager
def metadata_service() -> Iterator[Address]:
    """A server on an address at which a cloud would hand out the node's credentials."""
    host = METADATA_SERVICES["0.0.0.0/0"][1].partition("/")[0]
    kit.run("ip", "address", "add", f"{host}/32", "dev", "lo")
    try:
        with http.server.HTTPServer((host, PORT), http.server.BaseHTTPRequestHandler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield host, PORT
            server.shutdown()
    finally:
        kit.run("ip", "address", "del", f"{host}/32", "dev", "lo")


@contextmanager
def frozen(bench: Workbench, pod: dict[str, Any]) -> Iterator[str]:
    """The name of a trainer's pod, while its program stands still and its telemetry port stays open."""
    bench.python(pod["metadata"]["name"], WAIT_FOR_TELEMETRY)
    signal_container(pod, signal.SIGSTOP)
    try:
        yield pod["metadata"]["name"]
    finally:
        signal_container(pod, signal.SIGCONT)


@pytest.fixture(scope="module")
def targets(workbench: Workbench) -> Iterator[dict[str, Address]]:
    """What a pod might want to reach; without a policy it does."""
    api = json.loads(kit.kubectl("get", "endpoints", "kubernetes", "-o", "json"))["subsets"][0]
    service = json.loads(kit.kubectl("get", "service", "kubernetes", "-o", "json"))["spec"]
    dns = json.loads(kit.kubectl("-n", "kube-system", "get", "service", "kube-dns", "-o", "json"))["spec"]
    with (
        metadata_service() as metadata,
        workbench.helper("neighbour", {}) as neighbour,
        workbench.helper("free", {}) as free,
        listening(workbench, neighbour, PORT, TELEMETRY_PORT),
    ):
        address = kit.pod_ip(neighbour, workbench.namespace)
        found = {
            "API server": (service["clusterIP"], 443),
            "API server's own address": (api["addresses"][0]["ip"], api["ports"][0]["port"]),
            "DNS": (dns["clusterIP"], 53),
            "pod": (address, PORT),
            "pod's telemetry port": (address, TELEMETRY_PORT),
            "metadata service": metadata,
        }
        expect(workbench, free, found, set(found))
        yield found


@pytest.fixture
def impostor(workbench: Workbench, namespace: str) -> Iterator[Workbench]:
    """A namespace with the pod `impostor`, which bears the operator's labels."""
    bench = Workbench(namespace, workbench.image)
    with bench.helper("impostor", {}, OPERATOR_LABELS):
        yield bench


def operator_pod() -> str:
    return kit.operator_pods()[0]["metadata"]["name"]


def test_each_stage_reaches_what_it_needs_and_is_reached_by_the_operator_only(
    workbench: Workbench, impostor: Workbench, targets: dict[str, Address]
) -> None:
    operator = Workbench(kit.SYSTEM_NAMESPACE, "")
    reached = {
        Stage.PREPARE: set(targets) - {"metadata service"},  # it downloads
        Stage.TRAIN: set(),
        Stage.PUBLISH: set(targets) - {"metadata service"},  # it uploads
    }
    name = workbench.submit(tiny_classification())
    for stage in Stage:
        pod = workbench.running_pod(name, stage)
        with frozen(workbench, pod) as running, listening(workbench, running, PORT):
            ports = {"telemetry": (pod["status"]["podIP"], TELEMETRY_PORT), "other": (pod["status"]["podIP"], PORT)}
            expectations = (
                (workbench, running, targets | ports, reached[stage] | set(ports)),
                (operator, operator_pod(), ports, {"telemetry"}),
                (workbench, "free", ports, set()),
                (impostor, "impostor", ports, set()),
            )
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda each: expect(*each), expectations))
            assert pod["spec"]["automountServiceAccountToken"] is False
            has_token, errno = workbench.python(running, FORBIDDEN).split()
            assert has_token == "False", "no service account's token is there"
            assert errno in ("13", "30"), "the root filesystem is read-only"
    workbench.wait(name, "Succeeded")
    workbench.delete(name)
    assert kit.get("networkpolicy", GUARD, workbench.namespace), "no pod is without it while it ends"


def test_the_operator_reaches_api_server_dns_and_trainers_and_serves_one_port(
    workbench: Workbench, targets: dict[str, Address]
) -> None:
    operator, name = Workbench(kit.SYSTEM_NAMESPACE, ""), operator_pod()
    expect(operator, name, targets, {"API server", "API server's own address", "DNS"})
    address = kit.pod_ip(name, kit.SYSTEM_NAMESPACE)
    ports = {"metrics": (address, 8080), "other": (address, PORT)}
    with listening(operator, name, PORT):
        expect(operator, name, ports, {"metrics", "other"})
        expect(workbench, "free", ports, {"metrics"})


def test_no_namespace_of_the_operator_admits_a_pod_below_restricted(workbench: Workbench) -> None:
    """And so all pods that the other tests have seen run are of the level `restricted`."""
    for namespace in (workbench.namespace, kit.SYSTEM_NAMESPACE):
        pod = helper_pod("loose", workbench.image, {})
        kit.kubectl("-n", namespace, "create", "--dry-run=server", "-f", "-", input=json.dumps(pod))
        pod["spec"]["securityContext"]["runAsNonRoot"] = False
        with pytest.raises(kit.CommandError, match='violates PodSecurity "restricted'):
            kit.kubectl("-n", namespace, "create", "--dry-run=server", "-f", "-", input=json.dumps(pod))
