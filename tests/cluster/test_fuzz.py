"""FineTuneJobs drawn from the schema, hostile ones too: the API server judges them as `finetune run` does, and the operator
comes to terms with every one that is accepted.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.constants import API_VERSION, PLURAL
from finetune_api.rules import InvalidManifestError, local_only, parse_job, parse_spec
from finetune_operator.api import MERGE_PATCH, ApiError, ApiServer, api_path, load_configuration
from finetune_operator.kube import PLURALS
from finetune_operator.observed import format_time, job_name_of
from hypothesis import HealthCheck, Phase, given, note, settings

from tests.cluster import kit
from tests.crd_fuzz import broken_jobs, jobs
from tests.fake_cluster import FakeCluster
from tests.specs import CLASSIFICATION, Manifest, manifest

AT_ONCE = 8
"""Requests under way."""


class Server:
    """The API server, asked about one namespace from an event loop of its own."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._runner = asyncio.Runner()
        self._api = self._runner.run(self._connect())
        self.jobs_path = api_path(API_VERSION, PLURAL, namespace)

    async def _connect(self) -> ApiServer:
        return ApiServer(await load_configuration())

    def close(self) -> None:
        self._runner.run(self._api.close())
        self._runner.close()

    def try_out(self, path: str, body: Manifest) -> Manifest:
        """What a POST would store. Raises ApiError."""
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        return self._runner.run(self._api.request("POST", path, body, query=query))

    def ask(self, method: str, requests: list[tuple[str, Manifest]]) -> list[Manifest | ApiError]:
        """The answers to all requests."""
        turns = asyncio.Semaphore(AT_ONCE)
        content_type = MERGE_PATCH if method == "PATCH" else "application/json"

        async def one(path: str, body: Manifest) -> Manifest | ApiError:
            async with turns:
                try:
                    return await self._api.request(method, path, body, timeout=60, content_type=content_type)
                except ApiError as error:
                    return error

        async def every() -> list[Manifest | ApiError]:
            return await asyncio.gather(*(one(*request) for request in requests))

        return self._runner.run(every())

    def jobs(self) -> list[Manifest]:
        return self._runner.run(self._api.list_all(self.jobs_path))[0]


@pytest.fixture
def server(namespace: str) -> Iterator[Server]:
    server = Server(namespace)
    yield server
    server.close()


def many(examples: int) -> settings:
    """`make test` draws the same jobs every time, `make test-long` others."""
    fixed = examples < 1000
    return settings(
        max_examples=examples, derandomize=fixed, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def judge(server: Server, examples: int) -> None:
    """Asks both judges about so many jobs."""
    counts = Counter[str]()

    @many(examples)
    @given(jobs() | broken_jobs())
    def agree(job: Manifest) -> None:
        stored = None
        try:
            stored = server.try_out(server.jobs_path, job)["spec"]
        except ApiError as error:
            assert error.status in (400, 422), error
            note(f"the API server: {error}")
        try:
            ours = parse_job(job)
            refused = local_only(ours)
        except InvalidManifestError as error:
            refused = error.findings
        counts["refused" if refused else "accepted"] += 1
        assert (stored is None) == bool(refused), [str(finding) for finding in refused]
        if stored is not None:
            assert parse_spec(stored) == ours.spec

    agree()
    print(f"\n{examples} jobs, judged alike: {dict(counts)}")
    assert counts["accepted"] > 0.2 * counts.total(), "too few to say anything"


def grow(server: Server, examples: int) -> None:
    """Tries out the children of so many jobs. What is wrong with one must show at the first of them, and not only when
    training is over."""
    counts = Counter[str]()

    @many(examples)
    @given(jobs())
    def children(job: Manifest) -> None:
        try:
            spec = parse_job(job).spec
        except InvalidManifestError:
            return
        cluster = FakeCluster(spec.to_dict())
        asyncio.run(cluster.live())
        for child in filter(job_name_of, cluster.created):  # the rest is the namespace's, and the same for every job
            metadata = {key: value for key, value in child["metadata"].items() if key != "ownerReferences"}
            body = {**child, "metadata": {**metadata, "namespace": server.namespace}}
            try:
                server.try_out(api_path(child["apiVersion"], PLURALS[child["kind"]], server.namespace), body)
            except ApiError as error:
                note(f"{child['kind']} {metadata['name']}: {error}")
                assert error.status in (400, 422), error
                assert metadata["name"].endswith(("-prepare", "-workspace"))
                counts["refused"] += 1
                return
        counts["accepted"] += 1

    children()
    print(f"\nchildren of {counts.total()} jobs: {dict(counts)}")


def test_the_api_server_and_finetune_run_judge_alike(crd: None, server: Server) -> None:
    judge(server, 400)


def test_what_kubernetes_refuses_shows_at_the_beginning(crd: None, server: Server) -> None:
    grow(server, 40)


def test_the_operator_comes_to_terms_with_what_is_accepted(operator: str, server: Server) -> None:
    endure(server, 100)


@pytest.mark.long
def test_the_api_server_and_finetune_run_judge_very_many_alike(crd: None, server: Server) -> None:
    judge(server, 3000)


@pytest.mark.long
def test_what_kubernetes_refuses_in_very_many_shows_at_the_beginning(crd: None, server: Server) -> None:
    grow(server, 1000)


@pytest.mark.long
def test_the_operator_comes_to_terms_with_very_many(operator: str, server: Server) -> None:
    endure(server, 1000)


# --- with the operator


def drawn(examples: int) -> list[Manifest]:
    found: list[Manifest] = []

    @settings(many(examples), phases=[Phase.generate])
    @given(jobs())
    def collect(job: Manifest) -> None:
        found.append(job)

    collect()
    return found


def huge(key_length: int) -> Manifest:
    """Label rules with 32 tables of 256 keys, each so long."""
    table = {f"{number:0{key_length}}": "a" for number in range(256)}
    rules = [{"name": f"table-{number}", "table": table} for number in range(32)]
    return manifest(CLASSIFICATION, {"dataset.labelling": {"rules": rules}})


def endure(server: Server, examples: int) -> None:
    """Creates so many jobs, those that are accepted get a condition; changes them; deletes them. No pod ever runs."""
    kit.kubectl("-n", server.namespace, "create", "quota", "no-pods", "--hard=pods=0")
    began, restarts = format_time(time.time()), restarts_of_operators()
    wanted = [*drawn(examples), huge(60), huge(175)]
    named = [{**job, "metadata": {**job["metadata"], "name": f"{'j' * 45}-{n:04}"}} for n, job in enumerate(wanted)]
    answers = server.ask("POST", [(server.jobs_path, job) for job in named])
    assert {answer.status for answer in answers if isinstance(answer, ApiError)} <= {400, 422}
    accepted = [answer for answer in answers if not isinstance(answer, ApiError)]
    wait_for_all(server, len(accepted), lambda job: "conditions" in job.get("status", {}))

    suspended = {job["metadata"]["name"]: not job["spec"]["suspend"] for job in server.jobs()}
    server.ask("PATCH", [(f"{server.jobs_path}/{n}", {"spec": {"suspend": s}}) for n, s in suspended.items()])
    wait_for_all(server, len(accepted), was_seen)
    for job in server.jobs():
        if is_ours(job) and job["status"]["phase"] != "Failed":
            condition = kit.condition(job, "Suspended").get("status", "False")
            assert condition == str(job["spec"]["suspend"]), job["status"]
    ends = Counter(str(job.get("status", {}).get("phase")) for job in server.jobs())

    server.ask("DELETE", [(f"{server.jobs_path}/{job['metadata']['name']}", {}) for job in server.jobs()])
    kit.wait_until(lambda: not server.jobs(), 120, "all jobs are gone")
    kit.wait_until(lambda: queue_length() == 0, 120, "the queue is empty")
    assert restarts_of_operators() == restarts
    assert complaints(began) == []
    print(f"\n{len(wanted)} jobs, {len(accepted)} accepted, at the end: {dict(ends)}")


def is_ours(job: Manifest) -> bool:
    """Another controller's jobs are left alone."""
    return "managedBy" not in job["spec"]


def was_seen(job: Manifest) -> bool:
    """Whether the status is about the newest spec; a finished job keeps what was reported of its end."""
    return bool(job["status"].get("observedGeneration") == job["metadata"]["generation"])


def wait_for_all(server: Server, count: int, holds: Any) -> None:
    """Waits as long as many jobs may take on a busy machine."""

    def missing() -> list[Manifest]:
        return [job for job in server.jobs() if is_ours(job) and not holds(job)]

    kit.wait_until(lambda: not missing(), 60 + count / 2, "every job", lambda: json.dumps(missing()[:3])[:5000])


def queue_length() -> float:
    """Jobs that wait for a worker, over all replicas."""
    lengths = []
    for pod in kit.operator_pods():
        text = kit.http_get(kit.SYSTEM_NAMESPACE, pod["metadata"]["name"], 8080, "/metrics")
        lengths += re.findall(r"^finetune_operator_queue_length (\S+)$", text, re.MULTILINE)
    assert lengths
    return sum(map(float, lengths))


def restarts_of_operators() -> dict[str, int]:
    return {
        pod["metadata"]["name"]: sum(status["restartCount"] for status in pod["status"]["containerStatuses"])
        for pod in kit.operator_pods()
    }


def complaints(since: str) -> list[str]:
    """Lines of the operators' logs that tell of an error, but for kopf's about a watch that it opens again."""
    names = [pod["metadata"]["name"] for pod in kit.operator_pods()]
    lines = [line for n in names for line in kit.logs(kit.SYSTEM_NAMESPACE, n, f"--since-time={since}").splitlines()]
    return [line for line in lines if is_complaint(json.loads(line))]


def is_complaint(line: dict[str, str]) -> bool:
    severe = line["level"] in ("error", "critical") and not line["logger"].startswith("kopf.")
    return severe or "traceback" in line
