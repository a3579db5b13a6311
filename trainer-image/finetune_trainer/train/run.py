"""The train stage: from the prepared workspace to the best checkpoint and the evidence about it."""

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from finetune_api.base import Document
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Result, TrainResult
from finetune_api.report import EVALUATION_REPORT, Evaluation, EvaluationReport
from finetune_api.spec import BatchSize, MethodType, Metric, Task
from finetune_api.status import Score, decimal
from pydantic import ValidationError

from finetune_trainer.data.store import DataManifest, Rows, open_split, read_manifest
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.evaluate.baselines import START, UNTUNED, majority_class
from finetune_trainer.evaluate.gate import judge
from finetune_trainer.evaluate.metrics import preference as preference_scores
from finetune_trainer.evaluate.predict import Evaluator
from finetune_trainer.launch import local_rank
from finetune_trainer.model.load import build_model, trainable_state
from finetune_trainer.model.quantize import choose_quantization
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import early_stopping, preference
from finetune_trainer.train.batches import BatchPlan
from finetune_trainer.train.checkpoint import Checkpoints, RunState, identify
from finetune_trainer.train.device import Device, cast_frozen, choose_device
from finetune_trainer.train.distributed import World, join
from finetune_trainer.train.features import find_encoder
from finetune_trainer.train.forward import Forward, compile_blocks, prove
from finetune_trainer.train.linear import speed_up
from finetune_trainer.train.loop import Loop, deciding_metric, make_optimizer, non_finite
from finetune_trainer.train.memory import check_checkpointing, checkpoint_activations, return_free_memory
from finetune_trainer.train.micro_batches import Batching
from finetune_trainer.train.reporting import TRAINING_SHARE, Reporter, Silent, TrainingLog
from finetune_trainer.workspace import Workspace, write_file

logger = logging.getLogger(__name__)

TRAINING_LOG = "training.jsonl"
RESULT = "result.json"
BASELINE = "baseline.json"

D = TypeVar("D", bound=Document)


def run(plan: Plan, telemetry: Telemetry) -> Result:
    """Trains from the newest checkpoint on, evaluates the best one against the baseline and judges it.

    A run that is already finished gives its result again. A gate that is not passed is a Failed result, after
    all reports are written. Raises UserError and Interrupted.
    """
    device = choose_device(plan.device, plan.training.precision, local_rank())
    with join(plan, device.torch_device) as world:
        result = _run(plan, telemetry, device, world)
        # the first process has written all by now; the others have nothing to add
        return result if world.is_main else result.model_copy(update={"train": None})


def _run(plan: Plan, telemetry: Telemetry, device: Device, world: World) -> Result:
    workspace = Workspace(Path(plan.workspace))
    manifest = read_manifest(workspace.data)
    digest = hashlib.sha256(f"{manifest.fingerprint} {plan.to_json()}".encode()).hexdigest()
    checkpoints = Checkpoints(workspace.checkpoints, identify(plan, manifest.fingerprint), world)
    finished = world.from_main(lambda: _recall(workspace.checkpoints / RESULT, digest, Result))
    if finished is not None and checkpoints.best() is not None:
        logger.info("This run is already finished")
        telemetry.update(activity="Done", fraction=1.0, step=finished.step, total_steps=finished.step)
        return finished
    result = _Run(
        plan=plan,
        telemetry=telemetry,
        workspace=workspace,
        manifest=manifest,
        device=device,
        checkpoints=checkpoints,
        digest=digest,
        world=world,
    ).result()
    world.from_main(lambda: _remember(workspace.checkpoints / RESULT, digest, result))
    return result


class _Run:
    """The parts of a run that belong together; `result` uses them in their order."""

    def __init__(
        self,
        *,
        plan: Plan,
        telemetry: Telemetry,
        workspace: Workspace,
        manifest: DataManifest,
        device: Device,
        checkpoints: Checkpoints,
        digest: str,
        world: World,
    ) -> None:
        self.plan, self.telemetry, self.workspace, self.manifest = plan, telemetry, workspace, manifest
        self.device, self.checkpoints, self.digest, self.world = device, checkpoints, digest, world
        paired = plan.dpo is not None
        self.train = _rows(workspace, manifest, "train", paired)
        self.validation = _rows(workspace, manifest, "validation", paired)
        has_test = "test" in manifest.splits and manifest.splits["test"].rows > 0
        self.final_split = "test" if has_test else "validation"
        self.final = _rows(workspace, manifest, "test", paired) if has_test else self.validation
        training = plan.training
        size = BatchSize(sequences=training.batch_sequences, tokens=training.batch_tokens)
        self.batches = BatchPlan(self.train.lengths, size, training.seed, training.epochs, training.max_steps)
        self.head_steps = _head_steps(plan, self.batches)

    def result(self) -> Result:
        newest = self.checkpoints.newest()
        forward, evaluator = self._prepare_model()
        if self.plan.dpo is not None:
            self._read_references(forward, evaluator.batching)
        untuned = self._untuned_baseline(forward, evaluator) if self.plan.task is Task.GENERATION else None
        state = self._train(forward, evaluator, newest)
        self.telemetry.update(total_steps=state.step)
        self.checkpoints.load_best(forward.model)
        tuned = evaluator("tuned", forward, self.final, self._on_batch("Final evaluation", TRAINING_SHARE, 1.0))
        if not np.isfinite(tuned.metrics[Metric.LOSS]):
            what = f"loss of the tuned model on the {self.final_split} split is not a finite number"
            raise non_finite(self.plan, what, "the trained model is kept in checkpoints/best")
        return self._conclude(state, tuned, untuned or self._majority_baseline(), forward, evaluator.batching)

    def _prepare_model(self) -> tuple[Forward, Evaluator]:
        self.telemetry.update(
            activity="Loading the model",
            total_steps=self.batches.total_steps,
            precision=self.device.precision.value,
            device=self.device.name,
        )
        if self.device.torch_device.type == "cpu" and self.plan.device.compact_heap:
            return_free_memory()
        quantization = choose_quantization(self.plan, self.device.torch_device, self.device.compute_dtype)
        model = build_model(self.plan, self.workspace, self.manifest.labels, quantization)
        model.config.use_cache = False  # no token is generated here
        cast_frozen(model, self.device.precision)
        self.world.place(model, self.device.torch_device)
        if self.device.torch_device.type == "cpu":
            speed_up(model)
        forward = prove(model, self.plan.task, self.device)
        if self.plan.training.activation_checkpointing:
            check_checkpointing(model, self.plan)
            checkpoint_activations(model)
        batching = Batching(
            task=self.plan.task,
            packed=forward.packs,
            micro_batch_tokens=_micro_batch_tokens(self.plan),
            pad_token_id=model.config.pad_token_id,
            most_padding=self.device.most_padding,
        )
        if self.plan.training.compile and self.device.torch_device.type == "cuda":
            compile_blocks(forward)
            batching.in_buckets = forward.packs
        if self.plan.method is MethodType.HEAD:
            forward = self._encode_once(forward, batching)
        trainable = _count(model)
        self.telemetry.update(trainable_parameters=trainable, batching=forward.batching)
        logger.info(
            "Training %d weights on %s in %s: %d steps on %d rows, %s",
            trainable,
            self.device.name,
            self.device.precision.value,
            self.batches.total_steps,
            len(self.train),
            forward.batching,
        )
        return forward, Evaluator(batching, self.manifest.labels, self.device, self.plan.dpo, self.world)

    def _encode_once(self, forward: Forward, batching: Batching) -> Forward:
        """The frozen encoder's features of all rows, and the way to run the head on them; if it can be run so."""
        encoder = find_encoder(forward, self.device)
        if encoder is None:
            return forward
        for data in {id(data): data for data in (self.train, self.validation, self.final)}.values():
            on_batch = self._on_batch("Encoding the rows with the frozen encoder", 0.0, 0.0)
            encoder.encode(data, batching, self.workspace.root, on_batch)
        return encoder.forward

    def _train(self, forward: Forward, evaluator: Evaluator, newest: Path | None) -> RunState:
        model = forward.model
        if (cut := len(evaluator.batching.cut(self.train, self.batches.rows(0)))) < self.world.size:
            words = "only %d of %d processes have work in the first step: lower training.microBatchTokens (it is %d)"
            logger.warning(words, cut, self.world.size, evaluator.batching.micro_batch_tokens)
        optimizer = make_optimizer(model, self.plan.training.weight_decay)
        state = RunState()
        if newest is not None:
            state = self.checkpoints.load(newest, model, optimizer)
            logger.info("Going on from the checkpoint of step %d", state.step)
            self.telemetry.update(resumed_from_step=state.step, step=state.step)
        log = TrainingLog(self.workspace.report / TRAINING_LOG)
        self.world.from_main(lambda: log.rewind(state.step, state.evaluated_step))
        self.telemetry.update(
            activity="Training",
            fraction=TRAINING_SHARE * (state.step / self.batches.total_steps),
            epoch=self.batches.epoch(state.step),
        )
        return Loop(
            plan=self.plan,
            forward=forward,
            optimizer=optimizer,
            batches=self.batches,
            batching=evaluator.batching,
            train=self.train,
            validation=self.validation,
            evaluator=evaluator,
            device=self.device,
            checkpoints=self.checkpoints,
            telemetry=self.telemetry,
            reporter=(Reporter if self.world.is_main else Silent)(self.telemetry, log, self.batches.total_steps),
            state=state,
            head_steps=self.head_steps,
            world=self.world,
        ).run()

    def _why_early(self, state: RunState) -> str | None:
        settings, total = self.plan.training.early_stopping, self.batches.total_steps
        if settings is None or state.improvement is None or state.step == total:
            return None
        return early_stopping.explain(settings, state.improvement, deciding_metric(self.plan), state.step, total)

    def _untuned_baseline(self, forward: Forward, evaluator: Evaluator) -> Evaluation:
        """Of the model as it was built: fresh adapters add nothing yet. Kept, so that a resume is spared of it."""
        name = START if self.plan.model.adapter else UNTUNED
        if self.plan.dpo is not None:
            return preference_scores(name, np.zeros(len(self.final)))  # it is what gains are measured from
        path = self.workspace.checkpoints / BASELINE
        known = self.world.from_main(lambda: _recall(path, self.digest, Evaluation))
        if known is None:
            found = evaluator(name, forward, self.final, self._on_batch(f"Evaluating the {name}", 0.0, 0.0))
            self.world.from_main(lambda: _remember(path, self.digest, found))
            return found
        return known

    def _read_references(self, forward: Forward, batching: Batching) -> None:
        """What the model says of every pair before its first step. Kept, for after it there is no asking."""
        splits = {"train": self.train, "validation": self.validation, self.final_split: self.final}
        for name, rows in splits.items():
            path = self.workspace.checkpoints / f"reference-{name}.safetensors"
            known = self.world.from_main(partial(preference.recall, path, self.digest))
            if known is None:
                report = self._on_batch(f"Scoring the {name} pairs with the start model", 0.0, 0.0)
                known = preference.start_likelihoods(forward, rows, batching, self.device, report, world=self.world)
                if self.world.is_main:
                    preference.remember(path, self.digest, known)
            rows.reference = known

    def _majority_baseline(self) -> Evaluation:
        return majority_class(_labels(self.train), _labels(self.final), self.manifest.labels or [])

    def _on_batch(self, activity: str, start: float, end: float) -> Callable[[float], None]:
        def report(done: float) -> None:
            if self.world.agree(self.telemetry.stop_requested.is_set()):
                step = self.telemetry.progress.step
                raise Interrupted(f"stopped while: {activity}; the training so far is saved", step)
            self.telemetry.update(activity=activity, fraction=start + (end - start) * done)

        return report

    def _conclude(
        self, state: RunState, tuned: Evaluation, baseline: Evaluation, forward: Forward, batching: Batching
    ) -> Result:
        scores = [
            Score(
                metric=metric.value,
                value=decimal(tuned.metrics[metric]) or "",
                baseline=decimal(baseline.metrics[metric]),
            )
            for metric in self.plan.evaluation.metrics
        ]
        gate = judge(self.plan.evaluation.gate, tuned, baseline) if self.plan.evaluation.gate else None
        report = EvaluationReport(
            split=self.final_split, rows=len(self.final), tuned=tuned, baseline=baseline, scores=scores, gate=gate
        )
        self.world.from_main(lambda: write_file(self.workspace.report / EVALUATION_REPORT, report.to_json(indent=2)))
        best = self.checkpoints.best()
        train = TrainResult(
            steps=state.step,
            stopped_early=self._why_early(state),
            best_step=best.step if best else state.step,
            precision=self.device.precision.value,
            device=self.device.name,
            trainable_parameters=_count(forward.model),
            batching=forward.batching,
            micro_batch_tokens=batching.micro_batch_tokens,
            training_loss=state.training_loss,
            evaluation_loss=state.evaluation_loss,
            tokens_per_second=state.tokens / max(state.seconds, 1e-9),
            samples_per_second=state.rows / max(state.seconds, 1e-9),
            peak_memory_bytes=max(self.world.gather(self.device.peak_memory())),
            split=self.final_split,
            baseline=baseline.name,
            scores=scores,
            gate=gate,
        )
        self.telemetry.update(activity="Done", fraction=1.0, estimated_remaining_seconds=0.0)
        failed = gate is not None and not gate.passed
        return Result(
            stage=Stage.TRAIN,
            outcome=Outcome.FAILED if failed else Outcome.SUCCEEDED,
            reason=Reason.GATE_FAILED if failed else None,
            message=gate.message if gate else "",
            step=state.step,
            train=train,
        )


class _Remembered(Document):
    """What a run found out, and by which run."""

    digest: str
    value: dict[str, object]


def _remember(path: Path, digest: str, value: Document) -> None:
    write_file(path, _Remembered(digest=digest, value=value.to_dict()).to_json())


def _recall(path: Path, digest: str, kind: type[D]) -> D | None:
    """What the same run remembered; None if there is nothing, or it is another run's."""
    try:
        remembered = _Remembered.model_validate_json(path.read_bytes())
        return kind.model_validate(remembered.value) if remembered.digest == digest else None
    except (OSError, ValidationError):
        return None


def _rows(workspace: Workspace, manifest: DataManifest, split: str, paired: bool) -> Rows:
    if split not in manifest.splits or manifest.splits[split].rows == 0:
        raise UserError(
            Reason.DATA_INVALID,
            f"the {split} split has no rows: give more data, or a larger share of it in dataset.{split}",
        )
    return open_split(workspace.data, split, paired)


def _labels(data: Rows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([data.label(row) for row in range(len(data))], np.int64)


def _head_steps(plan: Plan, batches: BatchPlan) -> int:
    """Optimizer steps for the head alone; raises UserError if they leave none for the rest."""
    first = plan.head_first
    if first is None:
        return 0
    steps = first.steps or batches.steps_in(first.epochs or 0.0)
    if steps >= batches.total_steps:
        raise UserError(
            Reason.INVALID_SPEC,
            f"method.headFirst: the head alone would be trained for {steps} of {batches.total_steps} optimizer steps; "
            "lower it, or raise training.epochs or training.maxSteps",
        )
    return steps


def _micro_batch_tokens(plan: Plan) -> int:
    if plan.training.micro_batch_tokens is None:
        raise UserError(Reason.INVALID_SPEC, "the train plan has no training.microBatchTokens")
    return plan.training.micro_batch_tokens


def _count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in trainable_state(model).values())
