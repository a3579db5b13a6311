"""evaluation.gate: is the tuned model good enough to be published?"""

from finetune_api.report import Evaluation
from finetune_api.spec import Gate
from finetune_api.status import GateResult


def judge(gate: Gate, tuned: Evaluation, baseline: Evaluation) -> GateResult:
    """Compares; the message holds every number that took part. A score that is not a number never passes."""
    score, reference = tuned.metrics[gate.metric], baseline.metrics[gate.metric]
    gain = reference - score if gate.metric.lower_is_better else score - reference
    checks = []
    if gate.minimum is not None:
        checks.append((score >= gate.minimum, f"is {score:.4g}, at least {gate.minimum:g} is required"))
    if gate.maximum is not None:
        checks.append((score <= gate.maximum, f"is {score:.4g}, at most {gate.maximum:g} is allowed"))
    if gate.minimum_gain is not None:
        compared = f"gains {gain:.4g} over the {baseline.name} ({score:.4g} against {reference:.4g})"
        checks.append((gain >= gate.minimum_gain, f"{compared}, at least {gate.minimum_gain:g} is required"))
    words = [f"{text}: {'passed' if passed else 'not reached'}" for passed, text in checks]
    return GateResult(passed=all(passed for passed, _ in checks), message=f"{gate.metric.value} {'; '.join(words)}")
