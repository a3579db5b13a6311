"""Nodes with no machine behind them (KWOK): their pods run for as long, and end with the words, that are asked for."""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune_api.constants import JOB_LABEL, STAGE_LABEL, Stage
from finetune_api.progress import Outcome, PrepareResult, PublishResult, Result, TrainResult
from finetune_api.status import ArtifactStatus, DataStatus, ModelStatus, Score

GPUS_PER_NODE = 8
SCHEDULING = {
    "nodeSelector": {"type": "kwok"},
    "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Equal", "value": "fake", "effect": "NoSchedule"}],
}
"""`spec.scheduling` of a FineTuneJob that is to run there, and there only."""

RESULTS = (
    Result(
        stage=Stage.PREPARE,
        outcome=Outcome.SUCCEEDED,
        prepare=PrepareResult(
            data=DataStatus(
                rows_read=1000, rows_kept=1000, rows_rejected=0, train_rows=700, validation_rows=100, test_rows=200,
                tokens=21000, supervised_tokens=700, truncated_rows=0, max_length=128, labels=["bad", "good"],
                fingerprint="f" * 64,
            ),
            model=ModelStatus(
                architecture="BertModel", parameters=22_000_000, layers=6, hidden_size=384, vocabulary_size=30522,
                context_length=512,
            ),
        ),
    ),
    Result(
        stage=Stage.TRAIN,
        outcome=Outcome.SUCCEEDED,
        train=TrainResult(
            steps=66, best_step=44, precision="bf16", device="fake", trainable_parameters=300_000, training_loss=0.2,
            evaluation_loss=0.3, tokens_per_second=5000.0, samples_per_second=100.0, peak_memory_bytes=10**9,
            split="test", baseline="majority class", scores=[Score(metric="macroF1", value="0.91", baseline="0.33")],
        ),
    ),
    Result(
        stage=Stage.PUBLISH,
        outcome=Outcome.SUCCEEDED,
        publish=PublishResult(
            artifact=ArtifactStatus(uri="pvc://fake/artifacts", sha256="a" * 64, format="Adapter", size_bytes=1234)
        ),
    ),
)  # fmt: skip
"""The termination messages of the stages' pods."""

NODE_STATUS = """
{{ $now := Now }}
conditions:
{{ range NodeConditions }}
- {type: {{ .type }}, status: {{ .status | Quote }}, reason: {{ .reason }}, message: {{ .message | Quote }},
   lastHeartbeatTime: {{ $now }}, lastTransitionTime: {{ $now }}}
{{ end }}
addresses:
- {type: InternalIP, address: {{ NodeIP }}}
"""

RUNNING = """
{{ $now := Now }}
{{ $number := index .metadata.labels "%(label)s" | regexFind "[0-9]+$" | atoi }}
phase: Running
startTime: {{ $now }}
podIP: 127.77.{{ div $number 250 }}.{{ add1 (mod $number 250) }}
conditions:
{{ range (list "PodScheduled" "Initialized" "ContainersReady" "Ready") }}
- {type: {{ . }}, status: "True", lastTransitionTime: {{ $now }}}
{{ end }}
containerStatuses:
{{ range .spec.containers }}
- {name: {{ .name }}, image: {{ .image }}, ready: true, restartCount: 0, state: {running: {startedAt: {{ $now }}}}}
{{ end }}
"""

SUCCEEDED = """
{{ $now := Now }}
phase: Succeeded
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name }}
  image: {{ .image }}
  ready: false
  restartCount: 0
  state:
    terminated: {exitCode: 0, reason: Completed, startedAt: {{ $now }}, finishedAt: {{ $now }}, message: %(message)s}
{{ end }}
"""


def address_of(number: int) -> str:
    """The IP of the pods of the job whose name ends with `number`: an address of this machine."""
    return f"127.77.{number // 250}.{number % 250 + 1}"


def make_stages(seconds: Mapping[Stage, float], jobs: Sequence[str] | None = None) -> str:
    """A KWOK configuration: pods of a stage succeed after so many seconds, of all jobs or of `jobs` alone.

    All other pods run until they are deleted.
    """
    ready = ('.status.conditions.[] | select( .type == "Ready" ) | .status', "NotIn", ["True"])
    alive = (".metadata.deletionTimestamp", "DoesNotExist")
    named = [(f'.metadata.labels["{JOB_LABEL}"]', "In", list(jobs))] if jobs is not None else []
    start = RUNNING % {"label": JOB_LABEL}
    stages = [
        _stage("node-ready", "Node", [ready], {"statusTemplate": NODE_STATUS}),
        _stage("pod-started", "Pod", [alive, _in_phase("Pending")], {"statusTemplate": start}, 0.2),
        _stage("pod-gone", "Pod", [(alive[0], "Exists")], {"delete": True, "finalizers": {"empty": True}}),
    ]
    for result in RESULTS:
        if result.stage in seconds:
            end = SUCCEEDED % {"message": json.dumps(result.to_termination_message())}
            which = [alive, _in_phase("Running"), (f'.metadata.labels["{STAGE_LABEL}"]', "In", [result.stage]), *named]
            stages.append(_stage(f"{result.stage}-ended", "Pod", which, {"statusTemplate": end}, seconds[result.stage]))
    return "\n---\n".join(json.dumps(stage) for stage in stages)


def _in_phase(phase: str) -> tuple[Any, ...]:
    return ".status.phase", "In", [phase]


def _stage(
    name: str, kind: str, which: Iterable[tuple[Any, ...]], change: Mapping[str, Any], delay: float = 0
) -> dict[str, Any]:
    """What KWOK does with objects for which all of `which` holds: key, operator and, for some operators, values."""
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {
                "matchExpressions": [dict(zip(("key", "operator", "values"), one, strict=False)) for one in which]
            },
            "delay": {"durationMilliseconds": int(delay * 1000)},
            "next": change,
        },
    }


@contextmanager
def fake_nodes(count: int, stages: str) -> Iterator[None]:
    """That many nodes of these stages, gone afterwards. No pod may be on them any more when it ends.

    Raises RuntimeError if there are fake nodes already, which would not obey these stages.
    """
    tool = os.environ.get("FINETUNE_CLUSTER_TOOL")
    if not tool:
        raise RuntimeError("FINETUNE_CLUSTER_TOOL does not name the test cluster's tool")
    if _kubectl("get", "nodes", "-l", "type=kwok", "-o", "name"):
        raise RuntimeError("there are fake nodes already: delete them and end their KWOK")
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder, "stages.yaml")
        configuration.write_text(stages)
        try:
            subprocess.run([tool, "fake-nodes", str(count), str(configuration)], check=True, stderr=subprocess.DEVNULL)
            yield
        finally:
            _end_processes_with(str(configuration))
            _kubectl("delete", "nodes", "-l", "type=kwok", "--wait=false")


def _kubectl(*arguments: str) -> bytes:
    return subprocess.run(["kubectl", *arguments], check=True, stdout=subprocess.PIPE).stdout


def _end_processes_with(argument: str) -> None:
    """KWOK runs on when the tool has ended; the next one does not start before this one is gone."""
    for kill in (signal.SIGTERM, signal.SIGKILL):
        for process in _processes_with(argument):
            with suppress(ProcessLookupError):
                os.kill(process, kill)
        for _ in range(100):
            if not any(_processes_with(argument)):
                return
            time.sleep(0.1)


def _processes_with(argument: str) -> Iterator[int]:
    """Processes whose command line holds these words."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:  # it has ended
            continue
        if argument.encode() in words:
            yield int(path.parent.name)
