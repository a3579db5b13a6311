"""A cluster in memory: stands where Kubernetes stands in the port, and plays kubelet and Job controller on demand."""

import itertools
from collections.abc import Mapping
from typing import Any

from finetune_api.constants import Phase, Reason, Stage
from finetune_api.progress import Outcome, PrepareResult, Progress, PublishResult, Result, TrainResult
from finetune_api.status import ArtifactStatus, DataStatus, FineTuneJobStatus, GateResult, ModelStatus, Score
from finetune_operator.cluster import Event
from finetune_operator.controller import reconcile
from finetune_operator.decision import Context
from finetune_operator.layout import PodLayout
from finetune_operator.observed import (
    INDEX_ANNOTATION,
    INDEX_FAILURES_ANNOTATION,
    Key,
    Manifest,
    Observed,
    Resource,
    format_time,
    index_of,
    manifest_hash_of,
    merge_patch,
    newest_of_each_node,
    stage_of,
    terminated,
)
from finetune_operator.settings import Settings

KEY = Key("team-a", "demo")
CONTEXT = Context(Settings(), PodLayout())

SPEC: Manifest = {
    "task": "Classification",
    "model": {"uri": "hf://acme/encoder"},
    "dataset": {"sources": [{"uri": "s3://bucket/train.jsonl"}], "test": {"fraction": 0.2}},
    "resources": {"gpus": 1},
}

DATA = DataStatus(
    rows_read=1010, rows_kept=1000, rows_rejected=10, train_rows=700, validation_rows=100, test_rows=200, tokens=21000,
    supervised_tokens=700, truncated_rows=0, max_length=128, labels=["bad", "good"], fingerprint="f" * 64,
)  # fmt: skip
MODEL = ModelStatus(
    architecture="BertModel",
    parameters=22_000_000,
    layers=6,
    hidden_size=384,
    vocabulary_size=30522,
    context_length=512,
)
TRAINED = TrainResult(
    steps=66, best_step=44, precision="bf16", device="NVIDIA H100", trainable_parameters=300_000, training_loss=0.2,
    evaluation_loss=0.3, tokens_per_second=5000.0, samples_per_second=100.0, peak_memory_bytes=10**9, split="test",
    baseline="majority class", scores=[Score(metric="macroF1", value="0.91", baseline="0.33")],
)  # fmt: skip
ARTIFACT = ArtifactStatus(uri="pvc://demo-workspace/artifacts", sha256="a" * 64, format="Adapter", size_bytes=1234)


def success(stage: Stage, gate: GateResult | None = None) -> Result:
    """What a stage says when all went well."""
    parts: dict[Stage, dict[str, Any]] = {
        Stage.PREPARE: {"prepare": PrepareResult(data=DATA, model=MODEL)},
        Stage.TRAIN: {"train": TRAINED.model_copy(update={"gate": gate})},
        Stage.PUBLISH: {"publish": PublishResult(artifact=ARTIFACT)},
    }
    return Result(stage=stage, outcome=Outcome.SUCCEEDED, **parts[stage])


class FakeCluster:
    """Implements `finetune_operator.cluster.Cluster`; `start`, `finish` and `crash` are the world's moves."""

    def __init__(self, spec: Manifest = SPEC, context: Context = CONTEXT, key: Key = KEY) -> None:
        self.key = key
        self.context = context
        self.now = 1_800_000_000.0
        self.body: Manifest | None = {
            "metadata": {"namespace": key.namespace, "name": key.name, "uid": "uid-1", "generation": 1},
            "spec": spec,
        }
        self.jobs: dict[Stage, Manifest] = {}
        self.pods: dict[Stage, list[Manifest]] = {}
        self.progress: Progress | None = None
        self.pod_events: list[Manifest] = []
        self.policies: dict[str, str | None] = {}
        self.workload: Manifest | None = None
        self.created: list[Manifest] = []
        self.events: dict[tuple[str, str], Event] = {}
        self.status_writes = 0
        self.create_error: Exception | None = None
        self._numbers = itertools.count()

    # the port

    async def observe(self, key: Key) -> tuple[Resource, Observed] | None:
        if self.body is None:
            return None
        pods = {stage: list(pods) for stage, pods in self.pods.items()}
        observed = Observed(dict(self.jobs), pods, self.progress, self.workload, self.pod_events, dict(self.policies))
        return Resource.read(self.body), observed

    async def refresh(self, key: Key) -> None:
        pass

    async def create(self, resource: Resource, manifest: Manifest) -> None:
        if self.create_error is not None:
            raise self.create_error
        self.created.append(manifest)
        stage = stage_of(manifest)
        if manifest["kind"] == "NetworkPolicy":
            self.policies[manifest["metadata"]["name"]] = manifest_hash_of(manifest)
        if manifest["kind"] == "Job" and stage is not None:
            assert stage not in self.jobs, f"a second Job for {stage}"
            metadata = {**manifest["metadata"], "uid": f"job-{next(self._numbers)}"}
            self.jobs[stage] = {**manifest, "metadata": metadata, "status": {}}

    async def change_job(self, resource: Resource, stage: Stage, patch: Manifest) -> None:
        self.jobs[stage] = merge_patch(self.jobs[stage], patch)
        if self.jobs[stage]["spec"]["suspend"]:
            self.pods[stage] = [pod for pod in self.pods.get(stage, []) if pod["status"]["phase"] != "Running"]

    async def delete_child(self, resource: Resource, stage: Stage) -> None:
        del self.jobs[stage]
        self.pods.pop(stage, None)

    async def delete(self, resource: Resource) -> None:
        self.body = None

    async def write_status(self, resource: Resource, status: FineTuneJobStatus) -> None:
        assert self.body is not None
        assert status != resource.status, "a status write without a change"
        self.status_writes += 1
        self.body["status"] = status.to_dict()

    def emit(self, resource: Resource, event: Event) -> None:
        self.events.setdefault((event.reason, event.key), event)

    # the world

    @property
    def status(self) -> FineTuneJobStatus:
        assert self.body is not None
        return Resource.read(self.body).status

    def condition(self, kind: str) -> tuple[str, str] | None:
        """(status, reason) of a condition, or None."""
        for condition in self.status.conditions or ():
            if condition.type == kind:
                return condition.status, condition.reason.value
        return None

    async def turn(self, seconds: float = 1.0) -> float | None:
        self.now += seconds
        return await reconcile(self, self.key, self.context, self.now)

    async def settle(self) -> None:
        """Reconciles until nothing changes; a loop that never rests fails the test."""
        for _ in range(10):
            before = (self.status_writes, len(self.created))
            await self.turn()
            if (self.status_writes, len(self.created)) == before:
                return
        raise AssertionError("the reconcile never comes to rest")

    def edit(self, **spec: Any) -> None:
        assert self.body is not None
        self.body["spec"] = {**self.body["spec"], **spec}
        self.body["metadata"]["generation"] += 1

    def edit_status(self, **fields: Any) -> None:
        """By hand; None takes a field away."""
        assert self.body is not None
        self.body["status"] = merge_patch(self.body["status"], fields)

    def pod(self, stage: Stage, status: Manifest, node: int = 0) -> Manifest:
        failures = sum(  # what the Job controller has counted for this node
            index_of(pod) == node and (terminated(pod) or {}).get("exitCode") not in (0, 75, None)
            for pod in self.pods.get(stage, [])
        )
        pod = {
            "metadata": {
                "name": f"demo-{stage}-{node}-{next(self._numbers)}",
                "uid": f"pod-{next(self._numbers)}",
                "annotations": {INDEX_ANNOTATION: str(node), INDEX_FAILURES_ANNOTATION: str(failures)},
            },
            "spec": self.jobs[stage]["spec"]["template"]["spec"],
            "status": status,
        }
        self.pods.setdefault(stage, []).append(pod)
        return pod

    def start(self, stage: Stage, node: int = 0) -> Manifest:
        if node == 0:
            self.progress = None  # a new pod has said nothing yet
        running = {"startedAt": format_time(self.now)}
        return self.pod(stage, {"phase": "Running", "containerStatuses": [{"state": {"running": running}}]}, node)

    def say(self, stage: Stage, **fields: Any) -> None:
        self.progress = Progress(stage=stage, activity="Training", updated_at=self.now, **fields)

    def finish(self, stage: Stage, result: Result | None = None) -> None:
        """The running pod ends well, and its Job with it."""
        self.finish_pod(stage, result)
        self.jobs[stage]["status"] = {
            "conditions": [{"type": "Complete", "status": "True"}],
            "completionTime": format_time(self.now),
        }

    def finish_pod(self, stage: Stage, result: Result | None = None, node: int = 0) -> None:
        """The running pod ends well; its Job does not know yet."""
        message = (result or success(stage)).to_termination_message()
        self._end(stage, "Succeeded", {"exitCode": 0, "reason": "Completed", "message": message}, node)

    def crash(
        self, stage: Stage, code: int, *, reason: str = "Error", said: Result | None = None, final: bool, node: int = 0
    ) -> None:
        """The running pod ends badly; `final`: its Job gives up."""
        end = {"exitCode": code, "reason": reason, "message": said.to_termination_message() if said else ""}
        self._end(stage, "Failed", end, node)
        status = self.jobs[stage]["status"]
        status["failed"] = status.get("failed", 0) + 1
        if final:
            status["conditions"] = [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]

    def disrupt(self, stage: Stage, reason: str, message: str = "", node: int = 0) -> Manifest:
        """The cluster takes a running pod away, which has time to save."""
        pod = next(pod for pod in newest_of_each_node(self.pods[stage]) if index_of(pod) == node)
        pod["metadata"]["deletionTimestamp"] = format_time(self.now + 120)
        condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
        pod["status"] = {**pod["status"], "conditions": [condition]}
        return pod

    def _end(self, stage: Stage, phase: str, end: Manifest, node: int) -> None:
        pod = next(pod for pod in newest_of_each_node(self.pods[stage]) if index_of(pod) == node)
        pod["status"] = {**pod["status"], "phase": phase, "containerStatuses": [{"state": {"terminated": end}}]}
        if node == 0:
            self.progress = None

    async def live(self, results: Mapping[Stage, Result] | None = None) -> None:
        """A whole life: all stages, resumed if it began suspended; or as far as the job comes."""
        await self.settle()
        for stage in Stage:
            if self.body is None or self.status.completion_time:
                return
            if self.status.phase is Phase.SUSPENDED:
                self.edit(suspend=False)
                await self.settle()
            if stage not in self.jobs:  # a job that does not fit has failed meanwhile
                return
            self.start(stage)
            await self.settle()
            self.finish(stage, (results or {}).get(stage))
            await self.settle()

    async def pass_through(self, *stages: Stage) -> None:
        """Brings the job through whole stages."""
        for stage in stages:
            await self.settle()
            self.start(stage)
            await self.settle()
            self.finish(stage)
        await self.settle()


def failure(stage: Stage, reason: Reason, message: str, **parts: Any) -> Result:
    return Result(stage=stage, outcome=Outcome.FAILED, reason=reason, message=message, **parts)
