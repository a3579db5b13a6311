"""FineTuneJobs by example: what is accepted, what is refused and with which words, what may change after creation.

One table for two judges: `finetune run` (tests/unit/api) and a real API server (tests/cluster/test_validation.py).
"""

import copy
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Update:
    """A job of `spec` with the changes `before`, then `after` instead; refused at `field` unless that is empty."""

    name: str
    before: Changes
    after: Changes
    field: str = ""


def _bound(path: str, value: Any, words: str, our_words: str = "", *, place: str = "", **others: Any) -> Invalid:
    """`value` at `path` is refused; `place` is where the error points if that is within the value."""
    shown = str(value)[:24]
    return Invalid(
        f"{path}={shown}", {**others, path: value}, field=f"spec.{path}{place}", words=words, our_words=our_words
    )


def _range(path: str, low: Any, low_words: str, high: Any, high_words: str) -> list[Invalid]:
    return [_bound(path, low, low_words), _bound(path, high, high_words)]


def _choice(path: str, value: Any, place: str = "") -> Invalid:
    return _bound(path, value, "Unsupported value", "input should be '", place=place)


def _pattern(path: str, value: Any, place: str = "") -> Invalid:
    return _bound(path, value, "should match '", "should match pattern '", place=place)


def _quantity(path: str, value: Any, words: str = "should match '") -> Invalid:
    return _bound(path, value, words, "expected a Kubernetes quantity such as 500m or 16Gi")


def _name(path: str, value: Any, place: str = "") -> Invalid:
    return _bound(path, value, "should match '", "expected a name of a-z, 0-9, '-' and '.'", place=place)


def _too_long(path: str, length: int, value: Any = None, place: str = "", **others: Any) -> Invalid:
    words = f"may not be more than {length} bytes"
    text = "x" * (length + 1)
    return _bound(path, value or text, words, f"should have at most {length} characters", place=place, **others)


def _too_many(
    path: str, most: int, one: Any, place: str = "", within: Callable[[Any], Any] = lambda value: value
) -> Invalid:
    """`one` stands once too often in the list at `path`, or in the list that `within` wraps and `place` finds."""
    return _bound(
        path,
        within([one] * (most + 1)),
        f"must have at most {most} items",
        f"should have at most {most} items",
        place=place,
    )


def _too_many_keys(path: str, most: int, value: Any) -> Invalid:
    keys = {f"name-{i}": value for i in range(most + 1)}
    return _bound(path, keys, f"must have at most {most} items", f"should have at most {most} items")


def _needs(path: str, field: str, value: Any) -> Invalid:
    return Invalid(
        f"{field} is required", {path: value}, field=f"spec.{field}", words="Required value", our_words="is required"
    )


def _source(**keys: Any) -> list[Manifest]:
    return [{**TEXTS[0], **keys}]


def _uri(uri: str, words: str) -> Invalid:
    return Invalid(
        f"source {uri}", {"dataset.sources": [{"uri": uri}]}, field="spec.dataset.sources[0].uri", words=words
    )


_TERM = "scheduling.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "scheduling.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution"
_RATHER_NEAR = "scheduling.affinity.podAffinity.preferredDuringSchedulingIgnoredDuringExecution"
_NEAR = "scheduling.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution"

_RULE = {"name": "up", "label": "positive", "keywords": ["rises"]}

BOUNDS = [
    _choice("task", "Translation"),
    _too_long("model.uri", 1024, "hf://owner/" + "x" * 1024),
    _pattern("model.revision", "main branch"),
    _too_long("model.revision", 128),
    _name("model.secretRef.name", "My_Secret"),
    _too_long("model.secretRef.name", 253),
    _too_long("model.adapter.uri", 1024, "hf://owner/" + "x" * 1024),
    _bound("model.trustRemoteCode", "true", "must be of type boolean", "should be a valid boolean"),
    _bound("dataset.sources", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("dataset.sources", 32, TEXTS[0]),
    _choice("dataset.sources", _source(format="CSV"), "[0].format"),
    *(_too_long("dataset.sources", 128, _source(columns={column: "x" * 129}), f"[0].columns.{column}")
      for column in ("text", "label", "prompt", "completion", "messages", "tools", "instruction", "input", "output", "question", "context", "answer",
                     "chosen", "rejected")),
    _bound("dataset.sources", _source(columns={"label": ""}), "at least 1 chars long", "at least 1 character",
           place="[0].columns.label"),
    _bound("dataset.validation.sources", [], "should have at least 1 items", "should have at least 1 item"),
    *_range("dataset.validation.fraction", 0, "greater than 0", 1, "less than 1"),
    *_range("dataset.test.fraction", 0, "greater than 0", 1, "less than 1"),
    _bound("dataset.labels", ["one"], "should have at least 2 items"),
    _too_many("dataset.labels", 512, "x"),
    _too_long("dataset.labels", 128, ["a", "x" * 129], "[1]"),
    _bound("dataset.labels", ["a", ""], "at least 1 chars long", "at least 1 character", place="[1]"),
    _bound("dataset.labels", [0, 1], "must be of type string", "should be a valid string", place="[0]"),
    *_range("dataset.review.suspectWeight", -0.1, "greater than or equal to 0", 1.1, "less than or equal to 1"),
    *_range("dataset.review.maxRows", 0, "greater than or equal to 1", 100_001, "less than or equal to"),
    _bound("dataset.review.decisions", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("dataset.review.decisions", 8, TEXTS[0]),
    _too_long("dataset.review.decisions", 1024, [{"uri": "hf://datasets/" + "x" * 1024}], "[0].uri"),
    _needs("dataset.review.decisions", "dataset.review.decisions[0].uri", [{}]),
    _choice("dataset.duplicates.action", "Merge"),
    *_range("dataset.duplicates.similarity", 0.49, "greater than or equal to 0.5", 1, "less than"),
    _too_many_keys("dataset.labelling.aliases", 512, "positive"),
    _too_long("dataset.labelling.aliases", 128, {"pos": "x" * 129}, ".pos"),
    _bound("dataset.labelling.aliases", {"pos": ""}, "at least 1 chars long", "at least 1 character", place=".pos"),
    *_range("dataset.labelling.minimumRows", 0, "greater than or equal to 1", 1_000_001, "less than or equal to"),
    _choice("dataset.labelling.conflicts", "Reject"),
    _bound("dataset.labelling.rules", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("dataset.labelling.rules", 32, _RULE),
    _needs("dataset.labelling.rules", "dataset.labelling.rules[0].name", [{"label": "a", "keywords": ["x"]}]),
    _pattern("dataset.labelling.rules", [_RULE | {"name": "Two words"}], "[0].name"),
    _too_long("dataset.labelling.rules", 63, [_RULE | {"name": "x" * 64}], "[0].name"),
    _too_long("dataset.labelling.rules", 128, [_RULE | {"label": "x" * 129}], "[0].label"),
    _bound("dataset.labelling.rules", [_RULE | {"label": ""}], "at least 1 chars long", "at least 1 character", place="[0].label"),
    _bound("dataset.labelling.rules", [_RULE | {"keywords": []}], "should have at least 1 items", "should have at least 1 item",
           place="[0].keywords"),
    _too_many("dataset.labelling.rules", 128, "x", "[0].keywords", lambda words: [_RULE | {"keywords": words}]),
    _pattern("dataset.labelling.rules", [_RULE | {"keywords": [" "]}], "[0].keywords[0]"),
    _too_long("dataset.labelling.rules", 64, [_RULE | {"keywords": ["x" * 65]}], "[0].keywords[0]"),
    _too_long("dataset.labelling.rules", 256, [{"name": "r", "label": "a", "pattern": "x" * 257}], "[0].pattern"),
    _bound("dataset.labelling.rules", [{"name": "r", "table": {f"v{n}": "a" for n in range(257)}}],
           "must have at most 256 items", "should have at most 256 items", place="[0].table"),
    _too_long("dataset.labelling.rules", 128, [{"name": "r", "table": {"v": "x" * 129}}], "[0].table.v"),
    _too_long("dataset.labelling.rules", 128, [_RULE | {"column": "x" * 129}], "[0].column"),
    _choice("dataset.clean.unicode", "NFD"),
    _bound("dataset.clean.dropLines", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("dataset.clean.dropLines", 64, "x"),
    _bound("dataset.clean.dropLines", [""], "at least 1 chars long", "at least 1 character", place="[0]"),
    _too_long("dataset.clean.dropLines", 256, ["x" * 257], "[0]"),
    *_range("dataset.clean.minCharacters", 0, "greater than or equal to 1", 16777217, "less than or equal to"),
    *_range("dataset.clean.maxCharacters", 0, "greater than or equal to 1", 16777217, "less than or equal to"),
    *_range("dataset.clean.maxRepetition", -0.1, "greater than or equal to 0", 1, "less than 1"),
    _bound("dataset.clean.languages", [], "should have at least 1 items", "should have at least 1 item"),
    _pattern("dataset.clean.languages", ["English"], "[0]"),
    _choice("dataset.personalData.action", "Remove"),
    _bound("dataset.personalData", {"action": "Redact", "kinds": []}, "should have at least 1 items", "should have at least 1 item",
           place=".kinds"),
    _choice("dataset.personalData", {"action": "Redact", "kinds": ["Name"]}, ".kinds[0]"),
    _pattern("dataset.personalData", {"action": "Redact", "countries": ["de"]}, ".countries[0]"),
    _bound("dataset.personalData", {"action": "Redact", "countries": []}, "should have at least 1 items", "should have at least 1 item",
           place=".countries"),
    _too_many("dataset.personalData", 32, "DE", ".countries", lambda some: {"action": "Redact", "countries": some}),
    _pattern("dataset.personalData", {"action": "Redact", "patterns": [{"name": "a b", "pattern": "x"}]}, ".patterns[0].name"),
    _too_long("dataset.personalData", 32, {"action": "Redact", "patterns": [{"name": "X" * 33, "pattern": "x"}]}, ".patterns[0].name"),
    _too_long("dataset.personalData", 256, {"action": "Redact", "patterns": [{"name": "X", "pattern": "x" * 257}]}, ".patterns[0].pattern"),
    _too_many("dataset.personalData", 16, {"name": "X", "pattern": "x"}, ".patterns", lambda some: {"action": "Redact", "patterns": some}),
    *_range("dataset.maxRejected", -0.1, "greater than or equal to 0", 1, "less than 1"),
    _choice("method.type", "QLoRA"),
    _choice("method.lora.variant", "QLoRA"),
    *_range("method.lora.rank", 0, "greater than or equal to 1", 1025, "less than or equal to 1024"),
    *_range("method.lora.alpha", 0, "greater than or equal to 1", 4097, "less than or equal to 4096"),
    *_range("method.lora.dropout", -0.1, "greater than or equal to 0", 1, "less than 1"),
    _bound("method.lora.targetModules", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("method.lora.targetModules", 64, "x"),
    _bound("method.lora.targetModules", [""], "at least 1 chars long", "at least 1 character", place="[0]"),
    _choice("method.lora.quantization", "nf4"),
    *_range("method.dpo.beta", 0, "greater than 0", 101, "less than or equal to 100"),
    *_range("method.trainable.lastLayers", 0, "greater than or equal to 1", 1025, "less than or equal to 1024"),
    *_range("method.headFirst.epochs", 0, "greater than 0", 1001, "less than or equal to 1000"),
    *_range("method.headFirst.steps", 0, "greater than or equal to 1", 100_000_001, "less than or equal to"),
    *_range("method.headFirst.learningRate", 0, "greater than 0", 10.1, "less than or equal to 10"),
    *_range("training.epochs", 0, "greater than 0", 1001, "less than or equal to 1000"),
    *_range("training.maxSteps", 0, "greater than or equal to 1", 100_000_001, "less than or equal to"),
    _bound("training.maxSteps", 1.5, "must be of type integer", "should be a valid integer"),
    _bound("training.maxSteps", "10", "must be of type integer", "should be a valid integer"),
    *_range("training.learningRate", 0, "greater than 0", 10.1, "less than or equal to 10"),
    *_range("training.batchSize.sequences", 0, "greater than or equal to 1", 65537, "less than or equal to 65536"),
    *_range("training.batchSize.tokens", 0, "greater than or equal to 1", 67108865, "less than or equal to"),
    *_range("training.microBatchTokens", 0, "greater than or equal to 1", 4194305, "less than or equal to"),
    *_range("training.maxLength", 7, "greater than or equal to 8", 1048577, "less than or equal to"),
    _choice("training.precision", "fp16"),
    *_range("training.seed", -1, "greater than or equal to 0", 4294967296, "less than or equal to"),
    _choice("training.schedule", "cosine"),
    *_range("training.warmupRatio", -0.1, "greater than or equal to 0", 1.1, "less than or equal to 1"),
    *_range("training.weightDecay", -0.1, "greater than or equal to 0", 1.1, "less than or equal to 1"),
    *_range("training.maxGradNorm", 0, "greater than 0", 1001, "less than or equal to 1000"),
    *_range("training.checkpointSteps", 0, "greater than or equal to 1", 10_000_001, "less than or equal to"),
    *_range("training.evaluationSteps", 0, "greater than or equal to 1", 10_000_001, "less than or equal to"),
    *_range("training.earlyStopping.patience", 0, "greater than or equal to 1", 1001, "less than or equal to 1000"),
    *(_bound("training.earlyStopping", {"patience": 1, "minimumImprovement": value}, words, place=".minimumImprovement")
      for value, words in ((-0.1, "greater than or equal to 0"), (2e9, "less than or equal to"))),
    _choice("evaluation.metrics", ["f1"], "[0]"),
    _bound("evaluation.metrics", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("evaluation.metrics", 8, "loss"),
    _choice("evaluation.gate.metric", "f1"),
    *_range("evaluation.gate.minimum", -0.1, "greater than or equal to 0", 1.1, "less than or equal to 1"),
    *_range("evaluation.gate.maximum", -0.1, "greater than or equal to 0", 2e9, "less than or equal to"),
    *_range("evaluation.gate.minimumGain", -0.1, "greater than or equal to 0", 2e9, "less than or equal to"),
    *_range("resources.gpus", -1, "greater than or equal to 0", 17, "less than or equal to 16"),
    _pattern("resources.gpuResource", "nvidia.com/"),
    _too_long("resources.gpuResource", 317),
    *_range("resources.nodes", 0, "greater than or equal to 1", 65, "less than or equal to 64"),
    _too_many_keys("resources.requests", 16, 1),
    _too_many_keys("resources.limits", 16, 1),
    _quantity("resources.gpuMemory", "80GB"),
    _quantity("resources.requests.memory", "8GB"),
    _quantity("resources.limits.memory", "8 Gi"),
    _quantity("resources.limits.cpu", "-1"),
    _quantity("resources.limits.cpu", -1, "greater than or equal to 0"),
    _quantity("resources.limits.cpu", 1.5, "must be of type integer,string"),
    _quantity("resources.prepare.requests.memory", "1.2.3"),
    _too_many_keys("resources.prepare.limits", 16, 1),
    _quantity("resources.prepare.limits.memory", "8K"),
    _name("scheduling.queueName", "team/a"),
    _too_long("scheduling.queueName", 63),
    _name("scheduling.priorityClassName", "High"),
    _pattern("scheduling.nodeSelector.pool", "a b"),
    _too_long("scheduling.nodeSelector.pool", 63),
    _too_many_keys("scheduling.nodeSelector", 32, "y"),
    _too_many("scheduling.tolerations", 16, {"key": "x"}),
    _pattern("scheduling.tolerations", [{"key": "a b"}], "[0].key"),
    _choice("scheduling.tolerations", [{"operator": "Like"}], "[0].operator"),
    _choice("scheduling.tolerations", [{"effect": "Evict"}], "[0].effect"),
    _pattern("scheduling.tolerations", [{"value": "a b"}], "[0].value"),
    _bound("scheduling.tolerations", [{"tolerationSeconds": -1}], "greater than or equal to 0",
           place="[0].tolerationSeconds"),
    _needs(_TERM, f"{_TERM}.nodeSelectorTerms", {}),
    _choice(_TERM, {"nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "is"}]}]},
            ".nodeSelectorTerms[0].matchExpressions[0].operator"),
    _bound(_PREFERRED, [{"weight": 101, "preference": {}}], "less than or equal to 100", place="[0].weight"),
    _too_many(_TERM, 8, {}, ".nodeSelectorTerms", lambda terms: {"nodeSelectorTerms": terms}),
    _too_many(_TERM, 8, {"key": "a", "operator": "Exists"}, ".nodeSelectorTerms[0].matchExpressions",
              lambda some: {"nodeSelectorTerms": [{"matchExpressions": some}]}),
    _too_many(_TERM, 8, {"key": "a", "operator": "Exists"}, ".nodeSelectorTerms[0].matchFields",
              lambda some: {"nodeSelectorTerms": [{"matchFields": some}]}),
    _too_many(_TERM, 32, "a", ".nodeSelectorTerms[0].matchFields[0].values", lambda values: {
        "nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": values}]}]}),
    _too_many(_PREFERRED, 8, {"weight": 1, "preference": {}}),
    _pattern(_NEAR, [{"topologyKey": "a b"}], "[0].topologyKey"),
    _too_many(_NEAR, 4, {"topologyKey": "a"}),
    _too_many(_NEAR, 8, "a", "[0].namespaces", lambda names: [{"topologyKey": "a", "namespaces": names}]),
    _pattern(_NEAR, [{"topologyKey": "a", "labelSelector": {"matchLabels": {"app": "a b"}}}],
             "[0].labelSelector.matchLabels.app"),
    _bound(_NEAR, [{"topologyKey": "a", "labelSelector": {"matchLabels": {f"k{i}": "" for i in range(33)}}}],
           "must have at most 32 items", "should have at most 32 items", place="[0].labelSelector.matchLabels"),
    _pattern(_NEAR, [{"topologyKey": "a", "labelSelector": {"matchExpressions": [{"key": "a b", "operator": "Exists"}]}}],
             "[0].labelSelector.matchExpressions[0].key"),
    _pattern(_NEAR, [{"topologyKey": "a", "labelSelector": {
        "matchExpressions": [{"key": "a", "operator": "In", "values": ["b c"]}]}}],
             "[0].labelSelector.matchExpressions[0].values[0]"),
    _too_many(_NEAR, 8, {"key": "a", "operator": "Exists"}, "[0].labelSelector.matchExpressions",
              lambda some: [{"topologyKey": "a", "labelSelector": {"matchExpressions": some}}]),
    _name(_NEAR, [{"topologyKey": "a", "namespaces": ["Team"]}], "[0].namespaces[0]"),
    _too_many(_RATHER_NEAR, 4, {"weight": 1, "podAffinityTerm": {"topologyKey": "a"}}),
    _bound(_RATHER_NEAR, [{"weight": 0, "podAffinityTerm": {"topologyKey": "a"}}], "greater than or equal to 1",
           place="[0].weight"),
    _name("workspace.claimName", "My_Claim"),
    _quantity("workspace.size", "20 GB"),
    _quantity("workspace.size", True, "must be of type integer,string"),
    _too_long("workspace.size", 32, "1" * 33),
    _name("workspace.storageClassName", "Fast!"),
    _choice("workspace.accessMode", "ReadOnlyMany"),
    _choice("output.format", "GGUF"),
    _too_long("output.uri", 1024, "s3://bucket/" + "x" * 1024),
    _name("output.secretRef.name", "My_Secret"),
    _bound("suspend", "yes", "must be of type boolean", "should be a valid boolean"),
    *_range("limits.activeDeadlineSeconds", 0, "greater than or equal to 1", 31536001, "less than or equal to"),
    *_range("limits.retries", -1, "greater than or equal to 0", 101, "less than or equal to 100"),
    *_range("limits.stallSeconds", 59, "greater than or equal to 60", 86401, "less than or equal to 86400"),
    *_range("limits.ttlSecondsAfterFinished", -1, "greater than or equal to 0", 31536001, "less than or equal to"),
    _needs("task", "task", LEFT_OUT),
    _needs("model", "model", LEFT_OUT),
    _needs("dataset", "dataset", LEFT_OUT),
    _needs("model", "model.uri", {}),
    _needs("model.adapter", "model.adapter.uri", {}),
    _needs("training.earlyStopping", "training.earlyStopping.patience", {"minimumImprovement": 0.1}),
    _needs("method.trainable", "method.trainable.lastLayers", {}),
    _needs("dataset.personalData", "dataset.personalData.action", {"kinds": ["Email"]}),
    _needs("model.secretRef", "model.secretRef.name", {}),
    _needs("dataset", "dataset.sources", {}),
    _needs("dataset.sources", "dataset.sources[0].uri", [{}]),
    _needs("evaluation.gate", "evaluation.gate.metric", {"minimum": 0.5}),
]  # fmt: skip

RULES = [
    *(
        _uri(uri, "expected one of hf://owner/name")
        for uri in (
            "gpt2",
            "http://host/file",
            "s3://",
            "s3:///path",
            "hf://owner/a name",
            "https://host/\x1b[31m",
            "pvc://claim",
            "pvc://claim/",
            "pvc://claim//etc/passwd",
            "pvc://My_Claim/file",
            "configmap://name/a/b",
            "file://",
        )
    ),
    *(
        _uri(uri, "a path may not contain '..'")
        for uri in ("pvc://claim/../other", "s3://bucket/a/..", "configmap://name/..")
    ),
    _uri("https://me:secret@host/file", "a URI may not contain a password"),
    *(
        Invalid(f"model {uri}", {"model.uri": uri}, field="spec.model.uri", words=words)
        for uri, words in (
            ("owner/name", "expected one of hf://owner/name"),
            ("pvc://claim/..", "a path may not contain '..'"),
            ("https://me:secret@host/model", "a URI may not contain a password"),
        )
    ),
    *(
        Invalid(f"adapter {uri}", {"model.adapter.uri": uri}, field="spec.model.adapter.uri", words=words)
        for uri, words in (
            ("owner/name", "expected one of hf://owner/name"),
            ("pvc://claim/..", "a path may not contain '..'"),
            ("https://me:secret@host/adapter", "a URI may not contain a password"),
            ("configmap://adapter/weights", "an adapter is a folder and does not fit a ConfigMap"),
        )
    ),
    *(
        Invalid(f"decisions {uri}", {"dataset.review.decisions": [{"uri": uri}]}, field="spec.dataset.review.decisions[0].uri", words=words)
        for uri, words in (
            ("reviewed.jsonl", "expected one of hf://owner/name"),
            ("pvc://claim/..", "a path may not contain '..'"),
            ("https://me:secret@host/reviewed.jsonl", "a URI may not contain a password"),
        )
    ),
    Invalid("local decisions", {"dataset.review.decisions": [{"uri": "file://reviewed.jsonl"}]}, field="spec.dataset.review.decisions[0].uri",
            words="file:// works only with `finetune run`", cluster_only=True),
    Invalid("local adapter", {"model.adapter.uri": "file://adapter"}, field="spec.model.adapter.uri",
            words="file:// works only with `finetune run`", cluster_only=True),
    *(
        Invalid(f"adapter for {kind}", {"model.adapter.uri": "s3://bucket/adapter", "method.type": kind},
                field="spec.model.adapter", words="an adapter can be gone on from with method LoRA only")
        for kind in ("Full", "Head")
    ),
    Invalid("local model", {"model.uri": "file://model"}, field="spec.model.uri",
            words="file:// works only with `finetune run`", cluster_only=True),
    Invalid("local source", {"dataset.sources": [{"uri": "file://a.csv"}]}, field="spec.dataset.sources[0].uri",
            words="file:// works only with `finetune run`", cluster_only=True),
    Invalid("local output", {"output.uri": "file://out"}, field="spec.output.uri",
            words="file:// works only with `finetune run`", cluster_only=True),
    Invalid("model in a ConfigMap", {"model.uri": "configmap://model/weights"}, field="spec.model.uri",
            words="a model is a folder and does not fit a ConfigMap"),
    Invalid("revision of a bucket", {"model.uri": "s3://bucket/model", "model.revision": "main"},
            field="spec.model.revision", words="revision is for hf:// only"),
    Invalid("output without a scheme", {"output.uri": "bucket/path"}, field="spec.output.uri",
            words="expected one of hf://owner/name"),
    Invalid("output beside its folder", {"output.uri": "pvc://claim/a/../.."}, field="spec.output.uri",
            words="a path may not contain '..'"),
    Invalid("output with a password", {"output.uri": "https://me:secret@host/file"}, field="spec.output.uri",
            words="a URI may not contain a password"),
    Invalid("output to a web page", {"output.uri": "https://host/path"}, field="spec.output.uri",
            words="an output cannot be written to https:// or configmap://"),
    Invalid("output to a ConfigMap", {"output.uri": "configmap://name/key"}, field="spec.output.uri",
            words="an output cannot be written to https:// or configmap://"),
    Invalid("validation twice", {"dataset.validation": {"sources": TEXTS, "fraction": 0.1}},
            field="spec.dataset.validation", words="give either sources or fraction"),
    Invalid("empty validation", {"dataset.validation": {}}, field="spec.dataset.validation",
            words="give either sources or fraction"),
    Invalid("empty test", {"dataset.test": {}}, field="spec.dataset.test", words="give either sources or fraction"),
    Invalid("same label twice", {"dataset.labels": ["a", "b", "a"]}, field="spec.dataset.labels[2]",
            words="Duplicate value", our_words="'a' may be given only once"),
    Invalid("review of a generator", {"dataset.review": {}}, GENERATION, field="spec.dataset.review", words="review is for task Classification"),
    *(
        Invalid(f"label {label} in a review", {"dataset.labels": ["good", label], "dataset.review": {}},
                field="spec.dataset.labels", words="'keep' and 'drop' are decisions and cannot be labels")
        for label in ("keep", "drop")
    ),
    Invalid("labelling of a generator", {"dataset.labelling": {"minimumRows": 2}}, GENERATION, field="spec.dataset.labelling",
            words="labelling is for task Classification"),
    Invalid("alias of an alias", {"dataset.labelling.aliases": {"pos": "good", "good": "positive"}},
            field="spec.dataset.labelling.aliases", words="an alias may not lead to another alias"),
    *(
        Invalid(f"alias {name}", {"dataset.labels": ["positive", "negative"], "dataset.labelling.aliases": aliases},
                field="spec.dataset.labelling.aliases", words="from a name that dataset.labels does not list to one that it lists")
        for name, aliases in {"to nowhere": {"pos": "good"}, "of a label": {"negative": "positive"}}.items()
    ),
    *(
        Invalid(f"rule for an unknown label: {name}", {"dataset.labels": ["positive", "negative"], "dataset.labelling.rules": [_RULE, rule]},
                field="spec.dataset.labelling.rules", words="a rule must vote for a label that dataset.labels lists")
        for name, rule in {"keywords": {**_RULE, "name": "other", "label": "good"}}.items()
    ),
    Invalid("same rule twice", {"dataset.labelling.rules": [_RULE, _RULE]}, field="spec.dataset.labelling.rules",
            words="every rule needs a name of its own"),
    *(
        Invalid(f"rule with {name}", {"dataset.labelling.rules": [rule]}, field="spec.dataset.labelling.rules[0]",
                words="give exactly one of keywords, pattern and table")
        for name, rule in {"nothing to look for": {"name": "r", "label": "a"},
                           "keywords and a pattern": {**_RULE, "pattern": "x"}}.items()
    ),
    *(
        Invalid(f"rule {name}", {"dataset.labelling.rules": [rule]}, field="spec.dataset.labelling.rules[0].label",
                words="keywords and pattern need a label; a table has labels of its own")
        for name, rule in {"without a label": {"name": "r", "pattern": "x"},
                           "with a table and a label": {"name": "r", "label": "a", "table": {"x": "a"}}}.items()
    ),
    Invalid("no pattern of a rule", {"dataset.labelling.rules": [{"name": "r", "label": "a", "pattern": "("}]},
            field="spec.dataset.labelling.rules[0].pattern", words="xpression in RE2 syntax",
            servers_field="spec.dataset.labelling.rules[0]"),
    Invalid("same language twice", {"dataset.clean.languages": ["en", "en"]}, field="spec.dataset.clean.languages[1]",
            words="Duplicate value", our_words="'en' may be given only once"),
    Invalid("same kind twice", {"dataset.personalData": {"action": "Redact", "kinds": ["Email", "Email"]}},
            field="spec.dataset.personalData.kinds[1]", words="Duplicate value", our_words="'Email' may be given only once"),
    Invalid("same country twice", {"dataset.personalData": {"action": "Redact", "countries": ["DE", "DE"]}},
            field="spec.dataset.personalData.countries[1]", words="Duplicate value", our_words="'DE' may be given only once"),
    Invalid("pseudonyms without a key", {"dataset.personalData": {"action": "Pseudonymize"}},
            field="spec.dataset.personalData.keySecretRef", words="keySecretRef is needed by action Pseudonymize"),
    Invalid("a key for nothing", {"dataset.personalData": {"action": "Redact", "keySecretRef": {"name": "key"}}},
            field="spec.dataset.personalData.keySecretRef", words="keySecretRef is needed by action Pseudonymize"),
    Invalid("same pattern twice", {"dataset.personalData": {"action": "Keep", "patterns": [{"name": "A", "pattern": "x"}] * 2}},
            field="spec.dataset.personalData.patterns", words="every pattern needs a name of its own"),
    Invalid("no pattern", {"dataset.personalData": {"action": "Keep", "patterns": [{"name": "A", "pattern": "("}]}},
            field="spec.dataset.personalData.patterns[0].pattern", words="xpression in RE2 syntax",
            servers_field="spec.dataset.personalData.patterns[0]"),
    Invalid("no length fits", {"dataset.clean": {"minCharacters": 3, "maxCharacters": 2}},
            field="spec.dataset.clean.minCharacters", words="minCharacters is above maxCharacters"),
    *(
        Invalid(f"pattern {pattern}", {"dataset.clean.dropLines": ["^Menu", pattern]},
                field="spec.dataset.clean.dropLines", words="xpression in RE2 syntax", servers_field="spec.dataset.clean")
        for pattern in ("(", "(?=x)", r"(a)\1", "x{1001}")
    ),
    Invalid("nothing left to train on", {"dataset.validation.fraction": 0.5, "dataset.test.fraction": 0.45},
            field="spec.dataset", words="leave less than a tenth of the rows for training"),
    Invalid("nothing left beside the usual validation", {"dataset.test.fraction": 0.85}, field="spec.dataset",
            words="leave less than a tenth of the rows for training"),
    Invalid("LoRA settings for Full", {"method": {"type": "Full", "lora": {}}}, field="spec.method.lora",
            words="lora is for type LoRA only"),
    Invalid("LoRA settings for Head", {"method": {"type": "Head", "lora": {"rank": 8}}}, field="spec.method.lora",
            words="lora is for type LoRA only"),
    *(
        Invalid(f"last layers of {kind}", {"method": {"type": kind, "trainable": {"lastLayers": 2}}},
                field="spec.method.trainable", words="trainable is for type Full only")
        for kind in ("LoRA", "Head")
    ),
    Invalid("head before the head", {"method": {"type": "Head", "headFirst": {"epochs": 1}}},
            field="spec.method.headFirst", words="headFirst is for types LoRA and Full"),
    Invalid("head of a generator first", {"method": {"type": "Full", "headFirst": {"epochs": 1}}}, GENERATION,
            field="spec.method.headFirst", words="headFirst is for task Classification"),
    Invalid("head first without a length", {"method.headFirst": {"learningRate": 0.01}}, field="spec.method.headFirst",
            words="give either epochs or steps"),
    Invalid("head first in epochs and steps", {"method.headFirst": {"epochs": 1, "steps": 1}},
            field="spec.method.headFirst", words="give either epochs or steps"),
    Invalid("head for all of the usual epochs", {"method.headFirst": {"epochs": 3}},
            field="spec.method.headFirst.epochs", words="headFirst must leave some of training.epochs"),
    Invalid("head for more than all epochs", {"method.headFirst": {"epochs": 2}, "training.epochs": 1.5},
            field="spec.method.headFirst.epochs", words="headFirst must leave some of training.epochs"),
    Invalid("head for all steps", {"method.headFirst": {"steps": 10}, "training.maxSteps": 10},
            field="spec.method.headFirst.steps", words="headFirst must leave some of training.maxSteps"),
    Invalid("batch size twice", {"training.batchSize": {"sequences": 8, "tokens": 8}}, field="spec.training.batchSize",
            words="give either sequences or tokens"),
    Invalid("empty batch size", {"training.batchSize": {}}, field="spec.training.batchSize",
            words="give either sequences or tokens"),
    Invalid("epochs and steps", {"training": {"epochs": 1, "maxSteps": 1}}, field="spec.training.maxSteps",
            words="give either epochs or maxSteps, not both"),
    Invalid("gate without a threshold", {"evaluation.gate": {"metric": "accuracy"}}, field="spec.evaluation.gate",
            words="give minimum, maximum or minimumGain"),
    Invalid("highest accuracy", {"evaluation.gate": {"metric": "accuracy", "maximum": 1}},
            field="spec.evaluation.gate.maximum", words="maximum is for loss and perplexity; use minimum"),
    Invalid("lowest loss", {"evaluation.gate": {"metric": "loss", "minimum": 1}},
            field="spec.evaluation.gate.minimum", words="minimum is not for loss and perplexity; use maximum"),
    Invalid("same metric twice", {"evaluation.metrics": ["loss", "accuracy", "loss"]}, field="spec.evaluation.metrics",
            words="every metric may be given only once"),
    Invalid("perplexity of a classifier", {"evaluation.metrics": ["loss", "perplexity"]},
            field="spec.evaluation.metrics", words="task Classification has the metrics accuracy, macroF1"),
    Invalid("accuracy of a generator", {"evaluation.metrics": ["accuracy"]}, GENERATION,
            field="spec.evaluation.metrics", words="task Generation has loss and perplexity"),
    Invalid("gate on the perplexity of a classifier", {"evaluation.gate": {"metric": "perplexity", "maximum": 9}},
            field="spec.evaluation.gate.metric", words="task Classification has the metrics accuracy, macroF1"),
    Invalid("gate on the accuracy of a generator", {"evaluation.gate": {"metric": "accuracy", "minimum": 0.5}},
            GENERATION, field="spec.evaluation.gate.metric", words="task Generation has loss and perplexity"),
    Invalid("memory of no GPU", {"resources": {"gpus": 0, "gpuMemory": "80Gi"}}, field="spec.resources.gpuMemory",
            words="gpuMemory is for training on GPUs; leave it out with gpus: 0"),
    Invalid("request above the limit", {"resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "8G"}}},
            field="spec.resources.requests", words="a request may not be greater than the limit"),
    Invalid("request of prepare above the limit",
            {"resources.prepare": {"requests": {"cpu": 2}, "limits": {"cpu": "1900m"}}},
            field="spec.resources.prepare.requests", words="a request may not be greater than the limit"),
    Invalid("GPUs as requests", {"resources.requests": {"nvidia.com/gpu": 1}}, field="spec.resources.requests",
            words="GPUs are asked for with resources.gpus"),
    Invalid("GPUs as limits", {"resources": {"gpuResource": "amd.com/gpu", "limits": {"amd.com/gpu": 1}}},
            field="spec.resources.limits", words="GPUs are asked for with resources.gpus"),
    Invalid("claim and size", {"workspace": {"claimName": "data", "size": "1Gi"}}, field="spec.workspace.claimName",
            words="leave them out with claimName"),
    Invalid("claim and class", {"workspace": {"claimName": "data", "storageClassName": "fast"}},
            field="spec.workspace.claimName", words="leave them out with claimName"),
    Invalid("claim and access mode", {"workspace": {"claimName": "data", "accessMode": "ReadWriteMany"}},
            field="spec.workspace.claimName", words="leave them out with claimName"),
    *(
        Invalid(f"several nodes on a volume of {name}", {"resources.nodes": 2, "workspace": volume},
                field="spec.workspace.accessMode", words="the pods of several nodes share the workspace; use accessMode ReadWriteMany")
        for name, volume in {"the usual kind": {}, "one node": {"accessMode": "ReadWriteOnce"},
                             "one pod": {"accessMode": "ReadWriteOncePod"}}.items()
    ),
    Invalid("Head of a generator", {"method.type": "Head"}, GENERATION, field="spec.method.type",
            words="Head is for task Classification; use LoRA or Full"),
    Invalid("labels of a generator", {"dataset.labels": ["a", "b"]}, GENERATION, field="spec.dataset.labels",
            words="labels are for task Classification"),
    Invalid("classifier of conversations", {"dataset.sources": _source(format="Messages")},
            field="spec.dataset.sources", words="task Classification reads format LabelledText and no other"),
    *(Invalid(f"classifier of {kind}", {"dataset.sources": _source(format=kind)},
              field="spec.dataset.sources", words="task Classification reads format LabelledText and no other")
      for kind in ("ShareGPT", "QuestionContextAnswer")),
    Invalid("generator of labels", {"dataset.sources": _source(format="LabelledText")}, GENERATION,
            field="spec.dataset.sources", words="task Generation reads every format but this"),
    Invalid("validation in another format", {"dataset.validation.sources": _source(format="Text")},
            field="spec.dataset.validation.sources", words="task Classification reads format LabelledText"),
    Invalid("test in another format", {"dataset.test.sources": _source(format="LabelledText")}, GENERATION,
            field="spec.dataset.test.sources", words="task Generation reads every format but this"),
    Invalid("preferences of a classifier", {"method.dpo": {}}, field="spec.method.dpo", words="dpo is for task Generation"),
    Invalid("preferences without dpo", {"dataset.sources": _source(format="Preference")}, GENERATION,
            field="spec.dataset.sources", words="with method.dpo Preference, without it the rest"),
    *(
        Invalid(f"dpo of {kind}", {"dataset.validation.sources": _source(format=kind)}, PREFERENCE,
                field="spec.dataset.validation.sources", words="with method.dpo Preference, without it the rest")
        for kind in ("Messages", "PromptCompletion", "LabelledText")
    ),
    *(
        Invalid(f"{metric} of dpo", {"evaluation.metrics": ["loss", metric]}, PREFERENCE,
                field="spec.evaluation.metrics", words="with method.dpo loss, rewardAccuracy and rewardMargin")
        for metric in ("perplexity", "accuracy", "macroF1")
    ),
    *(
        Invalid(f"rewards without dpo: {spec['task']}", {"evaluation.metrics": ["rewardAccuracy"]}, spec,
                field="spec.evaluation.metrics", words="with method.dpo loss, rewardAccuracy and rewardMargin")
        for spec in (CLASSIFICATION, GENERATION)
    ),
    Invalid("gate on rewards without dpo", {"evaluation.gate": {"metric": "rewardMargin", "minimumGain": 1}}, GENERATION,
            field="spec.evaluation.gate.metric", words="with method.dpo loss, rewardAccuracy and rewardMargin"),
    Invalid("gate of dpo on perplexity", {"evaluation.gate": {"metric": "perplexity", "maximum": 9}}, PREFERENCE,
            field="spec.evaluation.gate.metric", words="with method.dpo loss, rewardAccuracy and rewardMargin"),
    Invalid("NF4 on CPU", {"method.lora": {"quantization": "NF4"}}, field="spec.method.lora.quantization",
            words="NF4 needs a CUDA GPU"),
    Invalid("adapter of Full", {"method.type": "Full", "output.format": "Adapter"}, field="spec.output.format",
            words="only LoRA makes an adapter"),
    Invalid("adapter of Head", {"method.type": "Head", "output.format": "Adapter"}, field="spec.output.format",
            words="only LoRA makes an adapter"),
    *(
        Invalid(f"name {name[:12]}", {".metadata.name": name}, field="metadata.name",
                words="the name must begin with a letter and have at most 50 characters")
        for name in ("a" * 51, "7b", "a.b")
    ),
]  # fmt: skip

INVALID = BOUNDS + RULES

UNKNOWN_FIELDS = [
    Invalid(f"unknown {path}", {path: 1}, field=f"spec.{path}", words=f'unknown field "spec.{path}"', our_words="unknown field")
    for path in ("epochs", "model.url", "training.lr", "training.learning_rate", "method.lora.r", "resources.gpu", "scheduling.affinity.nodes")
]  # fmt: skip

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
        "requests": {"cpu": "2", "memory": "8Gi", "example.com/nic": "1"}, "limits": {"cpu": "2000m", "memory": "8.5Gi"},
        "prepare": {"requests": {"memory": "1e9"}, "limits": {"memory": "1Gi", "ephemeral-storage": "0"}},
    },
    "scheduling": {
        "queueName": "team-a", "priorityClassName": "high", "nodeSelector": {"example.com/pool": "gpu", "spot": ""},
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
    Valid("preferences", {"method.dpo.beta": 0.01, "dataset.sources": _source(format="Preference", columns={
        "prompt": "question", "chosen": "better", "rejected": "worse"}), "evaluation": {
        "metrics": ["rewardAccuracy", "rewardMargin", "loss"], "gate": {"metric": "rewardAccuracy", "minimum": 0.6}}}, PREFERENCE),
    *(Valid(f"{variant} in NF4", {"method.lora": {"variant": variant, "quantization": "NF4"}, "resources.gpus": 1})
      for variant in ("LoRA", "RsLoRA", "DoRA")),
    *(Valid(variant, {"method.lora.variant": variant}) for variant in ("LoRA", "RsLoRA", "DoRA")),
    Valid("every format of generation", {"dataset.sources": [
        {**TEXTS[0], "format": f} for f in ("Messages", "ShareGPT", "PromptCompletion", "Alpaca", "QuestionContextAnswer", "Text")]}, GENERATION),
    Valid("columns of tools and of questions", {"dataset.sources": [
        {**TEXTS[0], "columns": {"messages": "talk", "tools": "functions"}},
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
    Valid("labelling without a closed set", {"dataset.labelling": {"aliases": {"pos": "positive"}, "conflicts": "Drop", "rules": [_RULE]}}),
    Valid("as many labels as there may be", {"dataset.labels": [f"{i:0128}" for i in range(512)]}),
    Valid("as many sources as there may be", {"dataset.sources": [
        {"uri": "s3://bucket/" + "x" * 1000} for _ in range(32)]}),
    Valid("exactly a tenth to train on", {"dataset.validation.fraction": 0.1, "dataset.test.fraction": 0.8}),
    Valid("whole numbers for decimals", {"training": {"epochs": 3, "learningRate": 1, "weightDecay": 1}}),
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
    "dataset.labelling.rules": ([_RULE], [_RULE | {"label": "negative"}]),
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
    "scheduling.nodeSelector": (LEFT_OUT, {"zone": "a"}),
    "scheduling.tolerations": ([{"key": "a"}], []),
    "scheduling.affinity": (LEFT_OUT, {}),
    "workspace.size": (LEFT_OUT, "20Gi"),
    "workspace.claimName": ("a", "b"),
    "workspace.retain": (False, True),
    "output.uri": (LEFT_OUT, "s3://bucket/out"),
    "output.format": (LEFT_OUT, "Adapter"),
}
_NEEDED: dict[str, Changes] = {
    "method.lora.quantization": {"resources.gpus": 1},
    "method.trainable.lastLayers": {"method.type": "Full"},
    "evaluation.gate.minimum": {"evaluation.gate": {"metric": "accuracy", "minimumGain": 0}},
    "resources.nodes": {"workspace.claimName": "team"},
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
