import json
from typing import Any

import pytest
import yaml
from finetune_operator.api import ApiError, api_path, to_json
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fake_kubernetes import fake_kubernetes, status

PODS = "/api/v1/namespaces/team/pods"


@pytest.fixture
async def fake():
    async with fake_kubernetes() as pair:
        yield pair


def test_paths():
    assert api_path("v1", "pods") == "/api/v1/pods"
    assert api_path("batch/v1", "jobs", "team", "a") == "/apis/batch/v1/namespaces/team/jobs/a"
    assert api_path("x.io/v1", "ys", "team", "a", "status") == "/apis/x.io/v1/namespaces/team/ys/a/status"
    assert api_path("v1", "pods", "../kube-system", "a/b") == "/api/v1/namespaces/..%2Fkube-system/pods/a%2Fb"


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())))
@example({"labels": ["🙂", "\x00\x1b[31m", "\x7f\x85\x9b", "\u2028\ufeff\ufffe", "\U0010ffff", '\\ud83d "', "é"]})
def test_a_body_is_the_same_to_a_reader_of_json_and_of_yaml(body: dict[str, Any]):
    text = to_json(body).decode()
    assert json.loads(text) == body
    assert yaml.safe_load(text) == body


def test_half_a_character_is_replaced():
    assert json.loads(to_json({"message": "a\ud83d"})) == {"message": "a\ufffd"}


async def test_every_request_carries_the_token_of_the_moment(fake):
    server, api = fake

    def rotate(configuration):
        configuration.api_key["BearerToken"] = f"bearer token-{len(server.tokens)}"

    api._configuration.refresh_api_key_hook = rotate
    for _ in range(2):
        await api.list_all(PODS)
    async with api.open_session() as session, session.get(api.url + PODS):  # as kopf does
        pass
    assert server.tokens == ["bearer token-0", "bearer token-1", "bearer token-2"]


async def test_a_list_is_read_page_by_page(fake):
    server, api = fake
    server.lists_per_page = 2
    names = [server.put(f"{PODS}/p{number}", {})["metadata"]["name"] for number in range(5)]
    items, version = await api.list_all(PODS)
    assert [item["metadata"]["name"] for item in items] == names
    assert version == "5"
    assert len(server.requests) == 3


async def test_a_list_whose_pages_grew_too_old_starts_again(fake):
    server, api = fake
    server.put(f"{PODS}/p", {})
    server.refuse_reads, server.refusals = True, [status(410, "Expired", "too old")]
    items, _ = await api.list_all(PODS)
    assert len(items) == 1


async def test_errors_keep_the_servers_words_and_its_reasons(fake):
    server, api = fake
    server.refuse_reads, server.refusals = True, [status(403, "Forbidden", "no", "NamespaceTerminating"), 503]
    with pytest.raises(ApiError, match="no") as error:
        await api.request("GET", PODS)
    assert (error.value.status, error.value.reason, error.value.causes) == (403, "Forbidden", ("NamespaceTerminating",))
    with pytest.raises(ApiError, match="the API server answered 503 Service Unavailable"):
        await api.request("GET", PODS)


async def test_a_server_that_is_not_there(fake):
    _, api = fake
    api.url = "http://127.0.0.1:9"
    with pytest.raises(ApiError, match=r"the API server at http://127\.0\.0\.1:9 cannot be reached") as error:
        await api.request("GET", PODS)
    assert error.value.status == 0
    assert api.last_answer is None
