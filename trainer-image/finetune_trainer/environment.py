"""What libraries read from the environment; set before they are imported."""

import math
import os
import sys
from pathlib import Path
from typing import Any

from finetune_api.constants import Stage
from finetune_api.plan import Plan

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def prepare_environment(plan: Plan, temporary: Path) -> None:
    """No calls home, no hub where none is needed, caches in `temporary` (the root filesystem is read-only), nothing of
    quantization where none is asked for.
    """
    settings = {
        "HF_HOME": str(temporary / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "true",
        # threads that spin while they wait for each other take the CPU from the one that has work
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if not _needs_hub(plan):
        settings |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if not sys.stdout.isatty():
        settings |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.update(settings)
    threads, processes = cpu_limit(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:
        threads = max(1, (threads or os.cpu_count() or 1) // processes)
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if plan.lora is None or plan.lora.quantization is None:
        modules: dict[str, Any] = sys.modules
        modules.setdefault("bitsandbytes", None)  # to peft it is not there; it would import it, which takes 45 MB


def _needs_hub(plan: Plan) -> bool:
    output = plan.output.location
    return plan.stage is Stage.PREPARE or (
        plan.stage is Stage.PUBLISH and output is not None and output.uri.startswith("hf://")
    )


def cpu_limit(quota: Path = CPU_QUOTA) -> int | None:
    """Whole CPUs that the container's limit allows; None without one.

    torch starts a thread per CPU of the node, and a limit below that makes them wait for each other.
    """
    try:
        allowed, period = quota.read_text().split()
        return None if allowed == "max" else max(1, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None
