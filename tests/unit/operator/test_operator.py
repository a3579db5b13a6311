"""The whole process against a fake API server that has no FineTuneJobs yet, or none that answers."""

import asyncio
import contextlib

import pytest
from finetune_operator import __main__ as operator
from finetune_operator.settings import Settings

from tests.fake_kubernetes import fake_kubernetes

API = "/apis/finetune-operator.io/v1alpha1"


@pytest.fixture
async def fake():
    async with fake_kubernetes() as pair:
        yield pair


async def test_without_the_resource_it_says_so_and_waits(fake, caplog):
    server, api = fake
    waits = asyncio.create_task(operator._wait_for_resource(api))
    await asyncio.sleep(0.05)
    assert not waits.done()
    assert "FineTuneJob is not installed in this cluster: kubectl apply -f crds/finetunejobs.yaml" in caplog.text
    server.put(API, {"resources": [{"name": "finetunejobs"}]})
    await asyncio.wait_for(waits, 5)


async def test_without_an_api_server_it_says_so_and_waits(fake, caplog):
    _, api = fake
    api.url = "http://127.0.0.1:9"
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(operator._wait_for_resource(api), 0.05)
    assert "127.0.0.1:9 cannot be reached" in caplog.text


def test_a_pod_leads_under_its_own_name_and_a_process_without_one_under_a_unique_one():
    assert operator._identity(Settings(identity="finetune-operator-7d9f-x2x")) == "finetune-operator-7d9f-x2x"
    assert operator._identity(Settings()) != operator._identity(Settings())


def test_a_setting_that_is_wrong_is_named(monkeypatch, capsys):
    monkeypatch.setenv("FINETUNE_HTTP_PORT", "http")
    assert operator.main() == 2
    assert "FINETUNE_HTTP_PORT='http' is not a number" in capsys.readouterr().err
