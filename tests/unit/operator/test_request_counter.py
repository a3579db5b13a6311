import json

import pytest
from finetune_operator.api import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.request_counter import right_for
from finetune_operator.store import Store
from prometheus_client import CollectorRegistry

from tests.fake_kubernetes import fake_kubernetes, status

JOBS = "/apis/batch/v1/namespaces/team/jobs"
FORBIDDEN = (
    'jobs.batch is forbidden: User "system:serviceaccount:ops:finetune-operator" cannot create resource "jobs" '
    'in API group "batch" in the namespace "team"'
)
QUOTA = 'jobs.batch "demo" is forbidden: exceeded quota: few, requested: count/jobs.batch=1, used: 1, limited: 1'


@pytest.fixture
async def fake():
    async with fake_kubernetes() as pair:
        yield pair


def counted(api) -> dict[str, float]:
    registry: CollectorRegistry = Metrics(Store(), lambda: True, lambda: 0, dict, api.counter).registry
    return {
        " ".join((sample.name.removeprefix("finetune_operator_api_requests_"), *sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if "api_requests" in sample.name
    }


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/api/v1/pods", "list pods"),
        ("GET", "/api/v1/pods?watch=true&resourceVersion=1", "watch pods"),
        ("GET", "/api/v1/namespaces/team/configmaps/demo-plan", "get configmaps"),
        ("GET", "/api/v1/namespaces/team", "get namespaces"),
        ("POST", JOBS, "create jobs.batch"),
        ("PUT", f"{JOBS}/demo", "update jobs.batch"),
        ("PATCH", f"{JOBS}/demo/status", "patch jobs.batch/status"),
        ("DELETE", f"{JOBS}/demo", "delete jobs.batch"),
        ("DELETE", JOBS, "deletecollection jobs.batch"),
        ("GET", "/apis/batch/v1", "get /apis/batch/v1"),
        ("GET", "/version", "get /version"),
    ],
)
def test_a_request_is_named_as_a_role_names_it(method, path, right):
    path, _, query = path.partition("?")
    assert " ".join(right_for(method, path, dict(part.split("=") for part in query.split("&") if part))) == right


async def test_requests_of_every_session_are_counted_by_right_and_answer(fake):
    server, api = fake
    server.put(f"{JOBS}/demo", {})
    for _ in range(2):
        await api.request("GET", f"{JOBS}/demo")
    with pytest.raises(ApiError):
        await api.request("GET", f"{JOBS}/other")
    async with api.open_session() as session, session.get(api.url + JOBS, params={"watch": "true"}):  # as kopf does
        pass
    api.url = "http://127.0.0.1:9"
    with pytest.raises(ApiError):
        await api.request("GET", "/version")
    assert counted(api) == {
        "total get jobs.batch 200": 2,
        "total get jobs.batch 404": 1,
        "total watch jobs.batch 200": 1,
        "total get /version none": 1,
    }


async def test_a_missing_right_is_told_from_what_else_is_forbidden(fake):
    server, api = fake
    server.refusals = [status(403, "Forbidden", FORBIDDEN), status(403, "Forbidden", QUOTA)]
    for words in (FORBIDDEN, QUOTA):
        with pytest.raises(ApiError) as error:
            await api.request("POST", JOBS, {"metadata": {"name": "demo"}})
        assert str(error.value) == words, "the words are still there for those who asked"
    assert counted(api) == {"total create jobs.batch 403": 2, "forbidden_total create jobs.batch": 1}


async def test_a_watch_that_is_forbidden_counts_as_such(fake):
    server, api = fake
    words = FORBIDDEN.replace("create", "watch")
    server.refuse_reads, server.refusals = True, [status(403, "Forbidden", words)]
    async with api.open_session() as session, session.get(api.url + JOBS, params={"watch": "true"}) as answer:
        assert json.loads(await answer.text())["message"] == words
    assert counted(api)["forbidden_total watch jobs.batch"] == 1
