"""`FineTuneJob.spec`: what a user declares. Every optional setting that is left out is chosen by the
operator or the trainer, and the choice is shown in `status.resolved`.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import Document, Rule
from finetune_api.constants import CONTROLLER
from finetune_api.dataset import Column, DatasetSpec
from finetune_api.kubernetes import (
    NAME,
    RESOURCE_RULES,
    Affinity,
    Labels,
    LocalReference,
    Name,
    Quantities,
    Quantity,
    ResourceName,
    ResourceRequirements,
    Toleration,
)
from finetune_api.uri import URI_HELP, Uri, uri_rules

KueueName = Annotated[str, StringConstraints(pattern=NAME, max_length=63)]  # Kueue reads it from a label
ControllerName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=63)]



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
    gpu_resource: ResourceName = Field("nvidia.com/gpu", description="Name of the GPU resource on the nodes.")
    nodes: int = Field(
        1, ge=1, le=64, description="Pods that train together, each with its own GPUs and its own requests and limits; with GPUs for a whole node, so many nodes. "
        "More than 1 needs a workspace that all of them can mount: workspace.accessMode ReadWriteMany, or a claimName."
    )
    allow_cpu_fallback: bool = Field(False, description="Train on CPU if the pod that asked for GPUs sees none. Off: the job fails with AcceleratorMissing.")
    requests: Quantities | None = Field(None, description="Requests of the training container, for example {cpu: 4, memory: 16Gi}.")
    limits: Quantities | None = Field(None, description="Limits of the training container.")
    prepare: ResourceRequirements | None = Field(None, description="Requests and limits of the CPU stages, prepare and publish.")


class SchedulingSpec(Document):
    rules: ClassVar = (
        Rule("!has(self.workloadPriorityClassName) || has(self.queueName)", "workloadPriorityClassName is a rank in a Kueue queue; give queueName, too", "workloadPriorityClassName"),
    )
    queue_name: KueueName | None = Field(None, description="Kueue LocalQueue that training waits in. Preparing and publishing do not queue.")
    workload_priority_class_name: KueueName | None = Field(
        None, description="Kueue WorkloadPriorityClass of training: who goes first in the queue, and who may be stopped for whom. Left out: the priority of priorityClassName."
    )
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
    active_deadline_seconds: int | None = Field(
        None, ge=1, le=31536000, description="Longest time that one stage may take, from when its pods may start: at its beginning, and anew after each time that it was suspended or queued. Waiting there does not count."
    )
    retries: int = Field(
        3, ge=0, le=100, description="How often a stage may fail before the job fails. User errors are never retried; disruptions (preemption, eviction, a lost node) do not count. "
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
        Rule("self.task == 'Classification' || !has(self.dataset.labelling)", "labelling is for task Classification; leave it out", "dataset.labelling"),
        Rule("self.task == 'Classification' || !has(self.dataset.review)", "review is for task Classification; leave it out", "dataset.review"),
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
        _immutable("managedBy", optional=True),
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
    managed_by: ControllerName | None = Field(
        None, description=f"The controller that carries the job out. Another one than {CONTROLLER} means that this operator leaves it alone: it makes nothing and writes no status. Left out: this operator."
    )
