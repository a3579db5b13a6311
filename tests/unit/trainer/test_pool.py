"""However many processes work on the data, the outcome is the same, and none is left behind."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from textwrap import dedent

import pytest
from finetune_api.constants import Stage
from finetune_api.dataset import DataFormat
from finetune_api.plan import JobReference, PlanDataset
from finetune_trainer.data import pipeline
from finetune_trainer.data.decide import decide
from finetune_trainer.data.pipeline import PlacedRow, Rows, Survey, open_sources, read_all
from finetune_trainer.data.pool import process_count
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.spool import Spool
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch


def write_rows(folder: Path) -> Path:
    rows = [{"text": f"café number {n % 700}, call +49 30 901820", "label": "ab"[n % 2]} for n in range(2000)]
    rows[::100] = [{"text": "", "label": "a"}] * 20
    rows[1::250] = [{"text": "x" * 9, "label": "b"}] * 8
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:1500])))
    (folder / "data" / "b.jsonl").write_text("\n".join(map(json.dumps, rows[1500:])))
    return folder / "data"


@dataclass
class Outcome:
    rows: list[PlacedRow]
    found: list[object]
    """All that was counted."""
    quarantine: str
    error: str = ""


def judge(data: Path, folder: Path, processes: int) -> Outcome:
    settings = {
        "sources": [{"location": {"uri": "pvc://c/data", "path": str(data)}, "field": "dataset.sources[0]"}],
        "validation": {"fraction": 0.1},
        "test": {"fraction": 0.1},
        "clean": {"repairEncoding": True, "minCharacters": 10, "languages": ["en", "fr"]},
        "personalData": {"settings": {"action": "Redact"}},
    }
    dataset = PlanDataset.model_validate(settings)
    watch = Watch(Telemetry(Stage.PREPARE, JobReference(namespace="n", name="j", uid="u")), "Reading", 0, 1)
    survey, error = Survey(), ""
    path = folder / f"{processes}" / "quarantine.jsonl"
    with Spool(folder / f"{processes}" / "spool") as spool:
        rows = Rows(open_sources(dataset, [DataFormat.LABELLED_TEXT], folder / "down", watch), spool)
        try:
            with Quarantine(path) as quarantine:
                read_all(rows, dataset, quarantine, survey, watch, processes=processes)
                decide(rows, dataset, quarantine, survey)
        except UserError as fault:
            error = fault.message
        reports = [survey.log.cleaning.report(), survey.log.personal_data.report()]
        return Outcome(list(rows.placed()), [survey.read, survey.rows, survey.labels, reports], path.read_text(), error)


def test_the_progress_of_reading_is_that_of_the_bytes_also_within_one_file(tmp_path):
    class Told(Watch):
        def advance(self, done: float, total: float) -> None:
            shares.append(done / total)

    shares: list[float] = []
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} " + "x" * 4000}) + "\n" for n in range(2000)))
    source = {"location": {"uri": "pvc://c/a.jsonl", "path": str(data)}, "field": "dataset.sources[0]"}
    dataset = PlanDataset.model_validate({"sources": [source], "validation": {"fraction": 0.1}})
    watch = Told(Telemetry(Stage.PREPARE, JobReference(namespace="n", name="j", uid="u")), "Reading", 0, 1)
    with Spool(tmp_path / "spool") as spool, Quarantine(tmp_path / "quarantine.jsonl") as quarantine:
        rows = Rows(open_sources(dataset, [DataFormat.TEXT], tmp_path, watch), spool)
        shares.clear()
        read_all(rows, dataset, quarantine, Survey(), watch, processes=1)
    assert shares == sorted(shares) and shares[0] < 0.4 < shares[len(shares) // 2] < 0.8 < shares[-1] <= 1


def test_the_outcome_is_the_same_whatever_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_ROWS", 130)
    data = write_rows(tmp_path)
    alone, two, three = (judge(data, tmp_path, processes) for processes in (1, 2, 3))
    assert alone == two == three
    assert len(alone.rows) == 2000 - 20 - 8
    assert Counter(row.split for row in alone.rows)["train"] > 1400
    assert not active_children()


def test_what_was_read_before_a_damaged_file_is_counted_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_ROWS", 50)
    data = write_rows(tmp_path)
    whole = gzip.compress((data / "b.jsonl").read_bytes())
    (data / "b.jsonl").write_bytes(whole[: len(whole) // 2])
    alone, two = (judge(data, tmp_path, processes) for processes in (1, 2))
    assert alone == two
    assert "b.jsonl" in alone.error
    assert len(alone.rows) > 1400


KILLED = dedent("""
    import os, signal, sys
    from finetune_trainer.data import work
    work.BatchWorker.work = lambda self, batch: os.kill(os.getpid(), signal.SIGKILL)
""")


def test_a_killed_process_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(KILLED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(StageError, match="want of memory"):
        judge(write_rows(tmp_path), tmp_path, 2)


WAITING = dedent("""
    import sys, time
    from finetune_trainer.data.pool import _in_order, _start
    from finetune_api.plan import PlanDataset
    from concurrent.futures import ProcessPoolExecutor
    import multiprocessing
    if __name__ == "__main__":
        dataset = PlanDataset.model_validate({"sources": [], "validation": {"fraction": 0.1}})
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (dataset,))
        pool.submit(time.sleep, 0).result()
        print(*pool._processes, flush=True)
        time.sleep(600)
""")


def test_processes_end_with_their_parent_even_if_it_is_killed(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    ends = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_little_data_is_not_worth_a_process():
    assert process_count(1000) == 1
    assert 1 <= process_count(1 << 40) <= len(os.sched_getaffinity(0))
