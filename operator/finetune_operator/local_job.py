"""A batch/v1 Job on this machine: its pod is a process, retried and stopped by the Job's own rules.

Meanings of backoffLimit, podFailurePolicy, activeDeadlineSeconds and of the conditions are those of Kubernetes
(https://kubernetes.io/docs/concepts/workloads/controllers/job/); only the back-off is shorter, for nobody else
needs the machine meanwhile.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.constants import MASTER_ADDRESS_VARIABLE, MASTER_PORT_VARIABLE, NODE_RANK_VARIABLE

from finetune_operator.observed import Manifest, condition_of, format_time, is_running, parse_time, terminated

FIRST_BACK_OFF, LONGEST_BACK_OFF = 1.0, 60.0
"""Seconds before the second attempt, doubled for each one after it."""

GRACE_SECONDS = 60.0
"""Between SIGTERM and SIGKILL, unless the pod template says otherwise: a checkpoint may have to be written."""

PYTHON = (sys.executable, "-P")
"""-P: a module in the user's working directory is none of ours."""
TETHER = (*PYTHON, "-m", "finetune_operator.tether")
TRAINER = (*PYTHON, "-m", "finetune_trainer")


@dataclass
class _Attempt:
    """The process behind the newest pod."""

    process: subprocess.Popen[bytes]
    port: int
    termination_log: Path


class LocalJob:
    """A Job manifest with its status, and its pods, oldest first; both in the JSON form of Kubernetes."""

    def __init__(self, manifest: Manifest, pods: Sequence[Manifest], folder: Path, keep_open: Sequence[int]) -> None:
        """`folder` gets logs and termination messages; descriptors in `keep_open` stay open in the processes.

        A pod that is said to run has lost its process: this is a new process of ours, and no child outlives the old.
        """
        self.manifest = manifest
        self.pods = list(pods)
        self._folder = folder
        self._keep_open = keep_open
        self._attempt: _Attempt | None = None
        if not self._ended:
            manifest["status"].pop("startTime", None)  # the deadline is for working time
        for pod in self.pods:
            if is_running(pod):
                _end(pod, 128 + signal.SIGKILL, "", pod["status"]["startTime"])
                _mark_disrupted(pod, "finetune was killed while it ran")

    @classmethod
    def new(cls, manifest: Manifest, now: float, folder: Path, keep_open: Sequence[int]) -> "LocalJob":
        metadata = {**manifest["metadata"], "uid": str(uuid.uuid4()), "creationTimestamp": format_time(now)}
        return cls({**manifest, "metadata": metadata, "status": {}}, [], folder, keep_open)

    @property
    def port(self) -> int | None:
        """Where the running process tells its progress."""
        return self._attempt.port if self._attempt else None

    @property
    def log(self) -> Path | None:
        """Output of the newest attempt."""
        return self._folder / f"{self.pods[-1]['metadata']['name']}.log" if self.pods else None

    async def advance(self, now: float) -> None:
        """Notes what has ended, and does what the Job controller would do next."""
        self._reap(now)
        if self._ended or self.manifest["spec"].get("suspend"):
            return
        status = self.manifest["status"]
        status.setdefault("startTime", format_time(now))
        condition = self._verdict(now)
        if condition is not None:
            if self._attempt:
                await self.stop(now)
            status.setdefault("conditions", []).append(
                {"status": "True", "lastTransitionTime": format_time(now), **condition}
            )
            if condition["type"] == "Complete":
                status["completionTime"] = format_time(now)
        elif self._attempt is None and now >= self._next_start():
            self._start(now)
        self._count()

    async def set_suspend(self, suspend: bool, now: float) -> None:
        """As in a cluster: the pod of a suspended Job is stopped and deleted, and its deadline starts anew."""
        self.manifest["spec"]["suspend"] = suspend
        if suspend:
            stopped = self.pods[-1:] if self._attempt else []
            await self.stop(now)
            self.pods = [pod for pod in self.pods if pod not in stopped]
            self.manifest["status"].pop("startTime", None)
            self._count()

    async def stop(self, now: float) -> None:
        """SIGTERM, time to save a checkpoint, SIGKILL. Such an attempt is a disruption: it counts as no failure."""
        attempt = self._attempt
        if attempt is None:
            return
        attempt.process.terminate()
        grace = self._template["spec"].get("terminationGracePeriodSeconds", GRACE_SECONDS)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(attempt.process.wait, grace)
        self.kill()
        _mark_disrupted(self.pods[-1], "finetune was asked to stop")
        self._reap(now)

    def kill(self) -> None:
        """Ends the process, and whatever it started, at once."""
        if self._attempt is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._attempt.process.pid, signal.SIGKILL)
            self._attempt.process.wait()

    @property
    def _template(self) -> Manifest:
        template: Manifest = self.manifest["spec"]["template"]
        return template

    @property
    def _ended(self) -> bool:
        return bool(condition_of(self.manifest, "Complete") or condition_of(self.manifest, "Failed"))

    @property
    def _failures(self) -> list[Manifest]:
        """Pods whose failure counts."""
        policy = self.manifest["spec"].get("podFailurePolicy") or {}
        return [pod for pod in self.pods if pod["status"]["phase"] == "Failed" and _action(pod, policy) != "Ignore"]

    def _verdict(self, now: float) -> Manifest | None:
        """The condition that ends the Job, if it is time."""
        spec = self.manifest["spec"]
        if any(pod["status"]["phase"] == "Succeeded" for pod in self.pods):
            return {"type": "Complete", "reason": "CompletionsReached", "message": "the pod succeeded"}
        for pod in self._failures:
            if _action(pod, spec.get("podFailurePolicy") or {}) == "FailJob":
                code = (terminated(pod) or {}).get("exitCode")
                message = f"pod {pod['metadata']['name']} failed with exit code {code}, which is not to be retried"
                return {"type": "Failed", "reason": "PodFailurePolicy", "message": message}
        if len(self._failures) > spec.get("backoffLimit", 6):
            message = "the pod has failed as often as backoffLimit allows"
            return {"type": "Failed", "reason": "BackoffLimitExceeded", "message": message}
        deadline, started = spec.get("activeDeadlineSeconds"), parse_time(self.manifest["status"].get("startTime"))
        if deadline is not None and started is not None and now - started >= deadline:
            return {"type": "Failed", "reason": "DeadlineExceeded", "message": f"the Job ran longer than {deadline} s"}
        return None

    def _count(self) -> None:
        """status.active, .succeeded and .failed, from the pods."""
        status = self.manifest["status"]
        status["active"] = sum(is_running(pod) for pod in self.pods)
        status["succeeded"] = sum(pod["status"]["phase"] == "Succeeded" for pod in self.pods)
        status["failed"] = len(self._failures)

    def _next_start(self) -> float:
        """Unix time of the next attempt; a disrupted one is repeated at once."""
        failures = self._failures
        if not failures or failures[-1] is not self.pods[-1]:
            return 0.0
        finished = parse_time((terminated(failures[-1]) or {}).get("finishedAt")) or 0.0
        return finished + back_off(len(failures))

    def _start(self, now: float) -> None:
        """A new pod: the container's arguments are given to the trainer in this Python's environment."""
        number = int(self.pods[-1]["metadata"]["name"].rsplit("-", 1)[1]) + 1 if self.pods else 1
        name = f"{self.manifest['metadata']['name']}-{number}"
        container = self._template["spec"]["containers"][0]
        port = free_port()
        self._folder.mkdir(parents=True, exist_ok=True)
        termination_log = self._folder / f"{name}.result"
        termination_log.unlink(missing_ok=True)
        environment = os.environ | {
            "FINETUNE_TELEMETRY_HOST": "127.0.0.1",
            "FINETUNE_TELEMETRY_PORT": str(port),
            "FINETUNE_TERMINATION_LOG": str(termination_log),
            NODE_RANK_VARIABLE: "0",
            MASTER_ADDRESS_VARIABLE: "127.0.0.1",
            MASTER_PORT_VARIABLE: str(free_port()),
        }
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*TETHER, str(os.getpid()), *TRAINER, *container["args"]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=self._keep_open,
                start_new_session=True,  # Ctrl-C at the terminal is for us; we pass it on
            )
        self._attempt = _Attempt(process, port, termination_log)
        started = format_time(now)
        self.pods.append(
            {
                "metadata": {
                    "name": name,
                    "uid": str(uuid.uuid4()),
                    "labels": (self._template.get("metadata") or {}).get("labels") or {},
                    "creationTimestamp": started,
                },
                "spec": self._template["spec"],
                "status": {
                    "phase": "Running",
                    "startTime": started,
                    "containerStatuses": [{"name": container["name"], "state": {"running": {"startedAt": started}}}],
                },
            }
        )

    def _reap(self, now: float) -> None:
        """If the process has ended, so has its pod."""
        if self._attempt is None or self._attempt.process.poll() is None:
            return
        code = self._attempt.process.returncode
        message = ""
        with suppress(OSError):
            message = self._attempt.termination_log.read_text(encoding="utf-8", errors="replace")
        _end(self.pods[-1], code if code >= 0 else 128 - code, message, format_time(now))
        self._attempt = None


def back_off(failures: int) -> float:
    """Seconds before the next attempt."""
    return float(min(LONGEST_BACK_OFF, FIRST_BACK_OFF * 2 ** (failures - 1)))


def _action(pod: Mapping[str, Any], policy: Mapping[str, Any]) -> str:
    """What the first matching rule of a podFailurePolicy says about a failed pod: FailJob, Ignore or Count."""
    code = (terminated(pod) or {}).get("exitCode")
    for rule in policy.get("rules") or ():
        codes = rule.get("onExitCodes")
        if codes is not None and code:
            if (code in codes["values"]) == (codes["operator"] == "In"):
                return str(rule["action"])
        elif any(condition_of(pod, pattern["type"]) for pattern in rule.get("onPodConditions") or ()):
            return str(rule["action"])
    return "Count"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _end(pod: Manifest, code: int, message: str, finished: str) -> None:
    container = pod["status"]["containerStatuses"][0]
    started = (container["state"].get("running") or {}).get("startedAt", finished)
    container["state"] = {
        "terminated": {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": message,
            "startedAt": started,
            "finishedAt": finished,
        }
    }
    pod["status"]["phase"] = "Failed" if code else "Succeeded"


def _mark_disrupted(pod: Manifest, message: str) -> None:
    """The pod was taken away, which is not its own failure."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByFinetune", "message": message}
    pod["status"]["conditions"] = [condition]
