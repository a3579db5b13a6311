"""`plan.json`: what the operator tells a trainer pod. Everything is resolved and nothing is secret.

The operator writes one plan per stage into a ConfigMap. Settings that need facts about the data are filled in
after prepare: `checkpoint_steps`, `evaluation_steps` and what the memory plan decides. Only the precision may stay
open (None): it is a property of the device that the pod gets.
"""

from pydantic import Field

from finetune_api.base import Document
from finetune_api.constants import Stage
from finetune_api.dataset import CleanSpec, Columns, DataFormat, DuplicatesSpec, LabellingSpec, PersonalDataSpec
from finetune_api.spec import (
    Gate,
    LoraVariant,
    MethodType,
    Metric,
    OutputFormat,
    Precision,
    Quantization,
    Schedule,
    Task,
)


class JobReference(Document):
    namespace: str
    name: str
    uid: str


class Location(Document):
    """A URI and what is needed to read or write it from this pod."""

    uri: str
    path: str | None = Field(None, description="Where the URI is mounted in the pod: pvc://, configmap:// and file:// only.")
    secret_dir: str | None = Field(None, description="Folder with the Secret's keys as files.")


class PlanModel(Document):
    location: Location
    adapter: Location | None = Field(None, description="Training goes on from this adapter; prepare puts it into the workspace's adapter/.")
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class PlanSource(Document):
    location: Location
    field: str = Field(description="Where it stands in the spec, for error messages: dataset.sources[0].")
    format: DataFormat | None = None
    columns: Columns = Columns()


class PlanSplit(Document):
    """Exactly one of the two is set."""

    sources: list[PlanSource] = Field(default_factory=list)
    fraction: float | None = None


class PlanPersonalData(Document):
    settings: PersonalDataSpec
    key_dir: str | None = Field(None, description="Folder with the entries of keySecretRef as files; prepare only.")


class PlanReview(Document):
    suspect_weight: float | None = None
    max_rows: int
    decisions: list[PlanSource] = Field(default_factory=list)


class PlanDataset(Document):
    sources: list[PlanSource]
    validation: PlanSplit
    test: PlanSplit | None = None
    labels: list[str] | None = None
    duplicates: DuplicatesSpec | None = None
    labelling: LabellingSpec | None = None
    review: PlanReview | None = None
    clean: CleanSpec | None = None
    personal_data: PlanPersonalData | None = None
    max_rejected: float = 0


class PlanLora(Document):
    variant: LoraVariant = LoraVariant.LORA
    rank: int
    alpha: int
    dropout: float
    target_modules: list[str] | None = Field(None, description="None: all linear layers of the transformer blocks.")
    quantization: Quantization | None = Field(None, description="Of the frozen linear layers of the transformer blocks, while training.")


class PlanDpo(Document):
    """Set: the rows are preference pairs, a better and a worse answer each."""

    beta: float


class PlanHeadFirst(Document):
    """Exactly one of epochs and steps is set."""

    epochs: float | None = None
    steps: int | None = None
    learning_rate: float


class PlanEarlyStopping(Document):
    patience: int
    minimum_improvement: float


class PlanTraining(Document):
    epochs: float | None = Field(None, description="Set exactly if max_steps is not.")
    max_steps: int | None = None
    learning_rate: float
    batch_sequences: int | None = Field(None, description="Set exactly if batch_tokens is not.")
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = Field(None, description="Set in the train plan.")
    activation_checkpointing: bool | None = Field(None, description="Set in the train plan.")
    max_length: int = Field(description="Upper bound; prepare lowers it to the model's own limit.")
    precision: Precision | None = Field(None, description="None: bf16 where the accelerator has it, else fp32.")
    seed: int
    schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    checkpoint_steps: int | None = Field(None, description="Set in the train plan.")
    evaluation_steps: int | None = Field(None, description="Set in the train plan.")
    early_stopping: PlanEarlyStopping | None = None
    compile: bool = False


class PlanSample(Document):
    """What `finetune validate` asks of prepare: to judge the data and the model's settings, and to fetch no weights."""

    rows: int | None = Field(None, ge=1, description="Most rows of each source, from the beginnings of its files. None: all.")
    tokenize: bool = Field(True, description="False: the model is out of reach; the data is judged alone.")


class PlanEvaluation(Document):
    metrics: list[Metric]
    gate: Gate | None = None


class PlanDevice(Document):
    gpus: int = Field(description="Per node. Before the memory plan is made, 1 if their number is left to it.")
    nodes: int
    allow_cpu_fallback: bool
    compact_heap: bool = Field(False, description="On CPU: give freed memory back at once, since it is short. Set in the train plan.")
    estimated_memory_bytes: int | None = Field(None, description="Of the memory plan, per device. Set in the train plan.")
    peak_memory_bytes: int | None = Field(None, description="Measured by training, for the model card. Set in the publish plan.")


class PlanOutput(Document):
    format: OutputFormat
    location: Location | None = Field(None, description="None: the result stays in the workspace.")
    workspace_uri: str = Field(description="How the artifacts folder of the workspace is called outside the pod, for status.")


class Plan(Document):
    stage: Stage
    job: JobReference
    workspace: str = Field(description="Folder with model/ adapter/ data/ checkpoints/ artifacts/ report/.")
    cache: str | None = Field(None, description="Folder with prepared data of earlier jobs, on the volume of the workspace. None: nothing is kept.")
    task: Task
    model: PlanModel
    dataset: PlanDataset
    method: MethodType
    lora: PlanLora | None = None
    last_layers: int | None = Field(None, description="Full only. None: all weights are trained.")
    head_first: PlanHeadFirst | None = None
    dpo: PlanDpo | None = None
    training: PlanTraining
    evaluation: PlanEvaluation
    device: PlanDevice
    output: PlanOutput
    sample: PlanSample | None = Field(None, description="Only of `finetune validate`, never in a cluster.")
