"""What the contestants showed, their ratios, and the table for people."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OURS, DEFAULT, BEST = "ours", "TRL default", "TRL best"
MIB = 2**20


@dataclass
class Figures:
    """What one training showed."""

    steps: int
    seconds: float
    cpu_seconds: float
    """Of all threads: with one thread, what the rate would be made of on a machine that nobody else uses."""
    tokens: float
    """Without padding, over all epochs."""
    supervised_tokens: float
    peak_memory_bytes: int
    held_out_loss: float | None = None

    @property
    def rate(self) -> float:
        """Tokens per second, without padding."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu_seconds

    @property
    def supervised_rate(self) -> float:
        return self.supervised_tokens / self.seconds


def ratios(rounds: list[dict[str, Figures]], rival: str) -> dict[str, list[float]]:
    """Ours over the rival's, round by round: rates, and memory (less is better)."""
    pairs = [(each[OURS], each[rival]) for each in rounds]
    return {
        "tokens/s": [a.rate / b.rate for a, b in pairs],
        "supervised tokens/s": [a.supervised_rate / b.supervised_rate for a, b in pairs],
        "tokens per CPU second": [a.cpu_rate / b.cpu_rate for a, b in pairs],
        "peak memory": [a.peak_memory_bytes / b.peak_memory_bytes for a, b in pairs],
    }


def table(report: dict[str, Any], rounds: list[dict[str, Figures]]) -> Iterator[str]:
    """For people, in Markdown."""
    setup = report["setup"]
    yield f"\n{setup['model']}; {setup['data']}; {setup['precision']} on {setup['device']}; {setup['software']}"
    yield f"TRL best is: {report['trl_best']}; no checkpointing."
    yield f"Held-out loss before training: {report['untuned_held_out_loss']:.4f}. Medians of {len(rounds)} rounds:\n"
    yield (
        "| | tokens/s | supervised tokens/s | tokens per CPU second | peak memory, MiB | held-out loss | steps "
        "| tokens per step |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name in (OURS, DEFAULT, BEST):
        all_figures = [each[name] for each in rounds]
        tokens = statistics.median(figures.rate for figures in all_figures)
        supervised = statistics.median(figures.supervised_rate for figures in all_figures)
        cpu = statistics.median(figures.cpu_rate for figures in all_figures)
        memory = statistics.median(figures.peak_memory_bytes for figures in all_figures) / MIB
        loss = statistics.median(figures.held_out_loss or 0.0 for figures in all_figures)
        steps = all_figures[0].steps
        per_step = all_figures[0].tokens / steps
        rates = f"{tokens:.0f} | {supervised:.0f} | {cpu:.0f}"
        yield f"| {name} | {rates} | {memory:.0f} | {loss:.4f} | {steps} | {per_step:.0f} |"
    yield "\n| ours / rival, per round | min | median | max |\n|---|---:|---:|---:|"
    for rival, found in report["ratios"].items():
        for what, values in found.items():
            spread = " | ".join(f"{value:.2f}" for value in (min(values), statistics.median(values), max(values)))
            yield f"| {what} / {rival} | {spread} |"
    if report["profile"]:
        yield f"\nWhere our time goes ({setup['profile_steps']} steps under torch.profiler):\n"
        yield "| cause | share |\n|---|---:|"
        for cause, share in report["profile"]["causes"].items():
            yield f"| {cause} | {share:.1%} |"
        yield "\n| operator (self time) | share | calls |\n|---|---:|---:|"
        for operator in report["profile"]["operators"]:
            yield f"| `{operator['name']}` | {operator['share']:.1%} | {operator['calls']} |"
