"""`FineTuneJob.spec`: what a user declares. Every optional setting that is left out is chosen by the
operator or the trainer, and the choice is shown in `status.resolved`.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from finetune_api.base import Document, Rule
from finetune_api.kubernetes import (
    NAME,
    RESOURCE_RULES,
    Affinity,
    LabelKey,
    Labels,
    LocalReference,
    Name,
    Quantities,
    Quantity,
    ResourceRequirements,
    Toleration,
)

Text = TypeVar("Text", bound=str)

Uri = Annotated[str, StringConstraints(max_length=1024)]
Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]
QueueName = Annotated[str, StringConstraints(pattern=NAME, max_length=63)]  # Kueue reads it from a label

URI_HELP = (
    "hf://owner/name, s3://bucket/path, gs://bucket/path, az://container/path, https://host/path, "
    "pvc://claim/path, configmap://name/key; with `finetune run` also file://path, relative to the manifest"
)
URI_FORM = f"expected one of {URI_HELP}"
# No separators and no control or format characters: URIs are printed at terminals.
_CHARACTER = r"[^\pZ\pC]"
_SOME = rf"[^/\pZ\pC]{_CHARACTER}*"
_OBJECT = NAME[1:-1]
_URI = (
    f"^((hf|s3|gs|az|https)://{_SOME}|file://{_CHARACTER}+"
    f"|pvc://{_OBJECT}/{_SOME}|configmap://{_OBJECT}/[-._a-zA-Z0-9]+)$"
)


def uri_rules(output: bool = False) -> tuple[Rule, ...]:
    """Rules of a model with a `uri`: its form, no way out of a folder, no local files in a cluster, a scheme that can be written."""
    unset = "!has(self.uri) || " if output else ""
    rules = [
        Rule(f"{unset}self.uri.matches(r'{_URI}')", URI_FORM, "uri"),
        Rule(f"{unset}!self.uri.matches('(^|/)[.][.](/|$)') || self.uri.startsWith('file://')",
             "a path may not contain '..'", "uri"),
        Rule(f"{unset}!self.uri.matches('^https://[^/]*@')",
             "a URI may not contain a password, because it is shown in status and logs; put it into a Secret and name that in secretRef", "uri"),
        Rule(f"{unset}!self.uri.startsWith('file://')",
             "file:// works only with `finetune run`; in a cluster use pvc://, s3://, gs://, az://, https://, hf:// or configmap://",
             "uri", cluster_only=True),
    ]
    if output:
        rules.append(Rule("!has(self.uri) || !self.uri.matches('^(https|configmap)://')",
                          "an output cannot be written to https:// or configmap://; use s3://, gs://, az://, hf:// or pvc://", "uri"))
    return tuple(rules)


class Task(StrEnum):
    CLASSIFICATION = "Classification"
    GENERATION = "Generation"


class MethodType(StrEnum):
    LORA = "LoRA"
    FULL = "Full"
    HEAD = "Head"


class LoraVariant(StrEnum):
    LORA = "LoRA"
    RS_LORA = "RsLoRA"
    DORA = "DoRA"


class Quantization(StrEnum):
    NF4 = "NF4"


class DataFormat(StrEnum):
    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    ALPACA = "Alpaca"
    TEXT = "Text"
    PREFERENCE = "Preference"
    LABELLED_TEXT = "LabelledText"


class Precision(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


class Schedule(StrEnum):
    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class Metric(StrEnum):
    ACCURACY = "accuracy"
    MACRO_F1 = "macroF1"
    WEIGHTED_F1 = "weightedF1"
    LOSS = "loss"
    PERPLEXITY = "perplexity"
    REWARD_ACCURACY = "rewardAccuracy"
    REWARD_MARGIN = "rewardMargin"

    @property
    def lower_is_better(self) -> bool:
        return self in (Metric.LOSS, Metric.PERPLEXITY)


class OutputFormat(StrEnum):
    ADAPTER = "Adapter"
    MERGED = "Merged"


class AdapterSource(Document):
    rules: ClassVar = (
        *uri_rules(),
        Rule("!self.uri.startsWith('configmap://')", "an adapter is a folder and does not fit a ConfigMap; use hf://, pvc:// or an object store", "uri"),
    )
    uri: Uri = Field(description=f"A folder with a PEFT adapter, as output.format Adapter makes it. {URI_HELP}.")
    secret_ref: LocalReference | None = Field(None, description="Secret with the credentials for this URI; keys as for model.secretRef.")


class ModelSpec(Document):
    rules: ClassVar = (
        *uri_rules(),
        Rule("!self.uri.startsWith('configmap://')", "a model is a folder and does not fit a ConfigMap; use hf://, pvc:// or an object store", "uri"),
        Rule("!has(self.revision) || self.uri.startsWith('hf://')", "revision is for hf:// only; leave it out", "revision"),
    )
    uri: Uri = Field(description=f"Where the foundation model is: a folder in Hugging Face layout. {URI_HELP}.")
    revision: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]+$", max_length=128)] | None = Field(
        None, description="Branch, tag or commit of an hf:// model. A commit makes the job repeatable; the commit used is shown in status."
    )
    secret_ref: LocalReference | None = Field(
        None, description="Secret with the credentials for this URI: HF_TOKEN; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL; "
        "GOOGLE_APPLICATION_CREDENTIALS (the JSON itself); AZURE_STORAGE_CONNECTION_STRING; or username and password for https."
    )
    adapter: AdapterSource | None = Field(
        None, description="A LoRA adapter of this model, from an earlier job, to go on from. method.lora must have its settings, dataset.labels its labels. "
        "The result is an adapter of the same kind."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Only for models that you have read.")
    allow_pickle: bool = Field(False, description="Accept weights as pickle files, which can run code when they are read. Off: safetensors only.")


def _once(values: list[Text]) -> list[Text]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise PydanticCustomError("duplicate", "'{value}' may be given only once", {"value": value})
    return values


class Columns(Document):
    """Names of the columns where they differ from the usual ones."""

    text: Column | None = Field(None, description="Column with the text (Text, LabelledText). Usual names: text, sentence, headline, content.")
    label: Column | None = Field(None, description="Column with the label (LabelledText). Usual names: label, labels, category, sentiment, class.")
    prompt: Column | None = Field(None, description="Column with the prompt (PromptCompletion, Preference). Usual name: prompt.")
    completion: Column | None = Field(None, description="Column with the completion (PromptCompletion). Usual names: completion, response.")
    messages: Column | None = Field(None, description="Column with the list of {role, content} (Messages). Usual names: messages, conversations.")
    instruction: Column | None = Field(None, description="Column with the instruction (Alpaca). Usual name: instruction.")
    input: Column | None = Field(None, description="Column with the optional input (Alpaca). Usual name: input.")
    output: Column | None = Field(None, description="Column with the answer (Alpaca). Usual name: output.")
    chosen: Column | None = Field(None, description="Column with the better answer (Preference): a text, a list of {role, content}, or a conversation that begins like the rejected one. Usual name: chosen.")
    rejected: Column | None = Field(None, description="Column with the worse answer (Preference). Usual name: rejected.")


class Source(Document):
    rules: ClassVar = uri_rules()
    uri: Uri = Field(description=f"A file, a folder of them, or a pattern (*, ?, [a-z], and ** for folders): JSONL, JSON, CSV, TSV, Parquet, Arrow or plain text; gzip, zstd or bz2. {URI_HELP}.")
    format: DataFormat | None = Field(None, description="What a row looks like. Left out: recognised from the columns of the first row.")
    columns: Columns | None = Field(None, description="Column names, where they differ from the usual ones.")
    secret_ref: LocalReference | None = Field(None, description="Secret with the credentials for this URI; keys as for model.secretRef.")


Sources = Annotated[list[Source], Field(min_length=1, max_length=32)]


class Split(Document):
    """A part of the data that is not trained on: files of its own, or a fraction of the sources."""

    rules: ClassVar = (Rule("has(self.sources) != has(self.fraction)", "give either sources or fraction, not both and not neither"),)
    sources: Sources | None = Field(None, description="Files of this split.")
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows of dataset.sources, drawn by row hash, so that a row keeps its split when data is added.")


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]
RE2_HELP = "a regular expression in RE2 syntax (https://github.com/google/re2/wiki/Syntax), which has no look-around and no back-references"
# The condition is there to fail: with it, a pattern that cannot be compiled breaks the rule.
_COMPILES = "(''.matches({0}) ? true : true)"


class UnicodeForm(StrEnum):
    NFC = "NFC"
    NFKC = "NFKC"


class CleanSpec(Document):
    """Steps in the order in which they are done; each is off unless it is asked for. A label is never changed."""

    rules: ClassVar = (
        Rule("!has(self.minCharacters) || !has(self.maxCharacters) || self.minCharacters <= self.maxCharacters",
             "minCharacters is above maxCharacters: no row would be left", "minCharacters"),
        Rule(f"!has(self.dropLines) || self.dropLines.all(p, {_COMPILES.format('p')})", f"expected {RE2_HELP}", "dropLines"),
    )
    repair_encoding: bool = Field(False, description="Repair text that was decoded by the wrong encoding (mojibake): 'schÃ¶n' becomes 'schön'.")
    unicode: UnicodeForm | None = Field(
        None, description="Unicode normalization form. NFC: one code for each character, the same look. NFKC: also replaces ligatures, full-width letters and superscripts by plain ones, "
        "which changes formulas."
    )
    remove_control_characters: bool = Field(
        False, description="Remove control characters but tab and line break, terminal escapes, invisible characters (zero-width space, soft hyphen, byte order mark, tags) "
        "and marks of the writing direction. Joiners, which emoji and some scripts need, stay."
    )
    normalize_whitespace: bool = Field(
        False, description="Line breaks become \\n, any unusual space an ordinary one, several in a line one, three empty lines and more two; spaces at the ends of lines and of the text go. "
        "Indentation stays, and so does what stands between a prompt and its completion."
    )
    drop_lines: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = Field(
        None, description=f"Drop the lines in which one of these is found, such as menus and footers. Each is {RE2_HELP}."
    )
    min_characters: int | None = Field(None, ge=1, le=16_777_216, description="Drop rows whose texts together have less characters.")
    max_characters: int | None = Field(None, ge=1, le=16_777_216, description="Drop rows whose texts together have more characters.")
    max_repetition: float | None = Field(
        None, ge=0, lt=1, description="Drop rows with a text that repeats itself: the larger of its share of characters in lines that stand in it before, and of words in sequences of five that do. "
        "Rae et al. (https://arxiv.org/abs/2112.11446, table A1) drop documents above 0.2 and 0.15."
    )
    languages: Annotated[list[Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-Hant|-ME)?$", max_length=8)]], Field(min_length=1, max_length=64), AfterValidator(_once)] | None = Field(
        None, description="Keep rows in these languages (ISO 639-1 codes such as en and de; zh-Hant for traditional Chinese). Rows too short or too mixed to tell are kept.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class PersonalDataAction(StrEnum):
    REDACT = "Redact"
    PSEUDONYMIZE = "Pseudonymize"
    REJECT = "Reject"
    KEEP = "Keep"


class PersonalDataKind(StrEnum):
    EMAIL = "Email"
    PHONE = "Phone"
    IBAN = "IBAN"
    CREDIT_CARD = "CreditCard"
    NATIONAL_ID = "NationalId"
    IP_ADDRESS = "IPAddress"
    URL_CREDENTIALS = "UrlCredentials"
    SECRET = "Secret"


class PersonalDataPattern(Document):
    rules: ClassVar = (Rule(_COMPILES.format("self.pattern"), f"expected {RE2_HELP}", "pattern"),)
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$", max_length=32)] = Field(
        description="What it is called in the placeholder and in the counts, for example EMPLOYEE_NUMBER."
    )
    pattern: Pattern = Field(description=f"{RE2_HELP[0].upper()}{RE2_HELP[1:]}. All that it matches counts as found; there is no check beyond it.")


class PersonalDataSpec(Document):
    rules: ClassVar = (
        Rule("(self.action == 'Pseudonymize') == has(self.keySecretRef)", "keySecretRef is needed by action Pseudonymize, and by no other", "keySecretRef"),
        Rule("!has(self.patterns) || self.patterns.all(p, self.patterns.exists_one(q, q.name == p.name))", "every pattern needs a name of its own", "patterns"),
    )
    action: PersonalDataAction = Field(
        description="What is done with what is found. Redact: a placeholder such as [EMAIL] takes its place. Pseudonymize: one that is the same for the same value, such as [EMAIL_5f0e8d3c21b7a964] "
        "(HMAC-SHA256 with the key of keySecretRef). Reject: the row is left out. Keep: it is only counted."
    )
    kinds: Annotated[list[PersonalDataKind], Field(min_length=1, max_length=8), AfterValidator(_once)] | None = Field(
        None, description="What is looked for. Left out: all. Numbers count only if their check digits are right.", json_schema_extra={"x-kubernetes-list-type": "set"}
    )
    countries: Annotated[list[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$", max_length=2)]], Field(min_length=1, max_length=32), AfterValidator(_once)] | None = Field(
        None, description="Countries (ISO 3166, such as DE) whose phone numbers are also found without +, and whose national ids are looked for. Left out: phone numbers with + only, and "
        "ids of AT, AU, BE, BR, CA, CH, DE, DK, ES, FI, FR, GB, IE, IT, NL, NO, PL, SE and US.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    patterns: Annotated[list[PersonalDataPattern], Field(min_length=1, max_length=16)] | None = Field(None, description="What else to look for, whatever kinds says.")
    key_secret_ref: LocalReference | None = Field(None, description="Secret whose entry 'key', at least 16 bytes, makes the pseudonyms. Who has it can tell whether a pseudonym is that of a known value.")


class DatasetSpec(Document):
    rules: ClassVar = (
        Rule("(has(self.validation) ? (has(self.validation.fraction) ? self.validation.fraction : 0.0) : 0.1) "
             "+ (has(self.test) && has(self.test.fraction) ? self.test.fraction : 0.0) <= 0.9",
             "validation (a tenth if left out) and test leave less than a tenth of the rows for training; lower their fractions"),
    )
    sources: Sources = Field(description="Training data. All sources together must fit the task.")
    validation: Split | None = Field(None, description="Rows to choose the best checkpoint by. Left out: a tenth of the sources.")
    test: Split | None = Field(None, description="Held-out rows for the final scores and the gate. Left out: the scores are those on validation.")
    labels: Annotated[list[Label], Field(min_length=2, max_length=512), AfterValidator(_once)] | None = Field(
        None, description="The closed set of labels, in the order of the class ids (Classification). Left out: all labels found, sorted.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    clean: CleanSpec | None = Field(None, description="What is repaired in the texts of all splits, and which rows are left out. Left out: nothing is changed.")
    personal_data: PersonalDataSpec | None = Field(None, description="E-mail addresses, phone numbers, secrets and the like in the texts of all splits; labels are not looked at. Left out: not looked for.")
    max_rejected: float = Field(0, ge=0, lt=1, description="Share of rows that may be rejected before the job fails. 0: every row must be valid.")


class LoraSpec(Document):
    variant: LoraVariant = Field(
        LoraVariant.LORA, description="LoRA. RsLoRA: the scale falls with the root of the rank, which keeps high ranks learning (https://arxiv.org/abs/2312.03732). "
        "DoRA: length and direction of the weights are trained apart; slower, often better at low ranks (https://arxiv.org/abs/2402.09353)."
    )
    rank: int | None = Field(None, ge=1, le=1024, description="Rank of the update matrices. Left out: 16.")
    alpha: int | None = Field(None, ge=1, le=4096, description="Scale: the update is multiplied by alpha / rank, with RsLoRA by alpha / sqrt(rank). Left out: twice the rank, with RsLoRA 8; both scale by 2 at rank 16.")
    dropout: float | None = Field(None, ge=0, lt=1, description="Dropout on the adapter's input. Left out: 0.05.")
    target_modules: Annotated[list[Column], Field(min_length=1, max_length=64)] | None = Field(
        None, description="Names of the linear layers that get adapters. Left out: all linear layers of the transformer blocks."
    )
    quantization: Quantization | None = Field(
        None, description="NF4 (QLoRA): while training, the frozen linear layers of the transformer blocks are held in 4 bits, which takes a quarter of the memory of bf16 and some time "
        "(https://arxiv.org/abs/2305.14314). Needs a CUDA GPU. The result is the same kind of adapter or model, in full precision."
    )


class TrainableSpec(Document):
    last_layers: int = Field(
        ge=1, le=1024, description="Train the last so many transformer blocks, the final norm and the head; embeddings, and an output layer that shares their weights, stay frozen."
    )


class DpoSpec(Document):
    beta: float = Field(0.1, gt=0, le=100, description="How closely the tuned model is held to the model it started from; the lower, the freer.")


class HeadFirst(Document):
    rules: ClassVar = (Rule("has(self.epochs) != has(self.steps)", "give either epochs or steps, not both and not neither"),)
    epochs: float | None = Field(None, gt=0, le=1000, description="Passes over the training rows with the head alone; they count towards training.epochs.")
    steps: int | None = Field(None, ge=1, le=100_000_000, description="Optimizer steps with the head alone, instead of epochs; they count towards training.maxSteps.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Peak learning rate of these steps. Left out: 0.001.")


class MethodSpec(Document):
    rules: ClassVar = (
        Rule("!has(self.lora) || self.type == 'LoRA'", "lora is for type LoRA only", "lora"),
        Rule("!has(self.trainable) || self.type == 'Full'", "trainable is for type Full only; LoRA and Head say themselves what they train", "trainable"),
        Rule("!has(self.headFirst) || self.type != 'Head'", "headFirst is for types LoRA and Full; Head trains nothing but the head", "headFirst"),
    )
    type: MethodType = Field(MethodType.LORA, description="LoRA: small adapters beside frozen weights. Full: all weights. Head: the classification head only.")
    lora: LoraSpec | None = Field(None, description="Settings of LoRA.")
    trainable: TrainableSpec | None = Field(None, description="Which weights type Full trains. Left out: all.")
    head_first: HeadFirst | None = Field(
        None, description="Train the fresh classification head alone first, then everything: so it does not distort what the model knows (https://arxiv.org/abs/2202.10054). "
        "Warm-up and schedule run once for each part."
    )
    dpo: DpoSpec | None = Field(
        None, description="Learn from pairs of a better and a worse answer (format Preference) by Direct Preference Optimization (https://arxiv.org/abs/2305.18290), instead of from answers. "
        "Start from a model that answers well already."
    )


class BatchSize(Document):
    rules: ClassVar = (Rule("has(self.sequences) != has(self.tokens)", "give either sequences or tokens, not both and not neither"),)
    sequences: int | None = Field(None, ge=1, le=65536, description="Rows (with method.dpo: pairs) per optimizer step, over all GPUs.")
    tokens: int | None = Field(None, ge=1, le=67108864, description="Most tokens per optimizer step, over all GPUs.")


class EarlyStopping(Document):
    patience: int = Field(ge=1, le=1000, description="Training ends when so many evaluations in a row brought no improvement.")
    minimum_improvement: float = Field(
        0, ge=0, le=1e9, description="How much better than at the last improvement it must be to be one, in the metric's own unit."
    )


class TrainingSpec(Document):
    rules: ClassVar = (Rule("!(has(self.epochs) && has(self.maxSteps))", "give either epochs or maxSteps, not both", "maxSteps"),)
    epochs: float | None = Field(None, gt=0, le=1000, description="Passes over the training rows. Left out: 3.")
    max_steps: int | None = Field(None, ge=1, le=100_000_000, description="Optimizer steps, instead of epochs.")
    learning_rate: float | None = Field(None, gt=0, le=10, description="Peak learning rate. Left out: chosen by task and method.")
    batch_size: BatchSize | None = Field(None, description="Size of an optimizer step. Left out: 32 sequences (Classification) or 16 (Generation).")
    micro_batch_tokens: int | None = Field(
        None, ge=1, le=4194304, description="Most tokens in one forward pass; bounds memory, does not change the result. Left out: chosen by sizing."
    )
    activation_checkpointing: bool | None = Field(
        None, description="Compute activations again in the backward pass instead of keeping them: less memory, about a third slower, the same result. Left out: only if the job would not fit otherwise."
    )
    max_length: int | None = Field(None, ge=8, le=1048576, description="Longest row (with method.dpo: longest answer with its prompt) in tokens; longer ones are cut. Left out: the model's limit, at most 512 (Classification) or 2048 (Generation).")
    precision: Precision | None = Field(None, description="bf16 or fp32. Left out: bf16 where the accelerator has it, else fp32.")
    seed: int = Field(42, ge=0, le=4294967295, description="Seed of shuffling, initialisation and dropout. The same seed gives the same weights on the same hardware.")
    schedule: Schedule = Field(Schedule.COSINE, description="Shape of the learning rate after warm-up.")
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="Share of the steps in which the learning rate rises to its peak.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, le=1000, description="Gradients are clipped to this norm.")
    checkpoint_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps between checkpoints. Left out: a twentieth of the run.")
    evaluation_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps between evaluations. Left out: once per epoch.")
    early_stopping: EarlyStopping | None = Field(
        None, description="End training when the metric that chooses the best checkpoint no longer improves on validation: the first of evaluation.metrics (Classification) or loss (Generation). "
        "Evaluations of method.headFirst do not count. Left out: all steps are done."
    )
    compile: bool = Field(False, description="Have torch.compile make kernels for the GPU: it starts minutes later and then each step is faster. On CPU it does nothing.")


class Gate(Document):
    rules: ClassVar = (
        Rule("has(self.minimum) || has(self.maximum) || has(self.minimumGain)", "give minimum, maximum or minimumGain"),
        Rule("!has(self.maximum) || self.metric in ['loss', 'perplexity']", "maximum is for loss and perplexity; use minimum", "maximum"),
        Rule("!has(self.minimum) || !(self.metric in ['loss', 'perplexity'])", "minimum is not for loss and perplexity; use maximum", "minimum"),
    )
    metric: Metric = Field(description="The metric that decides; it is reported also if evaluation.metrics leaves it out.")
    minimum: float | None = Field(None, ge=0, le=1, description="Lowest score that passes.")
    maximum: float | None = Field(None, ge=0, le=1e9, description="Highest loss or perplexity that passes.")
    minimum_gain: float | None = Field(None, ge=0, le=1e9, description="How much better than the baseline it must be, in the metric's own unit.")


class EvaluationSpec(Document):
    rules: ClassVar = (
        Rule("!has(self.metrics) || self.metrics.all(m, self.metrics.exists_one(n, n == m))", "every metric may be given only once", "metrics"),
    )
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=8)] | None = Field(
        None, description="Scores to report, the first one first. Left out: macroF1, accuracy and loss (Classification), loss and perplexity (Generation), or rewardAccuracy and loss (method.dpo). "
        "rewardAccuracy: share of the pairs whose better answer gained more likelihood than the other, rewardMargin: beta times how much more, in nats."
    )
    gate: Gate | None = Field(None, description="What the tuned model must reach on the test split; otherwise the job fails and nothing is published.")


class ResourcesSpec(Document):
    rules: ClassVar = (
        *RESOURCE_RULES,
        Rule("!has(self.gpuMemory) || !has(self.gpus) || self.gpus > 0", "gpuMemory is for training on GPUs; leave it out with gpus: 0", "gpuMemory"),
        Rule("!has(self.requests) || !(self.gpuResource in self.requests)", "GPUs are asked for with resources.gpus; leave them out here", "requests"),
        Rule("!has(self.limits) || !(self.gpuResource in self.limits)", "GPUs are asked for with resources.gpus; leave them out here", "limits"),
    )
    gpus: int | None = Field(
        None, ge=0, le=16, description="GPUs for training on each node; 0 trains on CPU. Left out: with gpuMemory as few as hold the job, at most 8; else 0."
    )
    gpu_memory: Quantity | None = Field(
        None, description="Memory of one GPU, for example 80Gi. A job that needs more is refused before a GPU is asked for. Left out: not known, nothing is refused."
    )
    gpu_resource: LabelKey = Field("nvidia.com/gpu", description="Name of the GPU resource on the nodes.")
    nodes: int = Field(
        1, ge=1, le=64, description="Pods that train together, each with its own GPUs and its own requests and limits; with GPUs for a whole node, so many nodes. "
        "More than 1 needs a workspace that all of them can mount: workspace.accessMode ReadWriteMany, or a claimName."
    )
    allow_cpu_fallback: bool = Field(False, description="Train on CPU if the pod that asked for GPUs sees none. Off: the job fails with AcceleratorMissing.")
    requests: Quantities | None = Field(None, description="Requests of the training container, for example {cpu: 4, memory: 16Gi}.")
    limits: Quantities | None = Field(None, description="Limits of the training container.")
    prepare: ResourceRequirements | None = Field(None, description="Requests and limits of the CPU stages, prepare and publish.")


class SchedulingSpec(Document):
    queue_name: QueueName | None = Field(None, description="Kueue LocalQueue that training waits in. Preparing and publishing do not queue.")
    priority_class_name: Name | None = Field(None, description="PriorityClass of all pods.")
    node_selector: Labels | None = Field(None, description="Node labels that all pods need.")
    tolerations: Annotated[list[Toleration], Field(max_length=16)] | None = Field(None, description="Taints that all pods tolerate.")
    affinity: Affinity | None = Field(None, description="Affinity of all pods.")


class WorkspaceSpec(Document):
    rules: ClassVar = (
        Rule("!has(self.claimName) || !(has(self.size) || has(self.storageClassName) || has(self.accessMode))",
             "size, storageClassName and accessMode describe a new volume; leave them out with claimName", "claimName"),
    )
    claim_name: Name | None = Field(None, description="An existing PersistentVolumeClaim; the job uses a folder of its own in it.")
    size: Quantity | None = Field(None, description="Size of the new volume: model, data, checkpoints and artifacts. Left out: 20Gi.")
    storage_class_name: Name | None = Field(None, description="StorageClass of the new volume. Left out: the cluster's default.")
    access_mode: Literal["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"] | None = Field(None, description="Access mode of the new volume. Left out: ReadWriteOnce.")
    retain: bool = Field(False, description="Keep the volume when the FineTuneJob is deleted.")


class OutputSpec(Document):
    rules: ClassVar = uri_rules(output=True)
    format: OutputFormat | None = Field(None, description="Adapter (PEFT) or Merged (a complete model). Left out: Adapter for LoRA, otherwise Merged.")
    uri: Uri | None = Field(None, description=f"Folder to push the result to. Left out: it stays in the workspace, and goes with it unless workspace.retain is set. {URI_HELP}.")
    secret_ref: LocalReference | None = Field(None, description="Secret with the credentials for this URI; keys as for model.secretRef.")


class LimitsSpec(Document):
    active_deadline_seconds: int | None = Field(None, ge=1, le=31536000, description="Longest time that one stage may run.")
    retries: int = Field(
        3, ge=0, le=100, description="How often a stage may fail before the job fails. User errors are never retried; preemptions do not count. "
        "In the training of several nodes it counts for each node, and is fixed once training begins."
    )
    stall_seconds: int = Field(
        1800, ge=60, le=86400, description="Training that shows no sign of progress for so long, no step and no part of an evaluation, is reported as TrainingStalled. It is not stopped."
    )
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31536000, description="Delete the FineTuneJob, and all it made, so long after it finished.")


def _immutable(field: str, optional: bool = False) -> Rule:
    same = f"self.{field} == oldSelf.{field}"
    rule = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || {same})" if optional else same
    message = f"{field} cannot be changed after creation (only suspend and limits can); create a new FineTuneJob"
    return Rule(rule, message, field, cluster_only=True)


def _format_fits_task(field: str) -> Rule:
    blocks = [".".join(field.split(".")[:depth]) for depth in range(2, field.count(".") + 2)]
    unset = "".join(f"!has(self.{block}) || " for block in blocks)
    return Rule(f"{unset}self.{field}.all(s, !has(s.format) || "
                "(s.format == 'LabelledText') == (self.task == 'Classification') && (s.format == 'Preference') == has(self.method.dpo))",
                "task Classification reads format LabelledText and no other; task Generation reads every format but this: with method.dpo Preference, without it the rest", field)


_METRICS = "task Classification has the metrics accuracy, macroF1, weightedF1 and loss; task Generation has loss and perplexity, with method.dpo loss, rewardAccuracy and rewardMargin"


def _is_metric(name: str) -> str:
    """CEL: whether `name` is a metric of the spec's task and method."""
    return (f"{name} == 'loss' || ({name} == 'perplexity') == (self.task == 'Generation' && !has(self.method.dpo)) "
            f"&& ({name} in ['rewardAccuracy', 'rewardMargin']) == has(self.method.dpo)")


class FineTuneJobSpec(Document):
    """What to fine-tune, with what, how, and how good it must be."""

    rules: ClassVar = (
        Rule("self.task == 'Classification' || self.method.type != 'Head'", "Head is for task Classification; use LoRA or Full", "method.type"),
        Rule("!has(self.model.adapter) || self.method.type == 'LoRA'", "an adapter can be gone on from with method LoRA only", "model.adapter"),
        Rule("self.task == 'Classification' || !has(self.method.headFirst)",
             "headFirst is for task Classification: a generator has no fresh head", "method.headFirst"),
        Rule("!has(self.method.headFirst) || !has(self.method.headFirst.epochs) || has(self.training.maxSteps) "
             "|| self.method.headFirst.epochs < (has(self.training.epochs) ? self.training.epochs : 3.0)",
             "headFirst must leave some of training.epochs (3 if left out) for the rest of the weights", "method.headFirst.epochs"),
        Rule("!has(self.method.headFirst) || !has(self.method.headFirst.steps) || !has(self.training.maxSteps) "
             "|| self.method.headFirst.steps < self.training.maxSteps",
             "headFirst must leave some of training.maxSteps for the rest of the weights", "method.headFirst.steps"),
        Rule("self.task == 'Generation' || !has(self.method.dpo)", "dpo is for task Generation; a classifier has no answers to prefer", "method.dpo"),
        Rule("!has(self.method.lora) || !has(self.method.lora.quantization) || (has(self.resources.gpus) ? self.resources.gpus > 0 : has(self.resources.gpuMemory))",
             "NF4 needs a CUDA GPU: ask for one with resources.gpus, or leave quantization out", "method.lora.quantization"),
        Rule("self.task == 'Classification' || !has(self.dataset.labels)", "labels are for task Classification; leave them out", "dataset.labels"),
        _format_fits_task("dataset.sources"),
        _format_fits_task("dataset.validation.sources"),
        _format_fits_task("dataset.test.sources"),
        Rule(f"!has(self.evaluation.metrics) || self.evaluation.metrics.all(m, {_is_metric('m')})", _METRICS, "evaluation.metrics"),
        Rule(f"!has(self.evaluation.gate) || {_is_metric('self.evaluation.gate.metric')}", _METRICS, "evaluation.gate.metric"),
        Rule("self.resources.nodes == 1 || has(self.workspace.claimName) || (has(self.workspace.accessMode) && self.workspace.accessMode == 'ReadWriteMany')",
             "the pods of several nodes share the workspace; use accessMode ReadWriteMany with a StorageClass that has it, or name such a claim in claimName",
             "workspace.accessMode"),
        Rule("!has(self.output.format) || self.output.format == 'Merged' || self.method.type == 'LoRA'",
             "only LoRA makes an adapter; use format Merged or leave it out", "output.format"),
        *(_immutable(f) for f in ("task", "model", "dataset", "method", "training", "evaluation", "resources", "workspace", "output")),
        _immutable("scheduling", optional=True),
        Rule("!has(self.dataset.labels) || !has(oldSelf.dataset.labels) || self.dataset.labels.map(l, l) == oldSelf.dataset.labels.map(l, l)",
             _immutable("dataset.labels").message, "dataset", cluster_only=True),  # lists of type set are equal in any order
    )
    task: Task = Field(description="Classification: one label per text. Generation: text from a prompt or a conversation.")
    model: ModelSpec = Field(description="The foundation model to start from.")
    dataset: DatasetSpec = Field(description="The data to learn from and to be judged by.")
    method: MethodSpec = Field(default_factory=MethodSpec, description="Which weights are trained.")
    training: TrainingSpec = Field(default_factory=TrainingSpec, description="How it is trained.")
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec, description="How the result is judged.")
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec, description="What training may use.")
    scheduling: SchedulingSpec | None = Field(None, description="Where and when the pods run.")
    workspace: WorkspaceSpec = Field(default_factory=WorkspaceSpec, description="The volume that the three stages share.")
    output: OutputSpec = Field(default_factory=OutputSpec, description="Where the result goes.")
    suspend: bool = Field(False, description="Stop the pods and keep everything else; false goes on from the last checkpoint.")
    limits: LimitsSpec = Field(default_factory=LimitsSpec, description="Time and retries.")
