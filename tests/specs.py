"""FineTuneJobs by example, and what is accepted. Refused are those of `specs_beyond_bounds` and `specs_against_rules`; what may
change after creation is in `spec_updates`.

One table for two judges: `finetune run` (tests/unit/api) and a real API server (tests/cluster/test_validation.py).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.constants import API_VERSION, KIND

Manifest = dict[str, Any]
Changes = Mapping[str, Any]

LEFT_OUT = object()
"""As a value in changes: the key is removed."""

TEXTS = [{"uri": "pvc://data/texts.jsonl"}]
CLASSIFICATION: Manifest = {
    "task": "Classification",
    "model": {"uri": "hf://owner/encoder"},
    "dataset": {"sources": TEXTS},
}
GENERATION: Manifest = {"task": "Generation", "model": {"uri": "hf://owner/decoder"}, "dataset": {"sources": TEXTS}}
PREFERENCE: Manifest = {**GENERATION, "method": {"dpo": {}}}


def manifest(spec: Manifest, changes: Changes, name: str = "example") -> Manifest:
    """A FineTuneJob. A key of `changes` is a path in the spec, or in the whole manifest if it begins with a dot."""
    job = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": copy.deepcopy(spec)}
    for path, value in changes.items():
        *parents, key = (path[1:] if path.startswith(".") else f"spec.{path}").split(".")
        place: Any = job
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is LEFT_OUT:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(value)
    return job


@dataclass(frozen=True)
class Valid:
    name: str
    changes: Changes = field(default_factory=dict)
    spec: Manifest = field(default_factory=lambda: CLASSIFICATION)

    @property
    def manifest(self) -> Manifest:
        return manifest(self.spec, self.changes)


@dataclass(frozen=True)
class Invalid(Valid):
    field: str = ""
    words: str = ""
    """Part of the API server's message, and of ours where `our_words` does not say otherwise."""
    our_words: str = ""
    servers_field: str = ""
    """Where the API server points, if not there: it knows no field of a rule that cannot be evaluated."""
    cluster_only: bool = False


def sources(**keys: Any) -> list[Manifest]:
    return [{**TEXTS[0], **keys}]


LABEL_RULE = {"name": "up", "label": "positive", "keywords": ["rises"]}

EVERYTHING: Changes = {
    "model": {"uri": "hf://owner/encoder", "revision": "refs/pr/1", "secretRef": {"name": "hub.token"},
              "trustRemoteCode": True, "allowPickle": True,
              "adapter": {"uri": "s3://bucket/adapters/1", "secretRef": {"name": "s3"}}},
    "dataset": {
        "sources": [
            {"uri": "s3://bucket/train.csv", "format": "LabelledText",
             "columns": {"text": "headline", "label": "mood"}, "secretRef": {"name": "s3"}},
            {"uri": "configmap://rows/train.jsonl"},
        ],
        "validation": {"fraction": 0.1}, "test": {"sources": [{"uri": "https://host/test.parquet?version=2"}]},
        "labels": ["negative", "neutral", "positive"], "maxRejected": 0.01,
        "review": {"suspectWeight": 0.2, "maxRows": 200, "decisions": [{"uri": "s3://bucket/reviewed.jsonl", "secretRef": {"name": "s3"}}]},
        "duplicates": {"action": "Drop", "similarity": 0.8},
        "labelling": {"aliases": {"pos": "positive", "-1": "negative"}, "minimumRows": 50, "conflicts": "Majority", "rules": [
            {"name": "profit-warning", "label": "negative", "keywords": ["profit warning", "C++"]},
            {"name": "going-up", "label": "positive", "pattern": r"(?i)\bup [0-9]+ ?%", "column": "headline"},
            {"name": "stars", "column": "stars", "table": {"1": "negative", "3": "neutral", "5": "positive"}}]},
        "clean": {"repairEncoding": True, "unicode": "NFC", "removeControlCharacters": True, "normalizeWhitespace": True,
                  "dropLines": [r"^(Home|Menu)\b", "©"], "minCharacters": 3, "maxCharacters": 20000, "maxRepetition": 0.2,
                  "languages": ["en", "zh-Hant"]},
        "personalData": {"action": "Pseudonymize", "kinds": ["Email", "Phone", "NationalId", "PersonName"], "countries": ["DE", "US"],
                         "patterns": [{"name": "EMPLOYEE", "pattern": r"\bE-[0-9]{6}\b"}], "keySecretRef": {"name": "pseudonyms"}},
    },
    "method": {"type": "LoRA", "lora": {"variant": "DoRA", "rank": 8, "alpha": 16, "dropout": 0, "targetModules": ["query", "value"],
                                        "quantization": "NF4"},
               "headFirst": {"epochs": 0.5, "learningRate": 0.002}},
    "training": {
        "epochs": 2.5, "learningRate": 0.0002, "batchSize": {"tokens": 4096}, "microBatchTokens": 2048,
        "maxLength": 128, "precision": "bf16", "seed": 7, "schedule": "Linear", "warmupRatio": 0, "weightDecay": 0,
        "maxGradNorm": 1, "checkpointSteps": 10, "evaluationSteps": 20,
        "earlyStopping": {"patience": 3, "minimumImprovement": 0.005},
        "compile": True,
    },
    "evaluation": {"metrics": ["macroF1", "accuracy", "weightedF1", "loss"],
                   "gate": {"metric": "macroF1", "minimum": 0.8, "minimumGain": 0.1}},
    "resources": {
        "gpus": 16, "gpuMemory": "80Gi", "gpuResource": "nvidia.com/mig-1g.10gb", "nodes": 64, "allowCpuFallback": True,
        "requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"cpu": "2000m", "memory": "8.5Gi", "example.com/nic": "1"},
        "prepare": {"requests": {"memory": "1e9"}, "limits": {"memory": "1Gi", "ephemeral-storage": "0"}},
    },
    "scheduling": {
        "queueName": "team-a", "workloadPriorityClassName": "urgent", "priorityClassName": "high", "nodeSelector": {"example.com/pool": "gpu", "spot": ""},
        "tolerations": [{"operator": "Exists"}, {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoExecute",
                                                 "tolerationSeconds": 60}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}],
                     "matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]}]},
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "preference": {"matchExpressions": [{"key": "ssd", "operator": "Exists"}]}}],
            },
            "podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname", "namespaces": ["data"],
                 "labelSelector": {"matchLabels": {"app": "cache"},
                                   "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}}]},
            "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "podAffinityTerm": {"topologyKey": "zone"}}]},
        },
    },
    "workspace": {"size": "40Gi", "storageClassName": "fast", "accessMode": "ReadWriteMany", "retain": True},
    "output": {"format": "Merged", "uri": "s3://bucket/models/here", "secretRef": {"name": "s3"}},
    "suspend": True,
    "managedBy": "finetune-operator.io/finetune-operator",
    "limits": {"activeDeadlineSeconds": 3600, "retries": 0, "stallSeconds": 60, "ttlSecondsAfterFinished": 0},
}  # fmt: skip

VALID = [
    Valid("smallest classification"),
    Valid("smallest generation", spec=GENERATION),
    Valid("everything", EVERYTHING),
    Valid("longest name", {".metadata.name": "a" * 50}),
    *(
        Valid(f"model {uri}", {"model.uri": uri})
        for uri in (
            "hf://gpt2",
            "s3://bucket/modèles/1",
            "gs://bucket/a/b",
            "az://container/a",
            "https://host/m/",
            "hf://owner/\U00018cd6",
            "pvc://c/m",
        )
    ),
    Valid("dots that lead nowhere", {"model.uri": "pvc://claim/..a/b../.hidden"}),
    Valid("at sign in a path", {"model.uri": "https://host/a@b"}),
    Valid("Head", {"method.type": "Head", "output.format": "Merged"}),
    Valid("Full", {"method.type": "Full"}),
    Valid("adapter to go on from", {"model.adapter": {"uri": "pvc://claim/adapters/1"}, "method.lora.rank": 8}),
    Valid("early stopping", {"training.earlyStopping": {"patience": 1000}}),
    Valid("last layers", {"method": {"type": "Full", "trainable": {"lastLayers": 2}}}),
    Valid("last layers of a generator", {"method": {"type": "Full", "trainable": {"lastLayers": 1024}}}, GENERATION),
    Valid("head first", {"method": {"type": "Full", "headFirst": {"epochs": 2}}}),
    Valid("head first, then the last layers", {"method": {
        "type": "Full", "trainable": {"lastLayers": 1}, "headFirst": {"steps": 9}}, "training.maxSteps": 10}),
    Valid("head first in steps of a run in epochs", {"method.headFirst": {"steps": 900}}),
    Valid("head first in epochs of a run in steps", {"method.headFirst": {"epochs": 3}, "training.maxSteps": 10}),
    *(Valid(f"{kind} from preferences", {"method.type": kind}, PREFERENCE) for kind in ("LoRA", "Full")),
    Valid("preferences", {"method.dpo.beta": 0.01, "dataset.sources": sources(format="Preference", columns={
        "prompt": "question", "chosen": "better", "rejected": "worse"}), "evaluation": {
        "metrics": ["rewardAccuracy", "rewardMargin", "loss"], "gate": {"metric": "rewardAccuracy", "minimum": 0.6}}}, PREFERENCE),
    *(Valid(f"{variant} in NF4", {"method.lora": {"variant": variant, "quantization": "NF4"}, "resources.gpus": 1})
      for variant in ("LoRA", "RsLoRA", "DoRA")),
    *(Valid(variant, {"method.lora.variant": variant}) for variant in ("LoRA", "RsLoRA", "DoRA")),
    Valid("every format of generation", {"dataset.sources": [
        {**TEXTS[0], "format": f} for f in ("Messages", "ShareGPT", "PromptCompletion", "Alpaca", "QuestionContextAnswer", "Text")]}, GENERATION),
    Valid("columns of tools and of questions", {"dataset.sources": [
        {**TEXTS[0], "columns": {"messages": "talk", "tools": "functions", "system": "role"}},
        {**TEXTS[0], "columns": {"question": "q", "context": "passage", "answer": "a"}}]}, GENERATION),
    Valid("gate of generation", {"evaluation": {"metrics": ["perplexity", "loss"],
                                                "gate": {"metric": "perplexity", "maximum": 20.5}}}, GENERATION),
    Valid("gate on a metric that is not listed", {"evaluation": {
        "metrics": ["accuracy"], "gate": {"metric": "weightedF1", "minimumGain": 0}}}),
    Valid("as much labelling as there may be", {"dataset.labels": [f"{i:0128}" for i in range(512)], "dataset.labelling": {
        "aliases": {f"alias {i}": f"{i:0128}" for i in range(512)},
        "rules": [{"name": f"table-{n}", "table": {f"value {i}": f"{i:0128}" for i in range(256)}} for n in range(32)]}}),
    Valid("review", {"dataset.review": {}}),
    Valid("review that leaves suspicious rows out of the loss", {"dataset.labels": ["keeps", "drops"], "dataset.review": {"suspectWeight": 0}}),
    Valid("labelling without a closed set", {"dataset.labelling": {"aliases": {"pos": "positive"}, "conflicts": "Drop", "rules": [LABEL_RULE]}}),
    Valid("as many labels as there may be", {"dataset.labels": [f"{i:0128}" for i in range(512)]}),
    Valid("as many sources as there may be", {"dataset.sources": [
        {"uri": "s3://bucket/" + "x" * 1000} for _ in range(32)]}),
    Valid("exactly a tenth to train on", {"dataset.validation.fraction": 0.1, "dataset.test.fraction": 0.8}),
    Valid("whole numbers for decimals", {"training": {"epochs": 3, "learningRate": 1, "weightDecay": 1}}),
    Valid("longest names", {"output": {"uri": f"pvc://{'a' * 253}/b", "secretRef": {"name": "b" * 253}}}),
    Valid("limits of other resources", {"resources.limits": {"example.com/nic": "2", "hugepages-2Mi": "1Gi", "cpu": "0.5"}}),
    Valid("numbers for quantities", {"workspace.size": 1073741824, "resources.requests": {"cpu": 4}}),
    Valid("NF4 on as many GPUs as it takes", {"method": {"lora": {"quantization": "NF4"}}, "resources": {"gpuMemory": "24Gi"}}),
    Valid("as many GPUs as it takes", {"resources": {"gpuMemory": "24Gi"}}),
    Valid("request at its limit", {"resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "1024Mi"}}}),
    Valid("several GPUs", {"resources.gpus": 8}),
    Valid("several nodes on a volume for many", {"resources": {"gpus": 8, "nodes": 2}, "workspace.accessMode": "ReadWriteMany"}),
    Valid("several nodes on an existing claim", {"resources.nodes": 64, "workspace.claimName": "team"}),
    Valid("existing claim", {"workspace": {"claimName": "data", "retain": True}}),
    Valid("empty blocks", {block: {} for block in ("method", "training", "evaluation", "resources", "scheduling",
                                                  "workspace", "output", "limits")}),
    Valid("nulls", {"method": None, "scheduling": None, "training": {"epochs": None, "seed": None},
                    "resources.requests": {"cpu": None}}),
]  # fmt: skip
