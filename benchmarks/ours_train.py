"""Our train stage with its loop watched: `ours_train.py PLAN.json FIGURES.json time|profile`.

It runs the stage as `finetune-trainer train` does. `time` takes the CPU seconds of the loop without its evaluations,
`profile` runs the loop under torch.profiler.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from finetune_api.constants import Stage
from finetune_trainer.__main__ import main as trainer
from finetune_trainer.__main__ import read_plan
from finetune_trainer.environment import prepare_environment

# Self time of operators by what they are for; the first entry with a matching part of the name counts.
CAUSES = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "_linear", "gemm"),
    "optimizer, clipping": ("adamw", "foreach", "linalg_vector_norm", "Optimizer"),
    "softmax, cross-entropy": ("softmax", "nll_loss", "cross_entropy"),
    "copies, concatenation": ("copy_", "aten::cat", "clone", "contiguous", "index", "gather", "embedding"),
    "allocation, zeroing": ("aten::empty", "aten::zero", "aten::fill", "resize", "new_", "full"),
    "views, autograd nodes": ("view", "transpose", "reshape", "expand", "slice", "unsqueeze", "autograd::",
                              "as_strided", "aten::t", "Backward", "detach", "permute", "select", "narrow", "split"),
}  # fmt: skip
ELEMENTWISE = "element-wise arithmetic"
PYTHON = "Python between the operators"


def main(plan: str, figures: Path, watch: str) -> int:
    prepare_environment(read_plan(Path(plan), Stage.TRAIN), figures.parent)  # before torch is imported, as in a pod
    (profile if watch == "profile" else take_time)(figures)
    return trainer(["train", "--plan", plan])


def take_time(figures: Path) -> None:
    """Wall time is the trainer's own report; what it does not report is the CPU time."""
    from finetune_trainer.evaluate.predict import Evaluator
    from finetune_trainer.train.loop import Loop

    train, evaluate, evaluations = Loop.run, Evaluator.__call__, [0.0]

    def timed_evaluate(self: Any, *arguments: Any) -> Any:
        began = time.process_time()
        try:
            return evaluate(self, *arguments)
        finally:
            evaluations[0] += time.process_time() - began

    def timed_train(self: Loop) -> Any:
        evaluations[0], began = 0.0, time.process_time()
        state = train(self)
        spent = time.process_time() - began - evaluations[0]
        figures.write_text(json.dumps({"cpu_seconds": spent}), encoding="utf-8")
        return state

    patch.object(Loop, "run", timed_train).start()
    patch.object(Evaluator, "__call__", timed_evaluate).start()


def profile(figures: Path) -> None:
    import torch
    from finetune_trainer.train.loop import Loop

    train, activities = Loop.run, [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def profiled(self: Loop) -> Any:
        began = time.monotonic()
        with torch.profiler.profile(activities=activities) as profiler:
            state = train(self)
            seconds = time.monotonic() - began
        figures.write_text(json.dumps(summarise(profiler.key_averages(), seconds)), encoding="utf-8")
        return state

    patch.object(Loop, "run", profiled).start()


def summarise(averages: Any, seconds: float) -> dict[str, Any]:
    """Shares of the loop's time by cause and by operator; on CUDA of the time of the kernels."""
    on_device = any(event.self_device_time_total for event in averages)
    times = {
        event.key: (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
        for event in averages
    }
    total = max(sum(times.values()), 1e-9) if on_device else seconds
    causes: dict[str, float] = {}
    for name, spent in times.items():
        cause = next((c for c, parts in CAUSES.items() if any(part in name for part in parts)), ELEMENTWISE)
        causes[cause] = causes.get(cause, 0.0) + spent / total
    if not on_device:
        causes[PYTHON] = max(0.0, 1 - sum(causes.values()))
    operators = sorted(((spent / total, name) for name, spent in times.items()), reverse=True)[:15]
    calls = {event.key: event.count for event in averages}
    return {
        "seconds": seconds,
        "causes": dict(sorted(causes.items(), key=lambda cause: -cause[1])),
        "operators": [{"name": name, "share": share, "calls": calls[name]} for share, name in operators],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
