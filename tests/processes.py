"""`finetune` as a process of its own, and waiting for what processes do."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


def start_finetune(*arguments: str | Path) -> subprocess.Popen[str]:
    """Leaving it as a context manager waits for its end."""
    command = [sys.executable, "-m", "finetune_operator.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(look: Callable[[], Found], process: subprocess.Popen[str] | None = None, seconds: float = 60) -> Found:
    """What `look` finds, once it finds something. Fails after so many seconds, and at once if `process` has ended."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds} s for nothing"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)
    return found
