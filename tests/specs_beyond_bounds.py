"""Values of the wrong type, too long, too many, out of range: each field of the spec, just beyond what it may be."""

from collections.abc import Callable
from typing import Any

from tests.specs import LABEL_RULE, LEFT_OUT, TEXTS, Invalid, sources


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


_TERM = "scheduling.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "scheduling.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution"
_RATHER_NEAR = "scheduling.affinity.podAffinity.preferredDuringSchedulingIgnoredDuringExecution"
_NEAR = "scheduling.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution"

BOUNDS = [
    _choice("task", "Translation"),
    _too_long("model.uri", 1024, "hf://owner/" + "x" * 1024),
    _pattern("model.revision", "main branch"),
    _too_long("model.revision", 128),
    _name("model.secretRef.name", "My_Secret"),
    _name("output.secretRef.name", "a..b"),
    _too_long("model.secretRef.name", 253),
    _too_long("model.adapter.uri", 1024, "hf://owner/" + "x" * 1024),
    _bound("model.trustRemoteCode", "true", "must be of type boolean", "should be a valid boolean"),
    _bound("dataset.sources", [], "should have at least 1 items", "should have at least 1 item"),
    _too_many("dataset.sources", 32, TEXTS[0]),
    _choice("dataset.sources", sources(format="CSV"), "[0].format"),
    *(_too_long("dataset.sources", 128, sources(columns={column: "x" * 129}), f"[0].columns.{column}")
      for column in ("text", "label", "prompt", "completion", "messages", "tools", "system", "instruction", "input", "output", "question", "context", "answer",
                     "chosen", "rejected")),
    _bound("dataset.sources", sources(columns={"label": ""}), "at least 1 chars long", "at least 1 character",
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
    _too_many("dataset.labelling.rules", 32, LABEL_RULE),
    _needs("dataset.labelling.rules", "dataset.labelling.rules[0].name", [{"label": "a", "keywords": ["x"]}]),
    _pattern("dataset.labelling.rules", [LABEL_RULE | {"name": "Two words"}], "[0].name"),
    _too_long("dataset.labelling.rules", 63, [LABEL_RULE | {"name": "x" * 64}], "[0].name"),
    _too_long("dataset.labelling.rules", 128, [LABEL_RULE | {"label": "x" * 129}], "[0].label"),
    _bound("dataset.labelling.rules", [LABEL_RULE | {"label": ""}], "at least 1 chars long", "at least 1 character", place="[0].label"),
    _bound("dataset.labelling.rules", [LABEL_RULE | {"keywords": []}], "should have at least 1 items", "should have at least 1 item",
           place="[0].keywords"),
    _too_many("dataset.labelling.rules", 128, "x", "[0].keywords", lambda words: [LABEL_RULE | {"keywords": words}]),
    _pattern("dataset.labelling.rules", [LABEL_RULE | {"keywords": [" "]}], "[0].keywords[0]"),
    _too_long("dataset.labelling.rules", 64, [LABEL_RULE | {"keywords": ["x" * 65]}], "[0].keywords[0]"),
    _too_long("dataset.labelling.rules", 256, [{"name": "r", "label": "a", "pattern": "x" * 257}], "[0].pattern"),
    _bound("dataset.labelling.rules", [{"name": "r", "table": {f"v{n}": "a" for n in range(257)}}],
           "must have at most 256 items", "should have at most 256 items", place="[0].table"),
    _too_long("dataset.labelling.rules", 128, [{"name": "r", "table": {"v": "x" * 129}}], "[0].table.v"),
    _too_long("dataset.labelling.rules", 128, [LABEL_RULE | {"column": "x" * 129}], "[0].column"),
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
    _pattern("resources.gpuResource", "gpu"),
    _too_long("resources.gpuResource", 317),
    *_range("resources.nodes", 0, "greater than or equal to 1", 65, "less than or equal to 64"),
    _too_many_keys("resources.requests", 16, 1),
    _too_many_keys("resources.limits", 16, 1),
    _quantity("resources.gpuMemory", "80GB"),
    _quantity("resources.requests.memory", "8GB"),
    _quantity("resources.limits.memory", "8 Gi"),
    _quantity("resources.limits.cpu", "-1"),
    _quantity("resources.limits.cpu", "1e999"),
    _quantity("resources.limits.cpu", -1, "greater than or equal to 0"),
    _quantity("resources.limits.cpu", 1.5, "must be of type integer,string"),
    _quantity("resources.prepare.requests.memory", "1.2.3"),
    _too_many_keys("resources.prepare.limits", 16, 1),
    _quantity("resources.prepare.limits.memory", "8K"),
    _name("scheduling.queueName", "team/a"),
    _too_long("scheduling.queueName", 63),
    _name("scheduling.workloadPriorityClassName", "High"),
    _too_long("scheduling.workloadPriorityClassName", 63, **{"scheduling.queueName": "a"}),
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
    _pattern("managedBy", "ours"),
    _too_long("managedBy", 63, "example.com/" + "x" * 52),
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
