"""What to tell people about a manifest that breaks the schema: what was expected, what was found, and what was probably meant."""

import difflib
import json
import re
from typing import Any

from finetune_api.crd import resource_schema
from finetune_api.kubernetes import NAME

Path = tuple[str | int, ...]
"""Of a field, from the manifest's root: ("spec", "dataset", "sources", 0, "uri")."""

INNER = {
    "model": "uri", "sources": "uri", "validation": "fraction", "test": "fraction", "method": "type",
    "batchSize": "sequences", "gate": "metric",
}  # fmt: skip
"""Block -> the field in it that a lone value in its place most likely is."""

_SHOWN = 80
_OWNER_AND_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def dotted(path: Path) -> str:
    """The path as people write it: spec.dataset.sources[0].uri."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def explain(error: Any, path: Path) -> str:
    """An error of pydantic (`ValidationError.errors()`) at this path, as a sentence without the field."""
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return _unknown(path)
    found = _found(error["input"], path)
    if not found:
        return _expected(error, path)
    return "; ".join(filter(None, (f"{_expected(error, path)}, {found}", _hint(error, path))))


def explain_uri(message: str, path: Path, value: str) -> str:
    """`message` about a URI that has not the form of one, with the value."""
    found = _found(value, path)
    meant = ""
    if path[-2:-1] == ("model",) and _OWNER_AND_NAME.fullmatch(value):
        meant = f"; did you mean hf://{value}?"
    return (f"{found}, " if found else "") + message + meant


def _unknown(path: Path) -> str:
    known = _schema(path[:-1]).get("properties", {})
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    if near:
        return f"unknown field; did you mean {near[0]}?"
    place = ".".join(part for part in ("ftj", *path[:-1]) if isinstance(part, str))
    return f"unknown field; `kubectl explain {place}` tells those that exist"


def _expected(error: Any, path: Path) -> str:
    kind = error["type"]
    if _is_quantity(path) and kind != "string_too_long":
        return "expected a Kubernetes quantity such as 500m or 16Gi"
    if kind == "string_pattern_mismatch" and error["ctx"]["pattern"] == NAME:
        return "expected a name of a-z, 0-9, '-' and '.', with a letter or digit at both ends and beside every '.'"
    if kind == "list_type":
        return "expected a list"
    if kind in ("model_type", "dict_type"):
        return "expected a mapping"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def _hint(error: Any, path: Path) -> str:
    """What was probably meant, empty if there is no telling."""
    kind, value = error["type"], error["input"]
    field = next((part for part in reversed(path) if isinstance(part, str)), "")
    if kind == "string_type" and isinstance(value, bool) and not _is_quantity(path):
        return f"quote it: YAML reads {'yes' if value else 'no'} as {json.dumps(value)}"
    if kind == "string_type" and type(value) in (int, float):
        return "quote it"
    if kind == "model_type" and field in INNER and isinstance(value, str | int | float) and str(value).isprintable():
        return f"write {{{INNER[field]}: {value}}}"
    if kind == "enum" and field == "format" and "sources" in path:
        return "format says what a row looks like; the file type follows from the name"
    return ""


def _found(value: Any, path: Path) -> str:
    """The value as JSON, cut, with nothing in it that a terminal obeys; empty if it could hold a password."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    if "secretRef" in path or ("://" in text and "@" in text):
        return ""
    return "found " + (text if text.isprintable() else json.dumps(value, default=str))[:_SHOWN]


def _is_quantity(path: Path) -> bool:
    return "x-kubernetes-int-or-string" in _schema(path)


def _schema(path: Path) -> dict[str, Any]:
    """The schema's node at this path, empty if it has none."""
    node = resource_schema()
    for part in path:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part) or node.get("additionalProperties", {})
    return node
