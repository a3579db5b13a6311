import json
import logging

import aiohttp
import pytest
from aiohttp.test_utils import unused_port
from finetune_operator.logs import JsonFormatter, current_job
from finetune_operator.metrics import Metrics
from finetune_operator.request_counter import RequestCounter
from finetune_operator.server import Server
from finetune_operator.store import FINE_TUNE_JOBS, Store
from prometheus_client.parser import text_string_to_metric_families


class World:
    def __init__(self) -> None:
        self.store = Store()
        self.leading = True
        self.healthy, self.ready = (True, "ok"), (False, "not yet")
        self.metrics = Metrics(self.store, lambda: self.leading, lambda: 3, lambda: {"pods": 1.5}, RequestCounter())

    def job(self, name, version=1, **status):
        metadata = {"uid": name, "name": name, "namespace": "team", "resourceVersion": str(version)}
        self.store.put(FINE_TUNE_JOBS, {"metadata": metadata, "status": status})

    async def get(self, path):
        port = unused_port()
        async with (
            Server(port, lambda: self.healthy, lambda: self.ready, self.metrics.registry),
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as answer,
        ):
            return answer.status, await answer.text()

    async def series(self):
        """All series of ours, as Prometheus reads them: name and labels -> value."""
        _, text = await self.get("/metrics")
        return {
            sample.name.removeprefix("finetune_operator_") + str(sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("finetune_")
        }


@pytest.fixture
def world():
    return World()


async def test_jobs_are_counted_by_phase(world):
    world.job("a")  # the operator has not looked at it yet
    world.job("b", phase="Pending")
    world.job("c", phase="Training")
    series = await world.series()
    assert series["jobs['Pending']"] == 2
    assert series["jobs['Training']"] == 1
    assert series["jobs['Failed']"] == 0, "a phase without jobs is 0 and not absent: alerts compare it"


async def test_a_running_job_has_series_which_go_when_it_finishes(world):
    metrics = {"trainingLoss": "0.25", "tokensPerSecond": "1.2e+03", "peakMemoryBytes": 1024}
    world.job("a", 1, phase="Training", progress={"percentage": 42}, metrics=metrics, attempt=2)
    series = await world.series()
    about = "['a', 'team']"
    names = ("progress_ratio", "loss", "tokens_per_second", "memory_bytes", "attempt")
    assert [series[f"job_{name}{about}"] for name in names] == [0.42, 0.25, 1200, 1024, 2]
    world.job("a", 2, phase="Succeeded", progress={"percentage": 100}, metrics=metrics, attempt=2)
    assert not [name for name in await world.series() if about in name]
    world.job("b", 3, phase="Training", metrics={"trainingLoss": "nan"})
    assert str((await world.series())["job_loss['b', 'team']"]) == "nan"
    world.store.remove("b", 10**9)
    assert not [name for name in await world.series() if "'b'" in name]


async def test_only_the_leader_tells_of_jobs(world):
    world.job("a", phase="Training", attempt=1)
    assert (await world.series())["leader[]"] == 1
    world.leading = False
    series = await world.series()
    assert series["leader[]"] == 0
    assert not [name for name in series if name.startswith("job")], "sums over replicas would count twice"


async def test_the_operators_own_health_is_measured(world):
    with world.metrics.reconcile_duration.time():
        world.metrics.reconcile_errors.inc()
    series = await world.series()
    assert series["reconcile_duration_seconds_count[]"] == 1
    assert series["reconcile_errors_total[]"] == 1
    assert series["queue_length[]"] == 3
    assert series["watch_age_seconds['pods']"] == 1.5
    assert not [name for name in series if "_created" in name]


async def test_probes_answer_with_words(world):
    assert await world.get("/healthz") == (200, "ok\n")
    assert await world.get("/readyz") == (503, "not yet\n")
    world.healthy, world.ready = (False, "a watch hangs"), (True, "ok")
    assert await world.get("/healthz") == (503, "a watch hangs\n")
    assert await world.get("/readyz") == (200, "ok\n")
    assert (await world.get("/"))[0] == 404


def test_a_log_record_is_one_line_of_json_with_its_job():
    error = RuntimeError("first\nsecond")
    cause = (RuntimeError, error, None)
    record = logging.LogRecord("finetune_operator", logging.ERROR, "", 0, "%s\nfailed", ("it",), cause)
    token = current_job.set("team/demo")
    try:
        text = JsonFormatter().format(record)
    finally:
        current_job.reset(token)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["message"], line["job"]) == ("error", "it\nfailed", "team/demo")
    assert "RuntimeError: first" in line["traceback"]
    assert "job" not in json.loads(JsonFormatter().format(record))
