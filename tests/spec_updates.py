"""What may change of a job after its creation, and what may not."""

from dataclasses import dataclass
from typing import Any

from tests.specs import EVERYTHING, LABEL_RULE, LEFT_OUT, TEXTS, Changes


@dataclass(frozen=True)
class Update:
    """A job of `spec` with the changes `before`, then `after` instead; refused at `field` unless that is empty."""

    name: str
    before: Changes
    after: Changes
    field: str = ""


_REFUSED: dict[str, tuple[Any, Any]] = {
    "task": ("Classification", "Generation"),
    "model.uri": ("hf://owner/encoder", "hf://owner/other"),
    "model.revision": (LEFT_OUT, "main"),
    "model.secretRef": (LEFT_OUT, {"name": "token"}),
    "model.trustRemoteCode": (False, True),
    "model.adapter": (LEFT_OUT, {"uri": "s3://bucket/adapter"}),
    "model.adapter.uri": ("s3://bucket/adapter", "s3://bucket/other"),
    "dataset.sources": (TEXTS, TEXTS * 2),
    "dataset.validation": (LEFT_OUT, {"fraction": 0.1}),
    "dataset.test": ({"fraction": 0.1}, {"fraction": 0.2}),
    "dataset.labels": (["a", "b"], ["b", "a"]),
    "dataset.review": (LEFT_OUT, {}),
    "dataset.review.suspectWeight": (LEFT_OUT, 0.5),
    "dataset.duplicates": (LEFT_OUT, {}),
    "dataset.duplicates.similarity": (0.8, 0.9),
    "dataset.labelling": (LEFT_OUT, {"minimumRows": 2}),
    "dataset.labelling.rules": ([LABEL_RULE], [LABEL_RULE | {"label": "negative"}]),
    "dataset.clean": (LEFT_OUT, {"unicode": "NFC"}),
    "dataset.personalData": (LEFT_OUT, {"action": "Redact"}),
    "dataset.personalData.action": ("Redact", "Keep"),
    "dataset.maxRejected": (LEFT_OUT, 0.1),
    "method": (LEFT_OUT, {"type": "Full"}),
    "method.lora": (LEFT_OUT, {}),
    "method.lora.rank": (8, 16),
    "method.lora.variant": (LEFT_OUT, "RsLoRA"),
    "method.lora.quantization": (LEFT_OUT, "NF4"),
    "method.headFirst": (LEFT_OUT, {"epochs": 1}),
    "method.headFirst.epochs": (1, 2),
    "method.trainable.lastLayers": (1, 2),
    "training": (LEFT_OUT, {"seed": 43}),
    "training.epochs": (LEFT_OUT, 3),
    "training.batchSize": (LEFT_OUT, {"sequences": 32}),
    "training.batchSize.sequences": (32, 16),
    "training.seed": (1, 2),
    "training.compile": (False, True),
    "training.earlyStopping": (LEFT_OUT, {"patience": 2}),
    "training.earlyStopping.patience": (2, 3),
    "evaluation.metrics": (["loss", "accuracy"], ["accuracy", "loss"]),
    "evaluation.gate": (LEFT_OUT, {"metric": "loss", "maximum": 1}),
    "evaluation.gate.minimum": (LEFT_OUT, 0.9),
    "resources.gpus": (LEFT_OUT, 1),
    "resources.gpuMemory": (LEFT_OUT, "80Gi"),
    "training.activationCheckpointing": (LEFT_OUT, True),
    "resources.nodes": (1, 2),
    "resources.requests": (LEFT_OUT, {}),
    "resources.requests.memory": ("1Gi", "2Gi"),
    "resources.limits": ({"cpu": 1}, {"cpu": 2}),
    "resources.prepare": (LEFT_OUT, {}),
    "scheduling": (LEFT_OUT, {}),
    "scheduling.queueName": ("a", "b"),
    "scheduling.workloadPriorityClassName": (LEFT_OUT, "urgent"),
    "scheduling.nodeSelector": (LEFT_OUT, {"zone": "a"}),
    "scheduling.tolerations": ([{"key": "a"}], []),
    "scheduling.affinity": (LEFT_OUT, {}),
    "workspace.size": (LEFT_OUT, "20Gi"),
    "workspace.claimName": ("a", "b"),
    "workspace.retain": (False, True),
    "output.uri": (LEFT_OUT, "s3://bucket/out"),
    "output.format": (LEFT_OUT, "Adapter"),
    "managedBy": (LEFT_OUT, "example.com/ours"),
}
_NEEDED: dict[str, Changes] = {
    "method.lora.quantization": {"resources.gpus": 1},
    "method.trainable.lastLayers": {"method.type": "Full"},
    "evaluation.gate.minimum": {"evaluation.gate": {"metric": "accuracy", "minimumGain": 0}},
    "resources.nodes": {"workspace.claimName": "team"},
    "scheduling.workloadPriorityClassName": {"scheduling.queueName": "a"},
}

UPDATES = [
    *(
        Update(f"{path} {word}", {**_NEEDED.get(path, {}), path: old}, {**_NEEDED.get(path, {}), path: new},
               field="spec." + path.split(".")[0])
        for path, values in _REFUSED.items()
        for word, (old, new) in {"added" if values[0] is LEFT_OUT else "changed": values,
                                 "removed" if values[0] is LEFT_OUT else "changed back": values[::-1]}.items()
    ),
    Update("suspend", {}, {"suspend": True}),
    Update("resume", {"suspend": True}, {"suspend": False}),
    Update("limits", {"limits": {"retries": 1, "activeDeadlineSeconds": 60}}, {"limits": {"retries": 9, "stallSeconds": 600}}),
    Update("ttl added", {}, {"limits.ttlSecondsAfterFinished": 60}),
    Update("ttl removed", {"limits.ttlSecondsAfterFinished": 60}, {"limits": LEFT_OUT}),
    Update("labels and annotations", {}, {".metadata.labels": {"team": "a"}, ".metadata.annotations": {"why": "b"}}),
    Update("a default written out", {}, {"method": {"type": "LoRA"}, "training": {"maxGradNorm": 1, "seed": 42}}),
    Update("an empty block written out", {}, {"training": {}, "evaluation": {}, "output": {}}),
    Update("a default left out", {"method.type": "LoRA", "workspace.retain": False}, {}),
    Update("nothing", EVERYTHING, EVERYTHING),
]  # fmt: skip
