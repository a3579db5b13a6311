"""What a page is made of: numbers for people, text that cannot act, tables, bars."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from finetune_api.text import visible
from markupsafe import Markup, escape

MOST_ROWS = 30
"""Of a table that could have any number of them."""


class Number(NamedTuple):
    """A cell whose text stands to the right."""

    text: str


Cell = str | int | Number | Markup
"""Text from the data is a str; an int is shown with its thousands apart."""


def fill(template: str, *values: object, **named: object) -> Markup:
    """The template, which must be a literal, with the values escaped and made visible unless they are Markup."""
    shown = {name: _shown(value) for name, value in named.items()}
    return Markup(template).format(*map(_shown, values), **shown)


def _shown(value: object) -> Markup:
    return value if isinstance(value, Markup) else escape(visible(str(value)))


def join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def words(value: str) -> Markup:
    """Text from the data, in its own direction."""
    return fill("<bdi>{}</bdi>", value)


def count(number: int) -> str:
    """12,345"""
    return f"{number:,}"


def compact(number: int) -> str:
    """In running text: 3.2 million."""
    for size, name in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return count(number)


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """'1 row', '2,000 rows'."""
    return f"{compact(number)} {singular if number == 1 else plural or singular + 's'}"


def share(part: int, whole: int) -> str:
    """Percent; only all is 100 % and only nothing is 0 %."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def section(title: str, *body: Markup, note: str = "") -> Markup:
    name = "".join(c if c.isalnum() else "-" for c in title.lower())
    intro = fill('<p class="note">{}</p>', note) if note else Markup("")
    return fill('<section aria-labelledby="{0}"><h2 id="{0}">{1}</h2>{2}{3}</section>', name, title, intro, join(body))


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> Markup:
    """The first cell of a row is its heading. A column is set to the right if the first row has a number there."""
    numeric = [isinstance(cell, (int, Number)) for cell in rows[0]] if rows else [False] * len(columns)
    head = join(
        [
            fill('<th scope="col"{}>{}</th>', Markup(' class="number"') if right else Markup(""), column)
            for column, right in zip(columns, numeric, strict=True)
        ]
    )
    body = join([fill("<tr>{}</tr>", join([_cell(cell, n == 0) for n, cell in enumerate(row)])) for row in rows])
    foot = fill('<p class="note">{}</p>', note) if note else Markup("")
    return fill(
        '<div class="scroll"><table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>{}',
        caption,
        head,
        body,
        foot,
    )


def _cell(cell: Cell, heading: bool) -> Markup:
    right = Markup(' class="number"') if isinstance(cell, (int, Number)) else Markup("")
    match cell:
        case Markup():
            inner = cell
        case Number():
            inner = escape(cell.text)
        case int():
            inner = escape(count(cell))
        case _:
            inner = words(cell)
    return fill('<th scope="row"{}>{}</th>' if heading else "<td{}>{}</td>", right, inner)


def bar(value: float, longest: float, hue: int = 1) -> Markup:
    """A drawing of a number that stands beside it, so there is nothing to read aloud."""
    width = 100 * value / longest if longest else 0
    width = max(width, 0.7) if value else 0  # what is there is seen
    return fill(
        '<svg class="bar hue{}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="10"/><rect class="fill" width="{}" height="10"/></svg>',
        hue,
        f"{width:.2f}",
    )


def bars(caption: str, name: str, counts: Mapping[str, int], whole: int, *, unit: str = "Rows", hue: int = 1) -> Markup:
    """A table of counts, the largest first, each with its share of `whole` and a bar."""
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    shown, others = ranked[:MOST_ROWS], ranked[MOST_ROWS:]
    longest = max(counts.values(), default=0)
    rows: list[list[Cell]] = [
        [key, value, Number(share(value, whole)), bar(value, longest, hue)] for key, value in shown
    ]
    note = f"And {count(len(others))} more with {count(sum(n for _, n in others))} in all." if others else ""
    return table(caption, [name, unit, "Share", ""], rows, note)


def facts(pairs: Sequence[tuple[str, Cell]]) -> Markup:
    """Names and values."""
    items = [fill("<div><dt>{}</dt><dd>{}</dd></div>", name, _value(value)) for name, value in pairs]
    return fill('<dl class="facts">{}</dl>', join(items))


def tiles(pairs: Sequence[tuple[str, str, str]]) -> Markup:
    """The few largest numbers: name, number, what it is of."""
    items = [
        fill("<div><dt>{}</dt><dd><strong>{}</strong><span>{}</span></dd></div>", name, number, remark)
        for name, number, remark in pairs
    ]
    return fill('<dl class="tiles">{}</dl>', join(items))


def _value(value: Cell) -> Markup:
    match value:
        case Markup():
            return value
        case Number():
            return escape(value.text)
        case int():
            return escape(count(value))
        case _:
            return words(value)
