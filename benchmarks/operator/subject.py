"""The operator of this tree as a process of this machine, and what it says about itself."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

Requests = Counter[tuple[str, str, str]]
"""Verb, resource and HTTP status -> how many requests."""


class Subject:
    """`start` it, `kill` it and start it anew; `peak_memory` and `cpu_seconds` are those of all of its lives."""

    def __init__(self, namespace: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._environment = {
            **os.environ,
            "FINETUNE_POD_NAMESPACE": namespace,
            "FINETUNE_WATCH_NAMESPACES": namespace,
            "FINETUNE_HTTP_PORT": str(self._port),
            "FINETUNE_LOG_LEVEL": "WARNING",
        }
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.peak_memory = 0

    def start(self) -> None:
        command = [sys.executable, "-m", "finetune_operator"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """As the kernel does: nothing is put in order, the Lease is not released."""
        if self._process is not None:
            self.note_memory()
            self._process.kill()
            self._process.wait()
            self._process = None

    def note_memory(self) -> None:
        assert self._process is not None
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
            self.peak_memory = max(self.peak_memory, peak * 1024)

    async def samples(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Its metrics by name; empty while it does not answer. Raises RuntimeError if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(
                f"the operator has ended with exit code {self._process.returncode}: {self._log.read_text()[-2000:]}"
            )
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{self._port}/metrics") as answer,
            ):
                text = await answer.text()
        except (aiohttp.ClientError, OSError):
            return {}
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    async def phases(self) -> dict[str, int]:
        """How many jobs are in which phase."""
        samples = await self.samples()
        return {labels["phase"]: int(value) for labels, value in samples.get("finetune_operator_jobs", [])}

    async def requests(self) -> Requests:
        """To the API server, since its start."""
        samples = await self.samples()
        found = samples.get("finetune_operator_api_requests_total", [])
        return Counter({(labels["verb"], labels["resource"], labels["code"]): int(value) for labels, value in found})

    async def cpu_seconds(self) -> float:
        return _value(await self.samples(), "process_cpu_seconds_total")

    async def is_idle(self, jobs: int) -> bool:
        """Whether it leads, has looked at that many jobs at least, and none waits."""
        samples = await self.samples()
        turns = _value(samples, "finetune_operator_reconcile_duration_seconds_count")
        leads = _value(samples, "finetune_operator_leader") == 1
        return leads and turns >= jobs and _value(samples, "finetune_operator_queue_length") == 0


def _value(samples: dict[str, Any], name: str) -> float:
    return float(samples[name][0][1]) if name in samples else 0.0


async def wait_until_idle(subject: Subject, jobs: int, seconds: float) -> None:
    """Raises TimeoutError if it is not within that time."""
    async with asyncio.timeout(seconds):
        while True:
            if await subject.is_idle(jobs):
                return
            await asyncio.sleep(0.25)
