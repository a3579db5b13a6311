"""What a running training tells: progress every second, a line in report/training.jsonl, a line in the log."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.telemetry import Telemetry
from finetune_trainer.workspace import write_file

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0
LOG_SECONDS = 10.0
TRAINING_SHARE = 0.97
"""Of the stage's progress; the rest is the final evaluation."""


class TrainingLog:
    """report/training.jsonl: one line per report or evaluation, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rewind(self, step: int, evaluated_step: int) -> None:
        """Drops what an earlier attempt wrote after these, and a line that it did not finish.

        The evaluation after a step may be written, and yet be no part of the state that a run goes on from.
        """
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        write_file(self._path, "".join(f"{line}\n" for line in lines if _is_of(line, step, evaluated_step)))

    def write(self, **values: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def _is_of(line: str, step: int, evaluated_step: int) -> bool:
    """Whether it is a whole line about the steps up to `step`, or the evaluations up to `evaluated_step`."""
    try:
        values = json.loads(line)
        return 0 < int(values["step"]) <= (evaluated_step if "evaluation" in values else step)
    except (ValueError, KeyError, TypeError):
        return False


@dataclass
class Interval:
    """Sums since the last report; `loss` stays on the device, so that adding to it waits for nothing."""

    loss: torch.Tensor
    targets: float = 0
    """What the loss is divided by: the number of losses, or the sum of their weights."""
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0


class Pace:
    """How long the rest takes, from the speed of this attempt."""

    def __init__(self, evaluations: int) -> None:
        self._evaluations_left = evaluations
        self._step_seconds = self._evaluation_seconds = 0.0
        self._steps = self._evaluations = 0

    def step(self, seconds: float) -> None:
        self._steps += 1
        self._step_seconds += seconds

    def evaluation(self, seconds: float) -> None:
        self._evaluations += 1
        self._evaluations_left -= 1
        self._evaluation_seconds += seconds

    def remaining(self, steps: int) -> float | None:
        """Seconds for `steps` more steps and the evaluations that are left; None before the first step."""
        if self._steps == 0:
            return None
        evaluation = self._evaluation_seconds / self._evaluations if self._evaluations else 0.0
        return steps * self._step_seconds / self._steps + max(0, self._evaluations_left) * evaluation


class Reporter:
    """Reports at most once per second, so that the device is asked for its loss seldom."""

    def __init__(self, telemetry: Telemetry, log: TrainingLog, total_steps: int) -> None:
        self._telemetry = telemetry
        self._log = log
        self._total_steps = total_steps
        self._reported = self._logged = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._reported >= REPORT_SECONDS

    def steps(
        self, interval: Interval, *, step: int, epoch: float, rate: float, remaining: float | None, peak_memory: int
    ) -> None:
        """Reports the steps of `interval`, the last of which was number `step` (from 1)."""
        self._reported = time.monotonic()
        loss = float(interval.loss) / (interval.targets or 1)
        seconds = max(interval.seconds, 1e-9)
        speed = {"tokens_per_second": interval.tokens / seconds, "samples_per_second": interval.rows / seconds}
        self._telemetry.update(
            activity="Training",
            fraction=TRAINING_SHARE * (step / self._total_steps),
            step=step,
            epoch=epoch,
            training_loss=loss,
            learning_rate=rate,
            estimated_remaining_seconds=remaining,
            peak_memory_bytes=peak_memory,
            **speed,
        )
        self._log.write(
            step=step, epoch=epoch, trainingLoss=loss, learningRate=rate, tokensPerSecond=speed["tokens_per_second"]
        )
        if self._reported - self._logged >= LOG_SECONDS or step == self._total_steps:
            self._logged = self._reported
            logger.info(
                "Step %d of %d: loss %.4f, %.0f tokens/s, %.0f s left",
                step, self._total_steps, loss, speed["tokens_per_second"], remaining or 0,
            )  # fmt: skip

    def evaluation(self, step: int, metrics: dict[str, float], best: bool) -> None:
        self._telemetry.update(activity="Training", evaluation_loss=metrics["loss"])
        self._log.write(step=step, evaluation=metrics, best=best)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logger.info("Evaluation after step %d: %s%s", step, scores, " (best so far)" if best else "")


class Silent(Reporter):
    """Of a process that does not speak for all."""

    def due(self) -> bool:
        return False

    def steps(
        self, interval: Interval, *, step: int, epoch: float, rate: float, remaining: float | None, peak_memory: int
    ) -> None:
        """Reports nothing."""

    def evaluation(self, step: int, metrics: dict[str, float], best: bool) -> None:
        """Reports nothing."""
