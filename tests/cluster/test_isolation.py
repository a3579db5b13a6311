"""What pods can reach, tried from inside them: the cluster enforces the NetworkPolicies."""

import json

from tests.cluster import kit
from tests.cluster.workbench import Workbench, long_classification

PROBE = """
import json, socket, sys
def reach(host, port):
    try:
        socket.create_connection((host, port), timeout=3).close()
        return True
    except OSError:
        return False
print(json.dumps({name: reach(*address) for name, address in json.loads(%r).items()}))
"""

LISTEN = """
import http.server, threading
for port in (8000, 9400):
    threading.Thread(target=http.server.HTTPServer(('', port), http.server.SimpleHTTPRequestHandler).serve_forever).start()
"""


def probe(workbench: Workbench, pod: str, addresses: dict[str, tuple[str, int]]) -> dict[str, bool]:
    return json.loads(workbench.python(pod, PROBE % json.dumps(addresses)))


def test_a_train_pod_reaches_nothing_and_is_reached_by_the_operator_only(workbench: Workbench) -> None:
    name = workbench.submit(long_classification(steps=100000))
    train = workbench.running_pod(name, "train")
    kit.wait_for(
        workbench.namespace, name, lambda job: (job["status"].get("progress") or {}).get("step"), 60,
        "the operator reads the train pod's progress",
    )  # fmt: skip
    api = json.loads(kit.kubectl("get", "endpoints", "kubernetes", "-o", "json"))["subsets"][0]
    service = json.loads(kit.kubectl("get", "service", "kubernetes", "-o", "json"))["spec"]
    dns = json.loads(kit.kubectl("-n", "kube-system", "get", "service", "kube-dns", "-o", "json"))["spec"]
    with (
        workbench.helper("neighbour", {"models": "/models"}) as neighbour,
        workbench.helper("free", {"models": "/models"}),
    ):
        command = ["-n", workbench.namespace, "exec", neighbour, "--", "sh", "-c"]
        kit.kubectl(*command, f'cd /tmp && nohup python -c "{LISTEN}" >/dev/null 2>&1 &')
        address = kit.pod_ip(neighbour, workbench.namespace)
        targets = {
            "API server": (service["clusterIP"], 443),
            "API server's own address, outside the pods' network": (api["addresses"][0]["ip"], api["ports"][0]["port"]),
            "DNS": (dns["clusterIP"], 53),
            "another pod": (address, 8000),
            "another pod's telemetry port": (address, 9400),
        }

        def listens() -> bool:
            return probe(workbench, "free", {"neighbour": (address, 8000)})["neighbour"]

        kit.wait_until(listens, 20, "the neighbour listens")
        assert set(probe(workbench, "free", targets).values()) == {True}, "without a policy all of them are reached"
        assert set(probe(workbench, train["metadata"]["name"], targets).values()) == {False}
        itself = {"telemetry": (train["status"]["podIP"], 9400)}
        assert probe(workbench, "free", itself) == {"telemetry": False}, "no stranger reads the telemetry"
    spec = train["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert not any("token" in (mount["mountPath"]) for mount in spec["containers"][0]["volumeMounts"])
    assert not any("secret" in volume for volume in spec["volumes"])
    write = "import pathlib\ntry:\n    pathlib.Path('/opt/x').write_text('x'); print('written')\nexcept OSError as e: print(e.errno)"
    assert workbench.python(train["metadata"]["name"], write).strip() in ("13", "30"), (
        "the root filesystem is read-only"
    )
    workbench.delete(name)
