"""MemoryFits: what is said of a job's memory, and that one which cannot fit asks for no GPU."""

import copy
from typing import Any

import pytest
from finetune_api.constants import Phase, Stage
from finetune_api.progress import Outcome, PrepareResult, Result
from finetune_operator.display import outcome

from tests.fake_cluster import DATA, MODEL, SPEC, TRAINED, FakeCluster

LARGE = MODEL.model_copy(
    update={
        "parameters": 8_030_261_248,
        "layers": 32,
        "hidden_size": 4096,
        "trainable_parameters": 8_030_261_248,
        "frozen_parameters": 0,
    }
)


def make_cluster(**changes: Any) -> FakeCluster:
    return FakeCluster(copy.deepcopy(SPEC) | changes)


async def prepare(cluster: FakeCluster, model=MODEL) -> None:
    await cluster.settle()
    cluster.start(Stage.PREPARE)
    await cluster.settle()
    prepared = PrepareResult(data=DATA, model=model)
    cluster.finish(Stage.PREPARE, Result(stage=Stage.PREPARE, outcome=Outcome.SUCCEEDED, prepare=prepared))
    await cluster.settle()


def message(cluster: FakeCluster) -> str:
    return next(c.message for c in cluster.status.conditions or () if c.type == "MemoryFits")


async def test_a_job_that_fits_says_so_with_its_numbers() -> None:
    cluster = make_cluster(resources={"gpus": 1, "gpuMemory": "80Gi"})
    assert cluster.condition("MemoryFits") is None
    await prepare(cluster)
    assert cluster.condition("MemoryFits") == ("True", "Fits")
    assert "of 80.0 GiB per GPU: weights 0.08, " in message(cluster)
    memory = cluster.status.memory
    assert memory is not None and memory.limit_bytes == 80 * 2**30
    assert 0 < memory.estimate_bytes < 10 * 2**30 and memory.peak_bytes is None
    assert Stage.TRAIN in cluster.jobs


async def test_a_job_that_cannot_fit_fails_before_anything_asks_for_a_gpu() -> None:
    cluster = make_cluster(resources={"gpus": 1, "gpuMemory": "80Gi"}, method={"type": "Full"})
    await prepare(cluster, LARGE)
    status = cluster.status
    assert status.phase is Phase.FAILED
    assert list(cluster.jobs) == [Stage.PREPARE]
    assert cluster.condition("MemoryFits") == ("False", "InsufficientMemory")
    assert cluster.condition("Failed") == ("True", "InsufficientMemory")
    assert cluster.condition("DataReady") == ("True", "Prepared")
    assert status.failure is not None and status.failure.stage is Stage.TRAIN
    for words in ("of 80.0 GiB per GPU: weights 29.9", "optimizer 59.8", "use method.type LoRA instead of Full"):
        assert words in status.failure.message
    assert status.resolved is not None and status.resolved.activation_checkpointing is True
    assert [event.reason for event in cluster.events.values() if event.type == "Warning"] == ["InsufficientMemory"]
    await cluster.settle()
    assert list(cluster.jobs) == [Stage.PREPARE]


@pytest.mark.parametrize(
    ("resources", "field"), [({"gpus": 1}, "resources.gpuMemory"), ({}, "resources.limits.memory")]
)
async def test_a_job_of_unknown_memory_is_not_refused(resources, field) -> None:
    cluster = make_cluster(resources=resources, method={"type": "Full"})
    await prepare(cluster, LARGE)
    assert cluster.condition("MemoryFits") == ("Unknown", "LimitUnknown")
    assert message(cluster).endswith(f"is not known: give {field} to have it compared")
    assert cluster.status.memory is not None and cluster.status.memory.limit_bytes is None
    assert Stage.TRAIN in cluster.jobs


async def test_the_number_of_gpus_left_open_is_what_the_pod_gets() -> None:
    cluster = make_cluster(resources={"gpuMemory": "80Gi"})
    await prepare(cluster)
    (train,) = [m for m in cluster.created if m["kind"] == "Job" and m["metadata"]["name"].endswith("train")]
    resources = train["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"nvidia.com/gpu": "1"}
    assert cluster.status.resolved is not None and cluster.status.resolved.gpus == 1


async def test_the_measured_peak_stands_next_to_the_estimate() -> None:
    cluster = make_cluster()
    await cluster.pass_through(*Stage)
    memory = cluster.status.memory
    assert memory is not None and memory.peak_bytes == TRAINED.peak_memory_bytes
    expected = f"; memory 0.9 GiB ({memory.estimate_bytes / 2**30:.1f} expected)"
    assert outcome(cluster.status, Stage.TRAIN).endswith(expected)
