"""The same job again takes what was prepared before; a job that differs in anything that matters never does."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.report import DataReport
from finetune_api.spec import Task
from finetune_trainer.data import cache, pipeline
from finetune_trainer.errors import UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry

from tests.models import save_tiny_bert
from tests.plans import make_plan

ROWS = [{"text": f"profit {n} rises, call +49 30 901820", "label": ["good", "bad"][n % 2]} for n in range(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


class Disk:
    """A volume with the workspaces of several jobs."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.cache = root / "claim" / ".prepared"
        (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (root / "key").mkdir()
        (root / "key" / "key").write_text("0123456789abcdef")

    def plan(self, job: str, model: Path | None = None, max_length: int = 64, **dataset) -> Plan:
        sources = [
            {"location": {"uri": "file://a.jsonl", "path": f"{self.root}/a.jsonl"}, "field": "dataset.sources[0]"}
        ]
        plan = make_plan(
            self.root / "claim" / job,
            Stage.PREPARE,
            task=Task.CLASSIFICATION,
            model={"location": {"uri": "file://m", "path": str(model or self.model)}},
            training={"max_length": max_length},
            dataset={"sources": sources, **dataset},
        )
        return plan.model_copy(update={"cache": str(self.cache)})

    def prepare(self, job: str, **changes) -> DataReport:
        plan = self.plan(job, **changes)
        run(plan, Telemetry(plan.stage, plan.job))
        return self.report(job)

    def report(self, job: str) -> DataReport:
        return DataReport.model_validate_json((self.root / "claim" / job / "report" / "data.json").read_bytes())

    def hashes(self, job: str) -> dict[str, str]:
        folders = (self.root / "claim" / job / part for part in ("data", "report"))
        reports = ("data.json", "data.html")  # they name the job
        files = (
            file for folder in folders for file in folder.rglob("*") if file.is_file() and file.name not in reports
        )
        return {
            str(file.relative_to(self.root / "claim" / job)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        }


@pytest.fixture
def disk(tmp_path, model):
    return Disk(tmp_path, model)


def pseudonyms(folder: Path) -> dict:
    settings = {"action": "Pseudonymize", "keySecretRef": {"name": "k"}}
    return {"settings": settings, "key_dir": str(folder)}


def test_another_job_with_the_same_data_does_no_work(disk, monkeypatch):
    (disk.root / "a.jsonl").write_text((disk.root / "a.jsonl").read_text() + "{oops\n")
    first = disk.prepare("one", max_rejected=0.1)
    monkeypatch.setattr(pipeline, "work_batches", None)
    second = disk.prepare("two", max_rejected=0.1)
    assert (first.reused, second.reused) == (False, True)
    assert second.model_copy(update={"reused": False}) == first
    assert disk.hashes("one") == disk.hashes("two") and len(disk.hashes("two")) >= 4


def test_the_same_job_again_does_no_work_and_leaves_its_data(disk, monkeypatch):
    disk.prepare("one")
    before = disk.hashes("one")
    monkeypatch.setattr(pipeline, "work_batches", None)
    assert disk.prepare("one").reused
    assert disk.hashes("one") == before


def other_rows(disk: Disk) -> dict:
    with (disk.root / "a.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    return {}


def other_vocabulary(disk: Disk) -> dict:
    model = shutil.copytree(disk.model, disk.root / "other")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"note": 1}))
    return {"model": model}


def other_key(disk: Disk) -> dict:
    folder = disk.root / "other-key"
    folder.mkdir()
    (folder / "key").write_text("fedcba9876543210")
    return {"personal_data": pseudonyms(folder)}


@pytest.mark.parametrize(
    "change",
    [
        other_rows,
        other_vocabulary,
        other_key,
        lambda _: {"max_length": 32},
        lambda _: {"labels": ["good", "bad"]},
        lambda _: {"validation": {"fraction": 0.2}},
        lambda _: {"clean": {"unicode": "NFC"}},
        lambda _: {"personal_data": {"settings": {"action": "Redact"}}},
    ],
)
def test_what_differs_is_prepared_anew(disk, change):
    usual = {"personal_data": pseudonyms(disk.root / "key")}
    disk.prepare("one", **usual)
    changed = usual | change(disk)
    assert not disk.prepare("two", **changed).reused
    assert disk.prepare("three", **changed).reused


def test_damaged_data_is_made_anew(disk, caplog):
    disk.prepare("one")
    (shard,) = disk.cache.glob("*/data/train/*.arrow")
    good = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(good[:-1] + b"?")
    with caplog.at_level(logging.WARNING):
        assert not disk.prepare("two").reused
    assert "damaged" in caplog.text
    assert disk.prepare("three").reused


def test_a_new_version_of_the_code_prepares_anew(disk, monkeypatch):
    disk.prepare("one")
    monkeypatch.setattr(cache, "version", lambda name: f"{name} of tomorrow")
    assert not disk.prepare("two").reused


def test_refused_data_is_refused_again(disk):
    (disk.root / "a.jsonl").write_text("{oops\n" * 30)
    for _ in range(2):
        with pytest.raises(UserError, match="no rows that can be read"):
            disk.prepare("one")
    assert not disk.cache.exists()


def test_the_least_recently_used_is_forgotten(disk, monkeypatch):
    monkeypatch.setattr(cache, "KEPT_ENTRIES", 2)
    disk.prepare("one")
    (used,) = disk.cache.iterdir()
    os.utime(used, (1, 1))
    disk.prepare("two", validation={"fraction": 0.2})
    (unused,) = {*disk.cache.iterdir()} - {used}
    os.utime(unused, (2, 2))
    disk.prepare("one")
    disk.prepare("three", validation={"fraction": 0.3})
    left = [*disk.cache.iterdir()]
    assert len(left) == 2 and used in left and unused not in left
    assert disk.prepare("four").reused


def test_a_volume_without_hard_links_has_no_cache(disk, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert not disk.prepare("one").reused
    assert not disk.prepare("two").reused
    assert not [*disk.cache.glob("*")]
