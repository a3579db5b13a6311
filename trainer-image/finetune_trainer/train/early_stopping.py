"""When a run ends before its last step: a pure function of the scores on validation."""

from finetune_api.plan import PlanEarlyStopping
from finetune_api.spec import Metric
from finetune_api.status import decimal

from finetune_trainer.evaluate.metrics import better
from finetune_trainer.train.checkpoint import Improvement


def judge(last: Improvement | None, step: int, score: float, metric: Metric, minimum_improvement: float) -> Improvement:
    """The state after the evaluation of `step`, whose deciding metric was `score`.

    It is an improvement if it is better than the last one by at least `minimum_improvement`, in the metric's own
    unit; gains that are too small one by one count when they have added up.
    """
    if last is not None and not (better(metric, score, last.score) and abs(score - last.score) >= minimum_improvement):
        return last.model_copy(update={"evaluations_since": last.evaluations_since + 1})
    return Improvement(step=step, score=score)


def is_over(settings: PlanEarlyStopping | None, last: Improvement | None) -> bool:
    """Whether patience has run out."""
    return settings is not None and last is not None and last.evaluations_since >= settings.patience


def explain(settings: PlanEarlyStopping, last: Improvement, metric: Metric, step: int, total_steps: int) -> str:
    """Where and why the run ended, in a sentence."""
    least = settings.minimum_improvement
    more = f" by {decimal(least)}" if least else ""
    times = f"{last.evaluations_since} evaluations" if last.evaluations_since > 1 else "an evaluation"
    return (
        f"stopped early after step {step} of {total_steps}: in {times} {metric.value} was not better{more} "
        f"than the {decimal(last.score)} of step {last.step}"
    )
