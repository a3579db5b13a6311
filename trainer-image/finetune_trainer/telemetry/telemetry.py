"""`Telemetry`: the stage's progress, kept by the working thread and read by the HTTP server's threads."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from finetune_api.constants import TELEMETRY_PORT, Stage
from finetune_api.plan import JobReference
from finetune_api.progress import Progress
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_trainer.telemetry.server import Page, serve

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PORT_VARIABLE = "FINETUNE_TELEMETRY_PORT"
HOST_VARIABLE = "FINETUNE_TELEMETRY_HOST"
"""Address to listen on: a pod's are all meant, `finetune run` names the loopback."""

METRICS = {
    "progress_ratio": ("fraction", "Share of the stage that is done, from 0 to 1."),
    "step": ("step", "Optimizer steps done, counted from the run's true start."),
    "steps": ("total_steps", "Optimizer steps of the whole run."),
    "epoch": ("epoch", "Passes over the training rows done."),
    "estimated_remaining_seconds": ("estimated_remaining_seconds", "Time to the end of the stage."),
    "training_loss": ("training_loss", "Mean training loss over the last reported steps."),
    "evaluation_loss": ("evaluation_loss", "Loss on validation at the last evaluation."),
    "learning_rate": ("learning_rate", "Learning rate of the last step."),
    "tokens_per_second": ("tokens_per_second", "Training speed in non-padding tokens."),
    "samples_per_second": ("samples_per_second", "Training speed in rows."),
    "peak_memory_bytes": ("peak_memory_bytes", "Peak memory of the accelerator, or resident memory on CPU."),
    "micro_batch_tokens": ("micro_batch_tokens", "Most tokens of a micro-batch, lowered as a GPU ran out of memory."),
    "trainable_parameters": ("trainable_parameters", "Number of weights that are trained."),
    "updated_timestamp_seconds": ("updated_at", "Unix time of the last change."),
}
"""Metric name without its prefix -> field of Progress, help."""


class Telemetry:
    """Holds the newest `Progress`, serves it while it is entered, and carries the request to stop.

    Nothing here can end a training: a port that is taken costs the endpoint and a warning, a hostile client its
    own connection.
    """

    def __init__(
        self,
        stage: Stage,
        job: JobReference,
        port: int = TELEMETRY_PORT,
        stop_requested: threading.Event | None = None,
    ) -> None:
        self.stop_requested = stop_requested or threading.Event()
        """Set by SIGTERM: finish the step, save, raise Interrupted."""
        self.port: int | None = None
        """Where it listens, while it does."""
        self._wanted_port = port
        self._lock = threading.Lock()
        self._progress = Progress(stage=stage, activity="Starting", fraction=0, updated_at=time.time())
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_ProgressCollector(self, job))
        self._server: Any = None

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._progress

    def update(self, **fields: Any) -> None:
        """Changes fields of `Progress`; raises ValidationError for one that does not exist."""
        if "fraction" in fields:  # a sum of floats may end at 1.0000000002
            fields["fraction"] = min(1.0, max(0.0, float(fields["fraction"])))
        with self._lock:
            known = self._progress.model_dump()
            self._progress = Progress.model_validate({**known, **fields, "updated_at": time.time()})

    def beat(self) -> None:
        """Says that the work goes on, at most once a second: a step or an evaluation may take minutes."""
        if time.time() - self.progress.updated_at >= BEAT_SECONDS:
            self.update()

    def __enter__(self) -> Self:
        try:
            self._server = serve(os.environ.get(HOST_VARIABLE, "0.0.0.0"), self._wanted_port, self._page)
        except (OSError, OverflowError) as error:
            logger.warning("No progress and metrics: cannot listen on port %d: %s", self._wanted_port, error)
        else:
            self.port = self._server.server_address[1]
            logger.debug("Progress and metrics on port %d", self.port)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._server = self.port = None

    def _page(self, path: str) -> Page | None:
        match path:
            case "/progress":
                return Page("application/json", self.progress.to_json().encode())
            case "/metrics":
                return Page("text/plain; version=0.0.4; charset=utf-8", generate_latest(self._registry))
            case "/healthz":
                return Page("text/plain; charset=utf-8", b"ok\n")
            case _:
                return None


class _ProgressCollector(Collector):
    """Gauges made from the newest progress at every scrape; what is not known has no series."""

    def __init__(self, telemetry: Telemetry, job: JobReference) -> None:
        self._telemetry = telemetry
        self._job = job

    def collect(self) -> Iterator[GaugeMetricFamily]:
        progress = self._telemetry.progress
        for name, (field, text) in METRICS.items():
            value = getattr(progress, field)
            if value is not None:
                gauge = GaugeMetricFamily(f"finetune_trainer_{name}", text, labels=["namespace", "name", "stage"])
                gauge.add_metric([self._job.namespace, self._job.name, progress.stage], value)
                yield gauge


def port_from_environment() -> int:
    """The port to listen on: FINETUNE_TELEMETRY_PORT (0: any free one), or 9400."""
    text = os.environ.get(PORT_VARIABLE, "")
    if text and not text.isdecimal():
        logger.warning("%s=%r is not a port; using %d", PORT_VARIABLE, text, TELEMETRY_PORT)
    return int(text) if text.isdecimal() else TELEMETRY_PORT
