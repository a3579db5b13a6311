"""Decides about many rows in a process of its own and tells what it held: `python -m tests.unit.trainer.decide_run ROWS`.

Of every thousand rows the last hundred are copies of the first ones, half of them to the letter.
"""

import json
import sys
from array import array
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanDataset, PlanSource
from finetune_trainer.data.decide import decide
from finetune_trainer.data.duplicates.search import SignatureFiles
from finetune_trainer.data.duplicates.signatures import NUMBERS, Signed, band_count
from finetune_trainer.data.pipeline import OpenedSource, Rows, Survey
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.review.decisions import NOTHING_DECIDED
from finetune_trainer.data.review.run import find_facts
from finetune_trainer.data.split import Split
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.work import Log, Packed, WorkedBatch
from finetune_trainer.fetch import SourceFile

SIMILARITY = 0.7
SOURCE = {"location": {"uri": "file://rows", "path": "rows"}, "field": "dataset.sources[0]"}
DATASET = PlanDataset.model_validate(
    {"sources": [SOURCE], "validation": {"fraction": 0.01}, "duplicates": {"similarity": SIMILARITY}}
)
BATCH, COPIES, LABELS = 1000, 100, 20


def fill(rows: Rows, count: int) -> None:
    """With what the workers would give of so many rows; no texts."""
    random = np.random.default_rng(0)
    packed = Packed.pack([])
    for start in range(0, count, BATCH):
        bands = random.integers(0, 1 << 63, (band_count(SIMILARITY), BATCH), np.uint64)
        signatures = random.integers(0, 1 << 16, (BATCH, NUMBERS), np.uint16)
        keys = random.integers(0, 1 << 63, BATCH, np.uint64)
        bands[:, -COPIES:], signatures[-COPIES:] = bands[:, :COPIES], signatures[:COPIES]
        keys[-COPIES // 2 :] = keys[: COPIES // 2]
        lines, hashes = array("Q", range(start, start + BATCH)), array("Q", keys.tobytes())
        labels = [str(key % LABELS) for key in hashes]
        labels[-COPIES:] = labels[:COPIES]
        labels[-COPIES] = "another"
        rows.ledger.add(Split.TRAIN, WorkedBatch(0, [], lines, hashes, hashes, labels, packed, Log()))
        rows.spool.write(0, lines, packed)
        if rows.signatures:
            rows.signatures.add(Signed(bands, signatures))
    rows.ledger.close()


def peak() -> int:
    """Most bytes so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def main() -> None:
    file = SourceFile("dataset.sources[0]", "file://rows", Path("rows"))
    opened = OpenedSource(PlanSource.model_validate(SOURCE), Split.TRAIN, [file], DataFormat.TEXT)
    survey = Survey()
    with (
        TemporaryDirectory() as folder,
        Quarantine(Path(folder) / "quarantine.jsonl") as quarantine,
        Spool(Path(folder) / "rows") as spool,
        SignatureFiles(Path(folder) / "signatures", SIMILARITY) as signatures,
    ):
        before = peak()
        rows = Rows([opened], spool, signatures)
        fill(rows, int(sys.argv[1]))
        groups = decide(rows, DATASET, quarantine, survey)
        find_facts(rows, groups, NOTHING_DECIDED)
    print(json.dumps({"growth": peak() - before, "repeats": quarantine.rejected, "kept": survey.rows.total()}))


if __name__ == "__main__":
    main()
