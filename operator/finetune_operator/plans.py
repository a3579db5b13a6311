"""FineTuneJob -> plan.json: every setting that the user left open is chosen here, and shown in `status.resolved`. Pure.

Where files lie is a `Layout`'s to say: `PodLayout` in a cluster; `finetune run` has its own.
"""

from finetune_api.constants import Stage
from finetune_api.dataset import Columns, DecisionFile, Source, Split
from finetune_api.plan import (
    JobReference,
    Location,
    Plan,
    PlanDataset,
    PlanDevice,
    PlanDpo,
    PlanEarlyStopping,
    PlanEvaluation,
    PlanHeadFirst,
    PlanLora,
    PlanModel,
    PlanOutput,
    PlanPersonalData,
    PlanReview,
    PlanSource,
    PlanSplit,
    PlanTraining,
)
from finetune_api.spec import (
    AdapterSource,
    FineTuneJobSpec,
    LoraSpec,
    LoraVariant,
    MethodType,
    Metric,
    ModelSpec,
    OutputFormat,
    OutputSpec,
    Precision,
    Task,
)

from finetune_operator import sizing
from finetune_operator.layout import Layout
from finetune_operator.observed import Resource

EPOCHS = 3.0
VALIDATION_FRACTION = 0.1
LORA_RANK = 16
LORA_DROPOUT = 0.05
RS_LORA_ALPHA = 8
"""Divided by the root of the usual rank it is 2, the scale of the other variants. It does not grow with the rank: that
the scale falls with the rank's root is what keeps the size of the updates (https://arxiv.org/abs/2312.03732)."""
BATCH_SEQUENCES = {Task.CLASSIFICATION: 32, Task.GENERATION: 16}
MAX_LENGTH = {Task.CLASSIFICATION: 512, Task.GENERATION: 2048}
METRICS = {
    Task.CLASSIFICATION: [Metric.MACRO_F1, Metric.ACCURACY, Metric.LOSS],
    Task.GENERATION: [Metric.LOSS, Metric.PERPLEXITY],
}
DPO_METRICS = [Metric.REWARD_ACCURACY, Metric.LOSS]
LEARNING_RATE = {
    # BERT (https://arxiv.org/abs/1810.04805) is tuned with 2e-5 to 5e-5, Stanford Alpaca's LLaMA with 2e-5.
    (MethodType.FULL, Task.CLASSIFICATION): 2e-5,
    (MethodType.FULL, Task.GENERATION): 2e-5,
    # Adapters want about ten times as much, at any rank (https://thinkingmachines.ai/blog/lora/). The LoRA paper
    # (https://arxiv.org/abs/2106.09685, appendix D) tunes RoBERTa-base on GLUE with 4e-4 to 5e-4; QLoRA
    # (https://arxiv.org/abs/2305.14314) tunes LLaMA up to 13B with 2e-4.
    (MethodType.LORA, Task.CLASSIFICATION): 5e-4,
    (MethodType.LORA, Task.GENERATION): 2e-4,
    # A fresh linear layer on fixed features: Adam's own default (https://arxiv.org/abs/1412.6980).
    (MethodType.HEAD, Task.CLASSIFICATION): 1e-3,
}
DPO_LEARNING_RATE = {
    # Zephyr-7B (https://arxiv.org/abs/2310.16944) is tuned with 5e-7 after its supervised training, with 5e-6 in its
    # authors' recipe for LoRA (https://github.com/huggingface/alignment-handbook, recipes/zephyr-7b-beta/dpo).
    MethodType.FULL: 5e-7,
    MethodType.LORA: 5e-6,
}
HEAD_LEARNING_RATE = LEARNING_RATE[MethodType.HEAD, Task.CLASSIFICATION]


def build_plan(resource: Resource, spec: FineTuneJobSpec, stage: Stage, layout: Layout) -> Plan:
    """The plan of one stage. For train, `resource.status` holds the `data` and the `model` that prepare found."""
    plan = Plan(
        stage=stage,
        job=JobReference(namespace=resource.key.namespace, name=resource.key.name, uid=resource.uid),
        workspace=layout.workspace(resource, spec),
        cache=layout.cache(spec) if stage is Stage.PREPARE else None,
        task=spec.task,
        model=PlanModel(
            location=_location(layout, spec.model, stage is Stage.PREPARE),
            adapter=_location(layout, spec.model.adapter, stage is Stage.PREPARE) if spec.model.adapter else None,
            revision=spec.model.revision,
            trust_remote_code=spec.model.trust_remote_code,
            allow_pickle=spec.model.allow_pickle,
        ),
        dataset=_dataset(spec, stage, layout),
        method=spec.method.type,
        lora=_lora(spec),
        last_layers=spec.method.trainable.last_layers if spec.method.trainable else None,
        head_first=_head_first(spec),
        dpo=PlanDpo(beta=spec.method.dpo.beta) if spec.method.dpo else None,
        training=_training(resource, spec),
        evaluation=PlanEvaluation(metrics=_metrics(spec), gate=spec.evaluation.gate),
        device=PlanDevice(
            gpus=sizing.wanted_gpus(spec),
            nodes=spec.resources.nodes,
            allow_cpu_fallback=spec.resources.allow_cpu_fallback,
        ),
        output=PlanOutput(
            format=spec.output.format or _usual_format(spec),
            location=_location(layout, spec.output, stage is Stage.PUBLISH) if spec.output.uri else None,
            workspace_uri=layout.workspace_uri(resource, spec),
        ),
    )
    return _size(plan, resource, spec)


def plan_memory(plan: Plan, resource: Resource, spec: FineTuneJobSpec) -> sizing.MemoryPlan | None:
    """The memory plan of the job; None before prepare has found its facts."""
    data, model = resource.status.data, resource.status.model
    return None if data is None or model is None else sizing.plan_memory(spec, plan.training, model, data)


def has_peers(plan: Plan) -> bool:
    """Whether the stage is training on several nodes, whose pods must find each other."""
    return plan.stage is Stage.TRAIN and plan.device.nodes > 1


def _location(
    layout: Layout, part: ModelSpec | AdapterSource | Source | DecisionFile | OutputSpec, reachable: bool
) -> Location:
    """Only a stage that reads or writes it has it mounted; for the others it is a name."""
    uri = part.uri or ""
    return layout.locate(uri, part.secret_ref) if reachable else Location(uri=uri)


def _dataset(spec: FineTuneJobSpec, stage: Stage, layout: Layout) -> PlanDataset:
    def sources(parts: list[Source] | None, field: str) -> list[PlanSource]:
        return [
            PlanSource(
                location=_location(layout, part, stage is Stage.PREPARE),
                field=f"{field}.sources[{index}]",
                format=part.format,
                columns=part.columns or Columns(),
            )
            for index, part in enumerate(parts or ())
        ]

    def split(part: Split | None, name: str) -> PlanSplit | None:
        if part is None:
            return None
        return PlanSplit(sources=sources(part.sources, f"dataset.{name}"), fraction=part.fraction)

    return PlanDataset(
        sources=sources(spec.dataset.sources, "dataset"),
        validation=split(spec.dataset.validation, "validation") or PlanSplit(fraction=VALIDATION_FRACTION),
        test=split(spec.dataset.test, "test"),
        labels=spec.dataset.labels,
        duplicates=spec.dataset.duplicates,
        labelling=spec.dataset.labelling,
        review=_review(spec, stage, layout),
        clean=spec.dataset.clean,
        personal_data=_personal_data(spec, stage, layout),
        max_rejected=spec.dataset.max_rejected,
    )


def _review(spec: FineTuneJobSpec, stage: Stage, layout: Layout) -> PlanReview | None:
    settings = spec.dataset.review
    if settings is None:
        return None
    decisions = [
        PlanSource(location=_location(layout, file, stage is Stage.PREPARE), field=f"dataset.review.decisions[{index}]")
        for index, file in enumerate(settings.decisions or ())
    ]
    return PlanReview(suspect_weight=settings.suspect_weight, max_rows=settings.max_rows, decisions=decisions)


def _personal_data(spec: FineTuneJobSpec, stage: Stage, layout: Layout) -> PlanPersonalData | None:
    settings = spec.dataset.personal_data
    if settings is None:
        return None
    key = settings.key_secret_ref if stage is Stage.PREPARE else None
    return PlanPersonalData(settings=settings, key_dir=layout.locate("", key).secret_dir)


def _lora(spec: FineTuneJobSpec) -> PlanLora | None:
    if spec.method.type is not MethodType.LORA:
        return None
    lora = spec.method.lora or LoraSpec()
    rank = lora.rank or LORA_RANK
    return PlanLora(
        variant=lora.variant,
        rank=rank,
        alpha=lora.alpha or (RS_LORA_ALPHA if lora.variant is LoraVariant.RS_LORA else 2 * rank),
        dropout=LORA_DROPOUT if lora.dropout is None else lora.dropout,
        target_modules=lora.target_modules,
        quantization=lora.quantization,
    )


def _head_first(spec: FineTuneJobSpec) -> PlanHeadFirst | None:
    wanted = spec.method.head_first
    if wanted is None:
        return None
    rate = wanted.learning_rate or HEAD_LEARNING_RATE
    return PlanHeadFirst(epochs=wanted.epochs, steps=wanted.steps, learning_rate=rate)


def _training(resource: Resource, spec: FineTuneJobSpec) -> PlanTraining:
    """As far as the spec says."""
    wanted, data = spec.training, resource.status.data
    batch = wanted.batch_size
    return PlanTraining(
        epochs=None if wanted.max_steps else wanted.epochs or EPOCHS,
        max_steps=wanted.max_steps,
        learning_rate=wanted.learning_rate or _learning_rate(spec),
        batch_sequences=batch.sequences if batch else BATCH_SEQUENCES[spec.task],
        batch_tokens=batch.tokens if batch else None,
        micro_batch_tokens=wanted.micro_batch_tokens,
        activation_checkpointing=wanted.activation_checkpointing,
        max_length=data.max_length if data else wanted.max_length or MAX_LENGTH[spec.task],
        precision=wanted.precision or _precision_found(resource),
        seed=wanted.seed,
        schedule=wanted.schedule,
        warmup_ratio=wanted.warmup_ratio,
        weight_decay=wanted.weight_decay,
        max_grad_norm=wanted.max_grad_norm,
        checkpoint_steps=wanted.checkpoint_steps,
        evaluation_steps=wanted.evaluation_steps,
        early_stopping=PlanEarlyStopping(
            patience=wanted.early_stopping.patience,
            minimum_improvement=wanted.early_stopping.minimum_improvement,
        )
        if wanted.early_stopping
        else None,
        compile=wanted.compile,
    )


def _learning_rate(spec: FineTuneJobSpec) -> float:
    return DPO_LEARNING_RATE[spec.method.type] if spec.method.dpo else LEARNING_RATE[spec.method.type, spec.task]


def _precision_found(resource: Resource) -> Precision | None:
    """What the device of the training took; for the model card."""
    resolved = resource.status.resolved
    return Precision(resolved.precision) if resolved and resource.status.result and resolved.precision else None


def _size(plan: Plan, resource: Resource, spec: FineTuneJobSpec) -> Plan:
    """The plan with what depends on model and data, if prepare has found them; the user's own values stay."""
    data, memory, training = resource.status.data, plan_memory(plan, resource, spec), plan.training
    if data is None or memory is None:
        return plan
    run = sizing.run_length(data, training.batch_sequences, training.batch_tokens, training.epochs, training.max_steps)
    chosen = {
        "checkpoint_steps": run.checkpoint_steps,
        "evaluation_steps": run.evaluation_steps,
        "micro_batch_tokens": memory.micro_batch_tokens,
        "activation_checkpointing": memory.activation_checkpointing,
    }
    left_open = {name: value for name, value in chosen.items() if getattr(training, name) is None}
    measured = resource.status.memory.peak_bytes if resource.status.memory else None
    device = {
        "gpus": memory.gpus,
        "compact_heap": memory.compact_heap,
        "estimated_memory_bytes": memory.memory.total,
        "peak_memory_bytes": measured,
    }
    return plan.model_copy(
        update={
            "training": training.model_copy(update=left_open),
            "device": plan.device.model_copy(update=device),
        }
    )


def _metrics(spec: FineTuneJobSpec) -> list[Metric]:
    """The gate's metric comes last if nobody asked for it: what decides is reported."""
    usual = DPO_METRICS if spec.method.dpo else METRICS[spec.task]
    metrics, gate = spec.evaluation.metrics or usual, spec.evaluation.gate
    return metrics if gate is None or gate.metric in metrics else [*metrics, gate.metric]


def _usual_format(spec: FineTuneJobSpec) -> OutputFormat:
    return OutputFormat.ADAPTER if spec.method.type is MethodType.LORA else OutputFormat.MERGED
