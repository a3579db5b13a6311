"""A section for a part of the report that has none of its own, made from the names and descriptions of its fields."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_api.base import Document
from markupsafe import Markup

from finetune_trainer.data.page.charts import bucket, histogram
from finetune_trainer.data.page.elements import (
    MOST_ROWS,
    Cell,
    Number,
    bar,
    count,
    facts,
    fill,
    join,
    section,
    share,
    table,
    words,
)


def document_section(title: str, document: Document, note: str = "", limit: int | None = None) -> Markup:
    """`limit`: longest row in tokens, shown in histograms."""
    return section(title, *_document(document, limit), note=note)


def title_of(field: str) -> str:
    """'rows_dropped' -> 'Rows dropped'"""
    return field.replace("_", " ").capitalize()


def _document(document: Document, limit: int | None) -> Iterator[Markup]:
    """Single values first, then tables, then documents within it."""
    values = {name: getattr(document, name) for name in type(document).model_fields}
    simple = [(title_of(name), _simple(name, value)) for name, value in values.items() if _is_simple(value)]
    if simple:
        yield facts(simple)
    for name, value in values.items():
        if isinstance(value, (Mapping, Sequence)) and not isinstance(value, str) and value:
            yield from _collection(title_of(name), value)
        elif isinstance(value, Document):
            yield fill("<h3>{}</h3>", title_of(name))
            yield from _histogram(value, limit) or _document(value, limit)


def _collection(title: str, value: Mapping[str, Any] | Sequence[Any]) -> Iterator[Markup]:
    entries = list(value.items() if isinstance(value, Mapping) else enumerate(value, start=1))
    others = len(entries) - MOST_ROWS
    note = f"And {count(others)} more, in data.json." if others > 0 else ""
    first = entries[0][1]
    if isinstance(first, Document):
        names = [name for name in type(first).model_fields if any(_is_simple(getattr(e, name)) for _, e in entries)]
        rows = [
            [str(key), *(_simple(name, getattr(entry, name)) for name in names)] for key, entry in entries[:MOST_ROWS]
        ]
        yield table(title, ["", *map(title_of, names)], rows, note)
    elif all(isinstance(entry, int) for _, entry in entries):
        longest = max(entry for _, entry in entries)
        rows = [[str(key), entry, bar(entry, longest)] for key, entry in entries[:MOST_ROWS]]
        yield table(title, ["", "Number", ""], rows, note)
    else:
        items = [fill("<li>{}</li>", words(str(entry))) for _, entry in entries[:MOST_ROWS]]
        yield fill("<h3>{}</h3><ul>{}</ul>", title, join(items))


def _histogram(document: Document, limit: int | None) -> list[Markup]:
    """If it has the form of one: edges, and rows between them."""
    match document.to_dict():
        case {"edges": [_, *_] as edges, "rows": [_, *_] as rows} if len(edges) == len(rows) + 1:
            most = max(range(len(rows)), key=rows.__getitem__)
            label = f"Histogram of tokens per row; the most rows have {bucket(edges, most)} tokens"
            return [histogram(edges, rows, label, "tokens", limit)]
    return []


def _is_simple(value: object) -> bool:
    return isinstance(value, (str, int, float, bool))


def _simple(name: str, value: object) -> Cell:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return value
        case float() if "share" in name or name in ("accuracy", "packed", "padded", "fixed"):
            return Number(share(round(value * 10_000), 10_000))
        case float():
            return Number(f"{value:,.4g}")
        case None:
            return Number("–")
    return str(value)
