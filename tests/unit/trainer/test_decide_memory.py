"""What is decided of all rows at once takes few bytes of each: 5 GB of rows fit into 600 MB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, COPIES = 2_000_000, 200_000


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_decisions_take_few_bytes_of_a_row():
    """About 40 of each further row, beside what is sorted at a time."""
    command = [sys.executable, "-m", "tests.unit.trainer.decide_run", str(ROWS)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["repeats"] == COPIES - ROWS // 1000  # of a thousand rows one copy has another label
    assert found["growth"] < 160e6
