"""What all contestants share: where things lie, and how a process is run."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
WORK = BUILD / "benchmark-train"

ROWS_PER_STEP = 8
"""TRL's own default, so that it need not be changed for anybody."""


def execute(
    command: list[Any], name: str, options: argparse.Namespace, environment: dict[str, str] | None = None
) -> None:
    """Runs a process with the same threads and no hub; its output goes to a log that is shown if it fails."""
    shared = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    log = WORK / "logs" / f"{name.replace(' ', '-').replace(',', '')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.run(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **shared, **(environment or {})},
            cwd=ROOT,
            check=False,
        )
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{name} failed with exit code {process.returncode} ({log}):\n{tail}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
