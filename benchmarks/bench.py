"""What all benchmarks share: where things lie, environments of rivals, and how a process is run."""

import argparse
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build"
LOCK = ROOT / "requirements.lock"
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


def install(environment: Path, packages: tuple[str, ...]) -> Path:
    """A virtual environment with these packages, the rest as they are locked; returns its Python."""
    python = environment / "bin" / "python"
    stamp = environment / "benchmark-packages"
    wanted = "\n".join(packages) + "\n" + LOCK.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    say(f"installing {packages[0]} in {environment.relative_to(ROOT)}")
    if not python.exists():
        venv.create(environment, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(LOCK), *packages], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
