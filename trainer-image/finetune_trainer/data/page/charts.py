"""Plots as inline SVG. What they show also stands in a table, or is said in their label."""

from collections.abc import Sequence

from markupsafe import Markup

from finetune_trainer.data.page.elements import compact, count, fill, join

WIDTH, HEIGHT = 800, 220
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 22, 34
"""Room around the plot for its axes, in the units of the view box, which are pixels on a wide screen."""

MOST_MARKS = 12
"""On the horizontal axis."""


def histogram(edges: Sequence[int], rows: Sequence[int], label: str, unit: str, limit: int | None = None) -> Markup:
    """Columns of equal width, bucket i being edges[i] <= value < edges[i + 1]; a dashed line at `limit`."""
    step = (WIDTH - LEFT - RIGHT) / max(len(rows), 1)
    tallest = max(rows, default=0) or 1
    floor = HEIGHT - BOTTOM
    columns = []
    for number, value in enumerate(rows):
        height = (floor - TOP) * value / tallest
        columns.append(
            fill(
                '<rect class="column" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>',
                *_units(LEFT + number * step + 1, floor - height, max(step - 2, 1), height),
                f"{bucket(edges, number)} {unit}: {count(value)} rows",
            )
        )
    every = -(-len(edges) // MOST_MARKS)
    marks = [
        fill(
            '<text x="{}" y="{}" text-anchor="middle">{}</text>',
            *_units(min(LEFT + number * step, WIDTH - RIGHT - 12), floor + 16),
            count(edge),
        )
        for number, edge in enumerate(edges)
        if number % every == 0
    ]
    return fill(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}'
        '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>{}{}'
        '<text x="{}" y="{}" text-anchor="end">{}</text><text x="{}" y="{}" text-anchor="end">0</text>'
        '<text x="{}" y="{}" text-anchor="middle">{}</text></svg>',
        *(WIDTH, HEIGHT, label, join(columns)),
        *(LEFT, WIDTH - RIGHT, floor, floor),
        join(marks),
        _limit(edges, limit, step),
        *(LEFT - 6, TOP + 5, compact(tallest), LEFT - 6, floor),
        *((LEFT + WIDTH - RIGHT) // 2, HEIGHT - 3, unit),
    )


def bucket(edges: Sequence[int], number: int) -> str:
    """'1', '2 to 3'"""
    first, last = edges[number], edges[number + 1] - 1
    return count(first) if first == last else f"{count(first)} to {count(last)}"


def _limit(edges: Sequence[int], limit: int | None, step: float) -> Markup:
    """The line, where it is within the plot: between two edges in proportion."""
    if limit is None or len(edges) < 2 or not edges[0] <= limit < edges[-1]:
        return Markup("")
    inside = max(number for number, edge in enumerate(edges[:-1]) if edge <= limit)
    inner = (limit - edges[inside]) / max(edges[inside + 1] - edges[inside], 1)
    x = LEFT + (inside + inner) * step
    return fill(
        '<line class="limit" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>'
        '<text x="{0}" y="{3}" text-anchor="{4}">longest allowed: {5}</text>',
        *_units(x, TOP, HEIGHT - BOTTOM, TOP - 6),
        "end" if x > WIDTH / 2 else "start",
        count(limit),
    )


def _units(*values: float) -> list[str]:
    return [f"{value:.1f}" for value in values]
