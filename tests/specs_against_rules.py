"""Fields that are sound by themselves and contradict each other or the job, and fields that do not exist."""

from tests.specs import CLASSIFICATION, GENERATION, LABEL_RULE, PREFERENCE, TEXTS, Invalid, sources
from tests.specs_beyond_bounds import BOUNDS


def _uri(uri: str, words: str) -> Invalid:
    return Invalid(
        f"source {uri}", {"dataset.sources": [{"uri": uri}]}, field="spec.dataset.sources[0].uri", words=words
    )


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
            "pvc://my..claim/file",
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
    Invalid("claim with a long name", {"output.uri": f"pvc://{'a' * 254}/b"}, field="spec.output.uri",
            words="the name of a claim has at most 253 characters"),
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
        Invalid(f"rule for an unknown label: {name}", {"dataset.labels": ["positive", "negative"], "dataset.labelling.rules": [LABEL_RULE, rule]},
                field="spec.dataset.labelling.rules", words="a rule must vote for a label that dataset.labels lists")
        for name, rule in {"keywords": {**LABEL_RULE, "name": "other", "label": "good"}}.items()
    ),
    Invalid("same rule twice", {"dataset.labelling.rules": [LABEL_RULE, LABEL_RULE]}, field="spec.dataset.labelling.rules",
            words="every rule needs a name of its own"),
    *(
        Invalid(f"rule with {name}", {"dataset.labelling.rules": [rule]}, field="spec.dataset.labelling.rules[0]",
                words="give exactly one of keywords, pattern and table")
        for name, rule in {"nothing to look for": {"name": "r", "label": "a"},
                           "keywords and a pattern": {**LABEL_RULE, "pattern": "x"}}.items()
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
    Invalid("rank without a queue", {"scheduling": {"workloadPriorityClassName": "urgent"}}, field="spec.scheduling.workloadPriorityClassName",
            words="workloadPriorityClassName is a rank in a Kueue queue; give queueName, too"),
    Invalid("memory of no GPU", {"resources": {"gpus": 0, "gpuMemory": "80Gi"}}, field="spec.resources.gpuMemory",
            words="gpuMemory is for training on GPUs; leave it out with gpus: 0"),
    Invalid("request above the limit", {"resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "8G"}}},
            field="spec.resources.requests", words="a request may not be greater than the limit"),
    Invalid("request of prepare above the limit",
            {"resources.prepare": {"requests": {"cpu": 2}, "limits": {"cpu": "1900m"}}},
            field="spec.resources.prepare.requests", words="a request may not be greater than the limit"),
    *(
        Invalid(f"device that {part} asks for", {f"{part}.requests": {"example.com/nic": 1}}, field=f"spec.{part}.requests",
                words="name other resources in limits")
        for part in ("resources", "resources.prepare")
    ),
    *(
        Invalid(f"limit of {name} in {part}: {amount}", {f"{part}.limits": {name: amount}}, field=f"spec.{part}.limits",
                words="or a whole number of a resource that a device plugin names")
        for part, name, amount in (
            ("resources", "nic", 1), ("resources", "$(id)", 1), ("resources.prepare", "example.com/nic", "0.5"),
            ("resources.prepare", "example.com/nic", "1k"), ("resources.prepare", "example..com/nic", 1))
    ),
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
    Invalid("classifier of conversations", {"dataset.sources": sources(format="Messages")},
            field="spec.dataset.sources", words="task Classification reads format LabelledText and no other"),
    *(Invalid(f"classifier of {kind}", {"dataset.sources": sources(format=kind)},
              field="spec.dataset.sources", words="task Classification reads format LabelledText and no other")
      for kind in ("ShareGPT", "QuestionContextAnswer")),
    Invalid("generator of labels", {"dataset.sources": sources(format="LabelledText")}, GENERATION,
            field="spec.dataset.sources", words="task Generation reads every format but this"),
    Invalid("validation in another format", {"dataset.validation.sources": sources(format="Text")},
            field="spec.dataset.validation.sources", words="task Classification reads format LabelledText"),
    Invalid("test in another format", {"dataset.test.sources": sources(format="LabelledText")}, GENERATION,
            field="spec.dataset.test.sources", words="task Generation reads every format but this"),
    Invalid("preferences of a classifier", {"method.dpo": {}}, field="spec.method.dpo", words="dpo is for task Generation"),
    Invalid("preferences without dpo", {"dataset.sources": sources(format="Preference")}, GENERATION,
            field="spec.dataset.sources", words="with method.dpo Preference, without it the rest"),
    *(
        Invalid(f"dpo of {kind}", {"dataset.validation.sources": sources(format=kind)}, PREFERENCE,
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
] + [Invalid("unknown field that is null", {"training.lr": None}, field="spec.training.lr", words='unknown field "spec.training.lr"', our_words="unknown field")]  # fmt: skip
