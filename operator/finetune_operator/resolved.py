"""`status.resolved`: the settings in force, in the words of the status. Pure."""

from finetune_api.plan import Plan, PlanDevice, PlanEarlyStopping, PlanHeadFirst
from finetune_api.progress import Progress, TrainResult
from finetune_api.status import ResolvedStatus, decimal


def resolved_status(plan: Plan, progress: Progress | None, train: TrainResult | None) -> ResolvedStatus:
    """The settings in force; what only the device decides comes from the running or the finished training."""
    training, found = plan.training, train or progress
    precision = (found and found.precision) or training.precision
    batch = f"{training.batch_sequences} sequences" if training.batch_sequences else f"{training.batch_tokens} tokens"
    return ResolvedStatus(
        method=_method(plan),
        head_first=_describe_head_first(plan.head_first) if plan.head_first else None,
        epochs=decimal(training.epochs),
        max_steps=training.max_steps,
        learning_rate=decimal(training.learning_rate) or "",
        schedule=training.schedule,
        batch_size=batch,
        micro_batch_tokens=(found and found.micro_batch_tokens) or training.micro_batch_tokens,
        batching=found.batching[:128] if found and found.batching else None,
        activation_checkpointing=training.activation_checkpointing,
        gpus=plan.device.gpus if plan.device.estimated_memory_bytes else None,
        max_length=training.max_length,
        precision=precision[:16] if precision else None,
        device=_describe_device(plan.device, found.device if found else None),
        trainable_parameters=found.trainable_parameters if found else None,
        checkpoint_steps=training.checkpoint_steps,
        evaluation_steps=training.evaluation_steps,
        early_stopping=_describe_patience(training.early_stopping) if training.early_stopping else None,
        output=plan.output.format,
        metrics=[metric.value for metric in plan.evaluation.metrics],
    )


def _method(plan: Plan) -> str:
    method: str = plan.method
    if plan.lora:
        quantization = f" {plan.lora.quantization}" if plan.lora.quantization else ""
        method = f"{plan.lora.variant} r={plan.lora.rank} alpha={plan.lora.alpha}{quantization}"
    elif plan.last_layers is not None:
        method = f"{plan.method} lastLayers={plan.last_layers}"
    return f"{method}, DPO beta={decimal(plan.dpo.beta)}" if plan.dpo else method


def _describe_device(device: PlanDevice, name: str | None) -> str | None:
    """'NVIDIA H100', '4 x NVIDIA H100', '2 nodes x 4 x NVIDIA H100', '2 nodes x cpu'; without a name '4 GPUs'."""
    parts = [f"{device.nodes} nodes"] if device.nodes > 1 else []
    if device.gpus > 1:
        parts.append(f"{device.gpus}" if name else f"{device.gpus} GPUs")
    return " x ".join([*parts, *filter(None, [name])])[:128] or None


def _describe_head_first(first: PlanHeadFirst) -> str:
    length = f"{decimal(first.epochs)} epochs" if first.epochs else f"{first.steps} steps"
    return f"{length}, learning rate {decimal(first.learning_rate)}"


def _describe_patience(settings: PlanEarlyStopping) -> str:
    return f"patience {settings.patience}, minimum improvement {decimal(settings.minimum_improvement)}"
