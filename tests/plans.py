"""Plans for the trainer's tests: whole and valid, with what a test is about changed."""

from pathlib import Path
from typing import Any

from finetune_api.constants import Stage
from finetune_api.plan import Plan


def make_plan(workspace: Path, stage: Stage = Stage.TRAIN, **changes: Any) -> Plan:
    """A classification with LoRA on CPU. `changes` are fields of the plan; a dict changes only what it names."""
    data = {
        "stage": stage,
        "job": {"namespace": "team", "name": "sentiment", "uid": "0001"},
        "workspace": str(workspace),
        "task": "Classification",
        "model": {"location": {"uri": "hf://owner/base"}},
        "dataset": {
            "sources": [{"location": {"uri": "s3://bucket/train.csv"}, "field": "dataset.sources[0]"}],
            "validation": {"fraction": 0.1},
        },
        "method": "LoRA",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "training": {
            "epochs": 2.0,
            "learning_rate": 1e-3,
            "batch_sequences": 8,
            "micro_batch_tokens": 1024,
            "max_length": 64,
            "precision": "fp32",
            "seed": 7,
            "schedule": "Cosine",
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "max_grad_norm": 1.0,
            "checkpoint_steps": 10,
            "evaluation_steps": 10,
        },
        "evaluation": {"metrics": ["macroF1", "accuracy"]},
        "device": {"gpus": 0, "nodes": 1, "allow_cpu_fallback": False},
        "output": {"format": "Adapter", "workspace_uri": "pvc://sentiment/artifacts"},
    }
    return Plan.model_validate(_merge(data, changes))


def _merge(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return data | {
        key: _merge(data[key], value) if isinstance(value, dict) and isinstance(data.get(key), dict) else value
        for key, value in changes.items()
    }
