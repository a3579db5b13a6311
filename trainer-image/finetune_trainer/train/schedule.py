"""The learning rate as a pure function of the step."""

import math

from finetune_api.spec import Schedule


def learning_rate(step: int, total_steps: int, peak: float, warmup_ratio: float, schedule: Schedule) -> float:
    """The rate of optimizer step `step` (from 0).

    It rises linearly over `warmup_ratio` of the steps, then falls towards 0, which the step after the last one
    would have (Cosine: half a cosine wave, as in SGDR, arXiv:1608.03983, without restarts), or stays.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule is Schedule.CONSTANT:
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 - done if schedule is Schedule.LINEAR else 0.5 * (1 + math.cos(math.pi * done)))
