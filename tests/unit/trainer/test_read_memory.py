"""Reading takes as much memory for a large file as for a small one."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.trainer.nasty_files import noise

ROW = json.dumps({"text": "x" * 900, "n": 7})
WRITERS = {
    "a.jsonl": ("", ROW + "\n", ""),
    "a.json": ("[", ROW + ",\n", ROW + "]"),
    "a.csv": ("text,n\n", "x" * 900 + ",7\n", ""),
    "a.jsonl.gz": ("", ROW + "\n", ""),
}
MEASURE = """
import json, sys
from pathlib import Path
from finetune_trainer.data.read import RawRow, read_rows
from finetune_trainer.fetch import SourceFile

def peak():  # in MiB; getrusage tells the parent's too
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

small, large = (SourceFile("f", f"file://{name}", Path(name)) for name in sys.argv[1:])
assert all(isinstance(row, RawRow) for row in read_rows(small))  # everything is imported and warm
before = peak()
rows = sum(isinstance(row, RawRow) for row in read_rows(large))
print(json.dumps({"rows": rows, "growth": peak() - before}))
"""


def write_rows(path: Path, rows: int) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [f"{n:08}" + noise(900) for n in range(rows)]}), path, use_dictionary=False)
        return
    first, row, last = WRITERS[path.name.removeprefix("small-")]
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as file:
        file.write(first)
        for _ in range(rows // 1000):
            file.write(row * 1000)
        file.write(last)


def growth(tmp_path: Path, name: str, rows: int) -> int:
    """MiB that a process grows by when it reads a file of so many rows of about 1 KB, after one of 1000."""
    write_rows(tmp_path / f"small-{name}", 1000)
    write_rows(tmp_path / name, rows)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / f"small-{name}"), str(tmp_path / name)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["rows"] - rows in (0, 1)
    return found["growth"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("name", [*WRITERS])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    assert growth(tmp_path, name, 40_000) < 20


@pytest.mark.long
@pytest.mark.parametrize("name", [*WRITERS, "a.parquet"])
def test_memory_does_not_grow_with_a_large_file(tmp_path, name):
    assert growth(tmp_path, name, 220_000) < 60
