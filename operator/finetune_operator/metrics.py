"""The operator's own metrics, and those of the jobs that it leads.

Only the leader tells of jobs, so that sums over replicas are right. A finished job has no series of its own.
"""

from collections.abc import Callable, Iterator, Mapping

from finetune_api.constants import Phase
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_operator.observed import Key, Manifest
from finetune_operator.store import FINE_TUNE_JOBS, Store

PREFIX = "finetune_operator"

JOB_METRICS = {
    "progress_ratio": "Share of the whole job that is done, from 0 to 1.",
    "loss": "Mean training loss over the last reported steps.",
    "tokens_per_second": "Training speed in non-padding tokens.",
    "memory_bytes": "Peak memory of the accelerator, or resident memory on CPU.",
    "attempt": "Which try of the current stage this is, from 1.",
    "disruptions": "How often work was interrupted by no failure of its own: preempted, evicted, its node lost.",
}
"""Metric name without its prefix -> help."""


class Metrics:
    """The registry behind /metrics, and what the workers count."""

    def __init__(
        self,
        store: Store,
        is_leader: Callable[[], bool],
        queue_length: Callable[[], int],
        watch_ages: Callable[[], Mapping[str, float]],
        api_requests: Collector,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads
        self.registry = CollectorRegistry(auto_describe=False)
        self.reconcile_duration = Histogram(
            f"{PREFIX}_reconcile_duration_seconds", "Time that one reconcile took.", registry=self.registry
        )
        self.reconcile_errors = Counter(
            f"{PREFIX}_reconcile_errors", "Reconciles that failed and are tried again.", registry=self.registry
        )
        leader = Gauge(f"{PREFIX}_leader", "1 on the replica that holds the Lease, else 0.", registry=self.registry)
        leader.set_function(lambda: float(is_leader()))
        queue = Gauge(f"{PREFIX}_queue_length", "FineTuneJobs that wait for a worker.", registry=self.registry)
        queue.set_function(lambda: float(queue_length()))
        self.registry.register(api_requests)
        self.registry.register(_WatchCollector(watch_ages))
        self.registry.register(_JobCollector(store, is_leader))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)


class _WatchCollector(Collector):
    def __init__(self, ages: Callable[[], Mapping[str, float]]) -> None:
        self._ages = ages

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauge = GaugeMetricFamily(
            f"{PREFIX}_watch_age_seconds",
            "Time since the watch of this kind was last proven to work, by an event or by being opened anew; "
            "that happens every minute.",
            labels=["resource"],
        )
        for resource, age in self._ages().items():
            gauge.add_metric([resource], age)
        yield gauge


class _JobCollector(Collector):
    """Gauges made from the statuses at every scrape."""

    def __init__(self, store: Store, is_leader: Callable[[], bool]) -> None:
        self._store = store
        self._is_leader = is_leader

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if not self._is_leader():
            return
        phases = dict.fromkeys((str(phase) for phase in Phase), 0)
        gauges = {
            name: GaugeMetricFamily(f"{PREFIX}_job_{name}", text, labels=["namespace", "name"])
            for name, text in JOB_METRICS.items()
        }
        for key, body in self._store.all(FINE_TUNE_JOBS):
            status = body.get("status") or {}
            phase = status.get("phase") or str(Phase.PENDING)
            phases[phase] = phases.get(phase, 0) + 1
            if phase not in (Phase.SUCCEEDED, Phase.FAILED):
                _add_job(gauges, key, status)
        jobs = GaugeMetricFamily(f"{PREFIX}_jobs", "FineTuneJobs by phase.", labels=["phase"])
        for phase, count in phases.items():
            jobs.add_metric([phase], count)
        yield jobs
        yield from gauges.values()


def _add_job(gauges: Mapping[str, GaugeMetricFamily], key: Key, status: Manifest) -> None:
    metrics = status.get("metrics") or {}
    percentage = (status.get("progress") or {}).get("percentage")
    values = {
        "progress_ratio": None if percentage is None else percentage / 100,
        "loss": metrics.get("trainingLoss"),
        "tokens_per_second": metrics.get("tokensPerSecond"),
        "memory_bytes": metrics.get("peakMemoryBytes"),
        "attempt": status.get("attempt"),
        "disruptions": status.get("disruptions"),
    }
    for name, value in values.items():
        if value is not None:
            gauges[name].add_metric([key.namespace, key.name], float(value))  # decimals are strings
