"""The training loop: from a state after some optimizer step to the state after the last one.

Nothing here depends on when it was interrupted: rows, learning rate and dropout of a step follow from its number.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan
from finetune_api.spec import MethodType, Metric, Task

from finetune_trainer.data.store import Rows
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.evaluate.metrics import better
from finetune_trainer.evaluate.predict import Evaluator
from finetune_trainer.model.adapters import head_weights, training_mode
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import early_stopping
from finetune_trainer.train.batches import BatchPlan
from finetune_trainer.train.checkpoint import Best, Checkpoints, Improvement, RunState
from finetune_trainer.train.device import Device
from finetune_trainer.train.distributed import ALONE, World
from finetune_trainer.train.forward import Forward
from finetune_trainer.train.micro_batches import Batching, MicroBatch
from finetune_trainer.train.preference import Preference
from finetune_trainer.train.reporting import Interval, Pace, Reporter
from finetune_trainer.train.schedule import learning_rate

logger = logging.getLogger(__name__)


class Objective(Protocol):
    """What is learned."""

    def losses(self, batch: MicroBatch) -> torch.Tensor:
        """Losses in nats, fp32 [batch.loss_count]."""


@dataclass
class Loop:
    """One run. `state` is where it stands; it changes as `run` goes on."""

    plan: Plan
    forward: Forward
    optimizer: torch.optim.Optimizer
    batches: BatchPlan
    batching: Batching
    train: Rows
    validation: Rows
    evaluator: Evaluator
    device: Device
    checkpoints: Checkpoints
    telemetry: Telemetry
    reporter: Reporter
    state: RunState
    head_steps: int = 0
    """Optimizer steps, from the first one on, in which the head alone is trained."""
    world: World = ALONE
    _saved: RunState | None = field(init=False)
    _interval: Interval = field(init=False)
    _pace: Pace = field(init=False)
    _bad_step: torch.Tensor = field(init=False)
    """First step with a loss or gradient that is not finite, or -1; on the device."""

    def __post_init__(self) -> None:
        self.model = self.forward.model
        dpo = self.plan.dpo
        self._objective: Objective = Preference(self.forward, dpo.beta) if dpo else self.forward
        self._saved = self.state if self.state.step else None
        self._interval = self._new_interval()
        every, total = self.plan.training.evaluation_steps or self.batches.total_steps, self.batches.total_steps
        self._pace = Pace(evaluations=math.ceil(total / every) - self.state.step // every)
        self._bad_step = torch.full((), -1, device=self.device.torch_device)
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._head = head_weights(self.model) if self.head_steps else []
        self._loss_since_evaluation = self._zero() + self.state.loss_sum
        self._step_ended = time.monotonic()

    def run(self) -> RunState:
        """Trains, evaluates, keeps the best and saves until the last step is done, or patience has run out.

        Raises Interrupted after saving if that was asked for, and UserError (NonFiniteLoss).
        """
        while True:
            step = self.state.step
            evaluated = self.state.evaluated_step == step and self.checkpoints.best() is not None
            if self._evaluates_at(step) and not evaluated:
                self._evaluate()
            if self._saves_at(step) and self._saved != self.state:
                self._save()
            if self._is_over():
                return self.state
            self._stop_if_asked()
            self._step()

    def _step(self) -> None:
        training, step = self.plan.training, self.state.step
        head_first = step < self.head_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        training_mode(self.model, head_only=head_first or self.plan.method is MethodType.HEAD)
        loss, counts = self._accumulate(step, self._head if head_first else None)
        norm = self.world.clip(self._trained, training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        bad = ~torch.isfinite(loss + norm) & (self._bad_step < 0)
        self._bad_step = torch.where(bad, step + 1, self._bad_step)
        self._count(loss, counts)
        if self.reporter.due() or step + 1 == self.batches.total_steps:
            self._report()

    def _report(self) -> None:
        self._check_finite()
        step = self.state.step
        self.reporter.steps(
            self._interval,
            step=step,
            epoch=self.batches.epoch(step),
            rate=self._rate(step - 1),
            remaining=self._pace.remaining(self.batches.total_steps - step),
            peak_memory=self.device.peak_memory(),
        )
        self._interval = self._new_interval()

    def _rate(self, step: int) -> float:
        """The learning rate: the steps of the head and those of all weights each have a warm-up and an end."""
        training, first, last, peak = self.plan.training, 0, self.batches.total_steps, self.plan.training.learning_rate
        if self.plan.head_first and step < self.head_steps:
            last, peak = self.head_steps, self.plan.head_first.learning_rate
        else:
            first = self.head_steps
        return learning_rate(step - first, last - first, peak, training.warmup_ratio, training.schedule)

    def _accumulate(self, step: int, only: list[torch.nn.Parameter] | None) -> tuple[torch.Tensor, "Counts"]:
        """The gradients of a step, the sum of its losses as they count, and what it is made of.

        If the GPU has too little memory, in smaller micro-batches: the sum is the same.
        """
        rows, seed = self.batches.rows(step), [self.plan.training.seed, step]
        while True:
            groups = self.batching.cut(self.train, rows)
            share = self.world.share([int(self.train.lengths[group].sum()) for group in groups])
            micro = [self.batching.read(self.train, groups[number]) for number in share.numbers]
            counts = self._total(micro)
            idle = [self.batching.read(self.train, rows[:1])] * (share.idle if self.world.is_sharded else 0)
            part = Part(share.numbers, counts.weight, idle)
            # sharded weights are no leaves of the graph: there `sum_gradients` drops the gradients of the others
            leaves = None if self.world.is_sharded else only
            try:
                loss = accumulate_gradients(
                    self._objective, micro, self.device, seed, self._beat, only=leaves, part=part
                )
            except torch.OutOfMemoryError:
                if self.world.is_sharded:  # the others wait in the middle of a pass
                    raise
                loss = None
            if not self.world.agree(loss is None) and loss is not None:
                return self.world.sum_gradients(self._trained, only, loss), counts
            self.optimizer.zero_grad(set_to_none=True)
            if not self.batching.halve(int(self.train.lengths.max())):
                raise torch.OutOfMemoryError("there is no room for a micro-batch of the longest row")
            torch.cuda.empty_cache()
            self.telemetry.update(micro_batch_tokens=self.batching.micro_batch_tokens)
            logger.warning(
                "The GPU's memory does not hold the micro-batches of step %d: going on with %d tokens in each",
                step + 1, self.batching.micro_batch_tokens,
            )  # fmt: skip

    def _total(self, micro: list[MicroBatch]) -> "Counts":
        """Over all processes."""
        losses, tokens, rows = self.world.total(
            sum(batch.loss_count for batch in micro),
            sum(batch.tokens for batch in micro),
            sum(len(batch.rows) for batch in micro),
        )
        if self.train.weights is None:
            return Counts(losses, tokens, rows)
        return Counts(math.fsum(self.world.gather(math.fsum(batch.loss_weight for batch in micro))), tokens, rows)

    def _count(self, loss: torch.Tensor, counts: "Counts") -> None:
        now = time.monotonic()
        # from step to step: what an accelerator is still busy with counts where it is waited for
        seconds, self._step_ended = now - self._step_ended, now
        self._pace.step(seconds)
        self._loss_since_evaluation += loss
        interval = self._interval
        interval.loss += loss
        interval.targets += counts.weight
        interval.tokens += counts.tokens
        interval.rows += counts.rows
        interval.seconds += seconds
        state = self.state
        self.state = state.model_copy(
            update={
                "step": state.step + 1,
                "loss_targets": state.loss_targets + counts.weight,
                "tokens": state.tokens + counts.tokens,
                "rows": state.rows + counts.rows,
                "seconds": state.seconds + seconds,
            }
        )

    def _evaluate(self) -> None:
        started = time.monotonic()
        self._check_finite()
        if self._interval.rows:
            self._report()  # this may be the last step
        self.telemetry.update(activity="Evaluating")
        result = self.evaluator("tuned", self.forward, self.validation, lambda _done: self._pause())
        step = self.state.step
        if not np.isfinite(result.metrics[Metric.LOSS]):
            raise self._non_finite("loss on validation", step)
        metric = deciding_metric(self.plan)
        best = self.state.best if self.checkpoints.best() else None  # lost weights are the best of nothing
        is_best = best is None or better(metric, result.metrics[metric], best.score)
        if is_best:
            best = Best(step=step, score=result.metrics[metric])
            self.checkpoints.save_best(self.model, best)
        self.reporter.evaluation(step, result.metrics, is_best)
        self._step_ended = time.monotonic()
        self._pace.evaluation(self._step_ended - started)
        self.state = self.state.model_copy(
            update={
                "evaluated_step": step,
                "best": best,
                "improvement": self._improvement(result.metrics[metric]),
                "evaluation_loss": result.metrics[Metric.LOSS],
                "training_loss": self._mean_loss(),
                "loss_targets": 0,
            }
        )
        self._loss_since_evaluation = self._zero()

    def _improvement(self, score: float) -> Improvement | None:
        """With the evaluation that was just done; one that is done again after its weights were lost counts once."""
        settings, step, last = self.plan.training.early_stopping, self.state.step, self.state.improvement
        if settings is None or step <= self.head_steps or step == self.state.evaluated_step:
            return last
        return early_stopping.judge(last, step, score, deciding_metric(self.plan), settings.minimum_improvement)

    def _mean_loss(self) -> float | None:
        """Of the steps since the last evaluation; if there are none, what it was then."""
        targets = self.state.loss_targets
        return float(self._loss_since_evaluation) / targets if targets else self.state.training_loss

    def _beat(self) -> None:
        """Between two micro-batches of a step: the state is still that after the last whole one."""
        if self.world.size == 1:  # several stop together, between two steps
            self._stop_if_asked()
        self.telemetry.beat()

    def _pause(self) -> None:
        """Between two micro-batches of an evaluation."""
        self._stop_if_asked()
        self.telemetry.beat()

    def _save(self) -> None:
        self._check_finite()
        self.telemetry.update(activity="Saving a checkpoint")
        self.state = self.state.model_copy(update={"loss_sum": float(self._loss_since_evaluation)})
        self.checkpoints.save(self.model, self.optimizer, self.state)
        self._saved = self.state
        self._step_ended = time.monotonic()
        self.telemetry.update(activity="Training")

    def _stop_if_asked(self) -> None:
        if not self.world.agree(self.telemetry.stop_requested.is_set()):
            return
        self.optimizer.zero_grad(set_to_none=True)  # of a step that is not whole: its room is needed no more
        step = self.state.step
        if step == 0:
            raise Interrupted("stopped before the first step was done")
        if self._saved != self.state:
            self._save()
        raise Interrupted(f"stopped after step {step} of {self.batches.total_steps}, which is saved", step)

    def _check_finite(self) -> None:
        bad = int(self._bad_step)
        if bad >= 0:
            raise self._non_finite("training loss or its gradient", bad)

    def _non_finite(self, what: str, step: int) -> UserError:
        kept = f"the checkpoint of step {self._saved.step} is kept" if self._saved else "no checkpoint was saved before"
        return non_finite(
            self.plan, f"{what} is not a finite number at step {step} of {self.batches.total_steps}", kept
        )

    def _evaluates_at(self, step: int) -> bool:
        every = self.plan.training.evaluation_steps
        return step == self.batches.total_steps or (every is not None and step > 0 and step % every == 0)

    def _is_over(self) -> bool:
        early = early_stopping.is_over(self.plan.training.early_stopping, self.state.improvement)
        return early or self.state.step == self.batches.total_steps

    def _saves_at(self, step: int) -> bool:
        every = self.plan.training.checkpoint_steps
        return self._is_over() or (every is not None and step > 0 and step % every == 0)

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device.torch_device)

    def _new_interval(self) -> Interval:
        return Interval(self._zero())


class Counts(NamedTuple):
    """What an optimizer step is made of. `weight`: what the sum of its losses is divided by, their number or the sum
    of their weights.
    """

    weight: float
    tokens: int
    rows: int


@dataclass(frozen=True)
class Part:
    """What one of several processes does of an optimizer step."""

    numbers: Sequence[int]
    """The places of its micro-batches among all of the step."""
    weight: float
    """Of the losses of the whole step, see Counts."""
    idle: Sequence[MicroBatch] = ()
    """For passes that count for nothing: the others, who still have work, need this process's part of the weights."""


def accumulate_gradients(
    objective: Objective,
    micro: list[MicroBatch],
    device: Device,
    seed: list[int],
    beat: Callable[[], None] = lambda: None,
    *,
    only: list[torch.nn.Parameter] | None = None,
    part: Part | None = None,
) -> torch.Tensor:
    """Adds the gradients of the weighted mean loss over all micro-batches; returns the sum of the losses as they count.

    The mean is over the whole optimizer step, so it does not matter how the step was cut. Dropout of micro-batch
    i is drawn from (seed, i). `beat` is called before each, and may raise to stop. With `only`, no other weights get
    gradients. `part` says which part of the step these micro-batches are, if they are not all of it. The result is a
    float64 scalar on the device: nothing waits for it here.
    """
    part = part or Part(range(len(micro)), sum(batch.loss_weight for batch in micro))
    weight = part.weight or 1  # where nothing counts, nothing is learned
    total = torch.zeros((), dtype=torch.float64, device=device.torch_device)
    for number, batch in zip(part.numbers, micro, strict=True):
        beat()
        torch.manual_seed(int(np.random.SeedSequence([*seed, number]).generate_state(1, np.uint64)[0]))
        with device.autocast():
            there = batch.to(device.torch_device)
            loss = there.weigh(objective.losses(there)).sum()
        torch.autograd.backward(loss / weight, inputs=only)
        total += loss.detach()
    for batch in part.idle:
        with device.autocast():
            nothing = objective.losses(batch.to(device.torch_device))[:0].sum()
        torch.autograd.backward(nothing)
    return total


def non_finite(plan: Plan, what: str, kept: str) -> UserError:
    """What to do about a loss that is no number."""
    return UserError(
        Reason.NON_FINITE_LOSS,
        f"the {what}: lower training.learningRate (it is {plan.training.learning_rate:g}) or look for broken rows; "
        f"{kept}",
    )


def deciding_metric(plan: Plan) -> Metric:
    """The metric that chooses the best checkpoint: the first one asked for, for Generation the loss."""
    return plan.evaluation.metrics[0] if plan.task is Task.CLASSIFICATION else Metric.LOSS


def make_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on the trained weights; biases and norms (vectors) do not decay. The loop sets the learning rate."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.dim() >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)
