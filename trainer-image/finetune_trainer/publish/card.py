"""README.md: the model card, made from the plan and the reports. It quotes no row of the dataset."""

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from finetune_api.plan import Plan, PlanDevice, PlanEarlyStopping, PlanHeadFirst
from finetune_api.report import DataReport, Evaluation, EvaluationReport, LabellingReport, ReviewReport
from finetune_api.spec import MethodType, Metric, OutputFormat, Task
from finetune_api.status import ModelStatus, decimal
from finetune_api.text import visible
from huggingface_hub import ModelCardData

from finetune_trainer.publish.export import CONFIG_FOLDER, foundation_name
from finetune_trainer.publish.sums import SUMS, TAG
from finetune_trainer.storage import display_uri

HUB_METRICS = {
    Metric.ACCURACY: "accuracy",
    Metric.MACRO_F1: "f1",
    Metric.WEIGHTED_F1: "f1",
    Metric.PERPLEXITY: "perplexity",
}
"""Names that the Hugging Face hub knows; it has none for the loss."""

PACKAGES = ("finetune-operator", "torch", "transformers", "peft", "tokenizers", "safetensors")
MAX_CONFUSION = 32
"""Classes up to which the card shows the confusion matrix; evaluation.json always has it."""

TEXT_CLASSIFICATION, TEXT_GENERATION = "text-classification", "text-generation"


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the weights."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def model_card(
    plan: Plan,
    data: DataReport,
    evaluation: EvaluationReport,
    *,
    model: ModelStatus,
    best_step: int,
    dtype: torch.dtype,
    versions: dict[str, str],
) -> str:
    """The card as Markdown with Hugging Face's metadata; the same input gives the same text.

    `model` is the foundation model, `dtype` the type that the published weights are stored in.
    """
    sections = [
        f"# {plan.job.name}",
        _summary(plan, model),
        "## How to load it",
        _loading(plan, model.revision),
        f"`sha256sum -c {SUMS}` tells whether all files are here and unharmed.",
        "## Scores",
        *_scores(plan, evaluation, dtype),
        "## Data",
        *_data(data),
        "## Training",
        _table(("Setting", "Value"), _settings(plan, data, best_step)),
        *_memory(plan.device),
        "## Software",
        _table(("Package", "Version"), versions.items()),
    ]
    return f"---\n{_metadata(plan)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(plan: Plan) -> str:
    on_hub = plan.model.location.uri.startswith("hf://")
    adapter = plan.output.format is OutputFormat.ADAPTER
    card = ModelCardData(
        base_model=foundation_name(plan) if on_hub else None,  # the hub refuses what is not one of its models
        library_name="peft" if adapter else "transformers",
        pipeline_tag=TEXT_CLASSIFICATION if plan.task is Task.CLASSIFICATION else TEXT_GENERATION,
        metrics=list(dict.fromkeys(HUB_METRICS[metric] for metric in plan.evaluation.metrics if metric in HUB_METRICS)),
        tags=[TAG, *(["lora"] if plan.method is MethodType.LORA else []), *(["dpo"] if plan.dpo else [])],
    )
    return str(card.to_yaml()).strip()


def _summary(plan: Plan, model: ModelStatus) -> str:
    what = "An adapter for" if plan.output.format is OutputFormat.ADAPTER else "A complete model, tuned from"
    revision = f" at revision {_code(model.revision)}" if model.revision else ""
    task = "text classification" if plan.task is Task.CLASSIFICATION else "text generation"
    return (
        f"{what} {_code(foundation_name(plan))}{revision} ({_text(model.architecture)}, {model.parameters:,} "
        f"parameters), for {task}. Tuned with {_method(plan)} by the FineTuneJob {_code(plan.job.namespace)}/"
        f"{_code(plan.job.name)}."
    )


def _loading(plan: Plan, revision: str | None) -> str:
    adapter = plan.output.format is OutputFormat.ADAPTER
    trusted = ", trust_remote_code=True" if plan.model.trust_remote_code else ""
    kind = "AutoModelForSequenceClassification" if plan.task is Task.CLASSIFICATION else "AutoModelForCausalLM"
    lines = ['folder = "path/to/this/folder"']
    if adapter:
        on_hub = plan.model.location.uri.startswith("hf://")
        foundation = foundation_name(plan) if on_hub else "path/to/the/foundation/model"
        options = f", revision={_python(revision)}" if on_hub and revision else ""
        config = "AutoConfig, " if plan.task is Task.CLASSIFICATION else ""
        lines = ["from peft import PeftModel", f"from transformers import {config}{kind}, AutoTokenizer", "", *lines]
        if plan.task is Task.CLASSIFICATION:
            lines.append(f'config = AutoConfig.from_pretrained(folder, subfolder="{CONFIG_FOLDER}"{trusted})')
            options += ", config=config"
        lines += [
            f"foundation = {kind}.from_pretrained({_python(foundation)}{options}{trusted})",
            "model = PeftModel.from_pretrained(foundation, folder).eval()",
        ]
    else:
        lines = [f"from transformers import {kind}, AutoTokenizer", "", *lines]
        lines.append(f"model = {kind}.from_pretrained(folder{trusted}).eval()")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(folder{trusted})")
    code = "\n".join(lines)
    return f"```python\n{code}\n```"


def _scores(plan: Plan, evaluation: EvaluationReport, dtype: torch.dtype) -> list[str]:
    tuned, baseline = evaluation.tuned, evaluation.baseline
    rows = [(name, decimal(value), decimal(baseline.metrics.get(name)) or "–") for name, value in tuned.metrics.items()]
    parts = [
        f"On the {evaluation.split} split ({evaluation.rows:,} rows).",
        _table(("Metric", "Tuned", f"Baseline ({baseline.name})"), rows),
    ]
    if dtype is not torch.float32:
        parts.append(
            f"The weights are stored as {str(dtype).removeprefix('torch.')}, as the foundation model's are. The scores "
            "are those of the tuned weights before they were rounded to that; the rounded ones may score slightly "
            "differently."
        )
    if plan.dpo is not None:
        parts.append(
            "The reward of an answer is beta times the gain of its log-likelihood over the foundation model's (or the "
            "start adapter's). rewardAccuracy is the share of pairs whose better answer has the higher reward, "
            "rewardMargin by how much on average."
        )
    if plan.lora and plan.lora.quantization:
        parts.append(
            f"The adapter was trained and scored beside foundation weights in {plan.lora.quantization.value}; beside "
            "the full weights, or merged into them, it may score slightly differently."
        )
    if tuned.classes:
        classes = (
            (c.label, decimal(c.precision), decimal(c.recall), decimal(c.f1), f"{c.support:,}") for c in tuned.classes
        )
        parts.append(_table(("Class", "Precision", "Recall", "F1", "Rows"), classes))
        parts.append(_confusion(tuned))
    if evaluation.gate is not None:
        outcome = "passed" if evaluation.gate.passed else "not passed"
        parts.append(f"Gate {outcome}: {_text(evaluation.gate.message)}")
    return [part for part in parts if part]


def _confusion(tuned: Evaluation) -> str:
    if not tuned.classes or not tuned.confusion:
        return ""
    if len(tuned.classes) > MAX_CONFUSION:
        return f"The confusion matrix of the {len(tuned.classes)} classes is in `evaluation.json`."
    labels = [scores.label for scores in tuned.classes]
    rows = ((label, *counts) for label, counts in zip(labels, tuned.confusion, strict=True))
    return "Confusion matrix (rows: true class, columns: predicted class):\n\n" + _table(("", *labels), rows)


def _data(data: DataReport) -> list[str]:
    summary = data.summary
    splits = {"train": summary.train_rows, "validation": summary.validation_rows, "test": summary.test_rows}
    sources = (
        (s.field, _code(s.uri), s.format, f"{s.rows_read:,}", f"{s.rows_rejected:,}", _code(s.sha256))
        for s in data.sources
    )
    parts = [
        f"Fingerprint of the rows, the tokenizer and the settings: {_code(summary.fingerprint)}. "
        f"{summary.rows_read:,} rows read, {summary.rows_kept:,} kept, {summary.rows_rejected:,} rejected; "
        f"{summary.tokens:,} training tokens; {summary.truncated_rows:,} rows cut at {summary.max_length:,} tokens.",
        _table(("Source", "URI", "Format", "Rows", "Rejected", "SHA-256"), sources),
        _table(("Split", "Rows"), ((split, f"{rows:,}") for split, rows in splits.items() if rows)),
    ]
    if data.labels:
        labels = list(dict.fromkeys(label for counts in data.labels.values() for label in counts))
        rows = ((label, *(f"{counts.get(label, 0):,}" for counts in data.labels.values())) for label in labels)
        parts.append(_table(("Label", *data.labels), rows))
    if data.labelling:
        parts.extend(_labelling(data.labelling))
    if data.review:
        parts.append(_review(data.review))
    if data.rejections:
        parts.append(_table(("Rejected because", "Rows"), sorted(data.rejections.items())))
    return parts


def _labelling(labelling: LabellingReport) -> list[str]:
    """What a reader of the scores must know of the labels."""
    weak = ", ".join(f"{rows:,} of {split}" for split, rows in (labelling.weak_rows or {}).items() if rows)
    odd = labelling.conflicts.rows if labelling.conflicts else 0
    return [
        *([f"Rows whose label was given by rules and not by people: {weak}."] if weak else []),
        *([f"{odd:,} rows have a text that stands there with another label, too."] if odd else []),
    ]


def _review(review: ReviewReport) -> str:
    weight = 1.0 if review.suspect_weight is None else review.suspect_weight
    counted = f"count {weight:g} in the loss" if weight < 1 else "count like others"
    decided = review.decisions
    people = f" People corrected {decided.corrected:,} labels and dropped {decided.dropped:,} rows." if decided else ""
    return f"Training rows whose label is probably wrong: {review.suspicious_rows:,}; they {counted}.{people}"


def _settings(plan: Plan, data: DataReport, best_step: int) -> list[tuple[str, Any]]:
    training = plan.training
    batch = f"{training.batch_sequences} sequences" if training.batch_sequences else f"{training.batch_tokens} tokens"
    targets = plan.lora and (", ".join(plan.lora.target_modules or ()) or "all linear layers of the transformer blocks")
    settings = {
        "method": _method(plan),
        "started from the adapter": plan.model.adapter and _code(display_uri(plan.model.adapter)),
        "trained layers": plan.last_layers and f"the last {plan.last_layers}, the final norm and the head",
        "head alone first": plan.head_first and _head_first(plan.head_first),
        "LoRA dropout": plan.lora and plan.lora.dropout,
        "LoRA target modules": targets,
        "quantization while training": plan.lora and plan.lora.quantization and plan.lora.quantization.value,
        "preference loss": plan.dpo and f"DPO, beta {plan.dpo.beta:g}",
        "epochs": training.epochs,
        "maximum steps": training.max_steps,
        "published step": best_step,
        "learning rate": training.learning_rate,
        "schedule": training.schedule.value,
        "warm-up ratio": training.warmup_ratio,
        "batch size": batch,
        "micro-batch tokens": training.micro_batch_tokens,
        "activation checkpointing": training.activation_checkpointing and "on",
        "longest row in tokens": data.summary.max_length,
        "precision": training.precision and training.precision.value,
        "weight decay": training.weight_decay,
        "gradient clipping norm": training.max_grad_norm,
        "steps between evaluations": training.evaluation_steps,
        "early stopping": training.early_stopping and _patience(training.early_stopping),
        "seed": training.seed,
        "GPUs": plan.device.gpus * plan.device.nodes,
    }
    return [(name, value) for name, value in settings.items() if value is not None]


def _memory(device: PlanDevice) -> list[str]:
    peak, estimate = device.peak_memory_bytes, device.estimated_memory_bytes
    if peak is None:
        return []
    expected = f"; {estimate / 2**30:.2f} GiB were expected" if estimate else ""
    return [f"Training held at most {peak / 2**30:.2f} GiB{expected}."]


def _head_first(first: PlanHeadFirst) -> str:
    length = f"{first.epochs:g} epochs" if first.epochs else f"{first.steps} steps"
    return f"{length}, learning rate {first.learning_rate:g}"


def _patience(settings: PlanEarlyStopping) -> str:
    return f"patience {settings.patience}, minimum improvement {settings.minimum_improvement:g}"


def _method(plan: Plan) -> str:
    lora = plan.lora
    method = plan.method.value if lora is None else f"{lora.variant.value} (rank {lora.rank}, alpha {lora.alpha})"
    return f"{method} on preference pairs (DPO)" if plan.dpo else method


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _python(text: str) -> str:
    """A name as a literal of Python's, so that it stays a name."""
    return json.dumps(text, ensure_ascii=False)


class _Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _cell(value: Any) -> str:
    return value if isinstance(value, _Markdown) else _text(str(value))


def _text(text: str) -> str:
    """Foreign text (a label, a message) as one line that Markdown shows as it is."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~&" else c for c in visible(line))


def _code(text: str) -> _Markdown:
    """A name in code style; a `|` would end the cell of a table and a backtick the code."""
    return _Markdown("`" + visible(" ".join(text.split())).replace("`", "'").replace("|", "\\|") + "`")
