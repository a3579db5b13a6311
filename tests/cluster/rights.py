"""Which rights the operator uses, and which it lacks: told by its own metrics, collected during a whole run of tests."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import urllib3
from finetune_operator.request_counter import NO_ANSWER
from kubernetes import client, config
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import install, kit

EVERY_SECONDS = 5.0
REQUESTS = "finetune_operator_api_requests_total"
FORBIDDEN = "finetune_operator_api_requests_forbidden_total"


@dataclass
class Rights:
    """Verb and resource, as in `list jobs.batch`."""

    used: set[str] = field(default_factory=set)
    """By a request that RBAC let pass, whatever became of it."""
    refused: set[str] = field(default_factory=set)
    """By RBAC, at least once."""

    @property
    def missing(self) -> set[str]:
        """Refused whenever they were asked for: an API server that has just started refuses everybody everything until
        it has read the roles, and there are tests that restart it.
        """
        return self.refused - self.used

    def add(self, metrics: str) -> None:
        """What one pod's metrics tell."""
        for family in _request_metrics(metrics):
            for sample in family.samples:
                labels = sample.labels
                right = f"{labels['verb']} {labels['resource']}"
                if sample.name == FORBIDDEN:
                    self.refused.add(right)
                elif labels["code"] not in ("403", NO_ANSWER):
                    self.used.add(right)


def _request_metrics(metrics: str) -> Iterator[Metric]:
    lines = [line for line in metrics.splitlines() if line.startswith((REQUESTS, FORBIDDEN))]
    return text_string_to_metric_families("\n".join(lines) + "\n")


class RightsWatch(Rights):
    """Asks every pod of the operator, every few seconds, for there are tests that kill them; `with` it, it runs."""

    def __init__(self) -> None:
        super().__init__()
        self._api = client.CoreV1Api(config.new_client_from_config())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rights", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def look(self) -> None:
        """One round. A pod that is coming or going has nothing to tell."""
        try:
            pods = self._api.list_namespaced_pod(kit.SYSTEM_NAMESPACE, label_selector=kit.OPERATOR_SELECTOR).items
        except (client.ApiException, urllib3.exceptions.HTTPError):
            return
        for pod in pods:
            try:
                answer = self._api.connect_get_namespaced_pod_proxy_with_path(
                    f"{pod.metadata.name}:8080", kit.SYSTEM_NAMESPACE, "metrics",
                    _preload_content=False, _request_timeout=10,
                )  # fmt: skip
            except (client.ApiException, urllib3.exceptions.HTTPError):
                continue
            self.add(answer.data.decode())

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self.look()


def granted() -> set[str]:
    """The rights that the installed chart gives to the operator."""
    names = (f"clusterrole/{install.RELEASE}", f"role/{install.RELEASE}-leader")
    roles = kit.kubectl("-n", kit.SYSTEM_NAMESPACE, "get", *names, "-o", "json")
    return {
        f"{verb} {_qualified(resource, group)}"
        for role in json.loads(roles)["items"]
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _qualified(resource: str, group: str) -> str:
    plural, _, subresource = resource.partition("/")
    return plural + (f".{group}" if group else "") + (f"/{subresource}" if subresource else "")
