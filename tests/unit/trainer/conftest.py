"""Fixtures that tests of fetching and of preparing share; a file with others of these names has its own."""

from pathlib import Path

import pytest
from finetune_api.constants import Stage
from finetune_api.plan import JobReference, Plan
from finetune_api.spec import Task
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch

from tests.unit.trainer.prepare_runs import prepare_plan, save_models
from tests.unit.trainer.servers import s3_bucket


@pytest.fixture
def telemetry():
    return Telemetry(Stage.PREPARE, JobReference(namespace="n", name="j", uid="u"))


@pytest.fixture
def watch(telemetry):
    return Watch(telemetry, "Fetching data", 0, 1)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("secret") / "s3") as bucket:
        yield bucket


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def plan(tmp_path, models):
    def plan(*sources: Path, task: Task = Task.CLASSIFICATION, model: Path | None = None, **changes) -> Plan:
        return prepare_plan(tmp_path / "workspace", model or models[task], *sources, task=task, **changes)

    return plan
