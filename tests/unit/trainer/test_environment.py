"""What libraries are told before they are imported: threads by the container's limit, no calls to a hub."""

import importlib.util
import os
import sys
from unittest import mock

import pytest
from finetune_api.constants import Stage
from finetune_trainer.environment import cpu_limit, prepare_environment

from tests.plans import make_plan


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    del sys.modules["bitsandbytes"]
    with mock.patch.dict(os.environ):
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"):
            os.environ.pop(name, None)
        yield


@pytest.mark.parametrize(
    ("content", "cpus"),
    [
        ("max 100000\n", None),
        ("400000 100000\n", 4),
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("5000 100000\n", 1),
        ("200000 50000\n", 4),
        ("", None),
        ("100000\n", None),
        ("many 100000\n", None),
        ("100000 0\n", None),
    ],
)
def test_cpu_limit_is_that_of_the_cgroup_rounded_up(tmp_path, content, cpus):
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_limit(tmp_path / "cpu.max") == cpus


def test_no_cgroup_is_no_limit(tmp_path):
    assert cpu_limit(tmp_path / "cpu.max") is None


@pytest.mark.parametrize(
    ("stage", "output", "offline"),
    [
        (Stage.PREPARE, None, False),
        (Stage.TRAIN, None, True),
        (Stage.TRAIN, "hf://owner/tuned", True),
        (Stage.PUBLISH, None, True),
        (Stage.PUBLISH, "s3://bucket/tuned", True),
        (Stage.PUBLISH, "hf://owner/tuned", False),
    ],
)
def test_only_stages_that_need_the_hub_may_call_it(tmp_path, stage, output, offline):
    changes = {} if output is None else {"output": {"location": {"uri": output}}}
    prepare_environment(make_plan(tmp_path, stage, **changes), tmp_path)
    assert (os.environ.get("HF_HUB_OFFLINE") == "1") is offline
    assert (os.environ.get("TRANSFORMERS_OFFLINE") == "1") is offline
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_caches_lie_in_the_temporary_folder(tmp_path):
    prepare_environment(make_plan(tmp_path), tmp_path / "temporary")
    assert os.environ["HF_HOME"].startswith(str(tmp_path / "temporary"))


@pytest.mark.parametrize(("quantization", "is_there"), [(None, False), ("NF4", True)])
def test_what_quantizes_is_there_for_those_who_quantize(tmp_path, quantization, is_there):
    """peft would import it for everybody."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "quantization": quantization}
    prepare_environment(make_plan(tmp_path, Stage.TRAIN, lora=lora), tmp_path)
    assert (importlib.util.find_spec("bitsandbytes") is not None) is is_there


def test_threads_that_the_user_set_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_trainer.environment.cpu_limit", lambda: 3)
    os.environ["OMP_NUM_THREADS"] = "1"
    prepare_environment(make_plan(tmp_path), tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    del os.environ["OMP_NUM_THREADS"]
    prepare_environment(make_plan(tmp_path), tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("limit", "threads"), [(8, "2"), (3, "1"), (None, "4")])
def test_the_processes_of_a_node_share_its_cpus(tmp_path, monkeypatch, limit: int | None, threads: str) -> None:
    monkeypatch.setattr("finetune_trainer.environment.cpu_limit", lambda: limit)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    prepare_environment(make_plan(tmp_path), tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == threads
