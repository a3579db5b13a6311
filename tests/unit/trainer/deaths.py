"""The train stage in a process of its own, which dies where it is told to.

Imported by the fork server of test_train_exact.py, so that no attempt has to import torch.
"""

import faulthandler
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import tqdm
from finetune_trainer import workspace
from finetune_trainer.__main__ import main
from finetune_trainer.evaluate.predict import Evaluator
from finetune_trainer.train import checkpoint, loop, preference, reporting
from finetune_trainer.train import run as train_run
from finetune_trainer.train.checkpoint import Checkpoints
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.micro_batches import Batching

for architecture in ("bert", "bloom", "llama"):  # here, so that no attempt has to
    importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")

PLACES: dict[str, tuple[Any, str]] = {
    "forward pass": (Forward, "losses"),
    "gradients of a step": (loop, "accumulate_gradients"),
    "reading rows": (Batching, "read"),
    "optimizer": (torch.optim.AdamW, "step"),
    "evaluation": (Evaluator, "__call__"),
    "a checkpoint": (Checkpoints, "save"),
    "the best": (Checkpoints, "save_best"),
    "weights to a file": (checkpoint, "_save_weights"),
    "hash of a file": (checkpoint, "_describe"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "exchange": (workspace, "_exchange"),
    "replace": (Path, "replace"),
    "rmtree": (shutil, "rmtree"),
    "training log": (reporting.TrainingLog, "write"),
    "rewinding the log": (reporting.TrainingLog, "rewind"),
    "resuming": (Checkpoints, "load"),
    "pairs as they were": (preference, "remember"),
    "result": (train_run, "_remember"),
}
"""Functions that the stage calls, by the names of these tests."""

PHASES = {
    "save": "saving", "save_best": "saving", "_accumulate": "accumulation", "_step": "step",
    "_evaluate": "evaluation", "_untuned_baseline": "evaluation", "newest": "resuming", "load": "resuming",
    "rewind": "resuming", "_prepare_model": "loading", "_read_references": "loading", "result": "ending", "run": "ending",
}  # fmt: skip
"""What the stage is at, by the innermost of its functions."""

tqdm.tqdm.set_lock(threading.RLock())  # its usual one is a semaphore that outlives a kill

SECONDS = 200
"""After which an attempt hangs: it says where, and fails."""

DEATHS, CALLS, TERMINATION, LOG = "deaths.txt", "calls.json", "termination.json", "log.txt"


@dataclass(frozen=True)
class Death:
    """A signal that the process sends to itself at call number `call` (from 1) of a place, before it or after it."""

    signal: signal.Signals
    place: str
    call: int
    after: bool = False


def attempt(folder: Path, deaths: tuple[Death, ...]) -> None:
    """Runs `plan.json` of the folder as a pod does; ends the process. A later death counts its calls from the one before."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=log)
    os.environ |= {"FINETUNE_TELEMETRY_PORT": "0", "FINETUNE_TERMINATION_LOG": str(folder / TERMINATION)}
    reporting.REPORT_SECONDS = 0.0
    np.random.seed(None)  # another process has other random states
    torch.seed()
    calls: Counter[str] = Counter()
    Watch(folder, deaths, calls).install()
    code = main(["train", "--plan", str(folder / "plan.json")])
    (folder / CALLS).write_text(json.dumps(calls))
    sys.exit(code)


class Watch:
    """Counts the calls of all places, and sends the signals when they are due."""

    def __init__(self, folder: Path, deaths: tuple[Death, ...], calls: Counter[str]) -> None:
        self._folder, self._deaths, self._calls = folder, list(deaths), calls
        self._since: Counter[str] = Counter()

    def install(self) -> None:
        for place, (owner, name) in PLACES.items():
            setattr(owner, name, self._watched(place, getattr(owner, name)))

    def _watched(self, place: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def watched(*arguments: Any, **named: Any) -> Any:
            self._calls[place] += 1
            self._since[place] += 1
            number = self._since[place]
            self._die_if_due(place, number, after=False)
            result = original(*arguments, **named)
            self._die_if_due(place, number, after=True)
            return result

        return watched

    def _die_if_due(self, place: str, number: int, after: bool) -> None:
        due = self._deaths[0] if self._deaths else None
        if due is None or (due.place, due.call, due.after) != (place, number, after):
            return
        del self._deaths[0]
        self._since.clear()
        with (self._folder / DEATHS).open("a") as file:
            file.write(f"{due.signal.name} {_phase(sys._getframe())}\n")
        os.kill(os.getpid(), due.signal)


def _phase(frame: FrameType) -> str:
    return next((PHASES[name] for name in _functions(frame) if name in PHASES), "elsewhere")


def _functions(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back
