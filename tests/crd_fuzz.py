"""FineTuneJobs drawn from the schema of crds/finetunejobs.yaml: a new field is drawn without a change here.

A job that was merely drawn breaks nearly always some rule between two fields, so most begin as an example of
`tests.specs`; values of theirs are then drawn anew. `jobs` are as the schema wants them, `broken_jobs` are not.
"""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.specs import VALID, Manifest

CRD = Path(__file__).parents[1] / "crds" / "finetunejobs.yaml"
Node = dict[str, Any]
"""A part of the schema."""

INJECTIONS = [
    "$(id)", "`id`", "$(FINETUNE_NODE_RANK)", '"; rm -rf / #', "'; DROP TABLE rows; --", "| tee /etc/passwd", "&& id", "a b\tc",
    "{{ .Values }}", "{{7*7}}", "{0.__class__}", "%s%n%(x)s", "${HOME}", "<b>", "</script><script>alert(1)</script>", '" onload="alert(1)', "&lt;",
    'x"} 1\nfinetune_operator_leader{a="b', "\\", "line\nbreak", "line\r\nbreak", "../..", "/etc/passwd", "..", "~", "-rf", "--plan=/x", "#", "@",
    "\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "\u202edcba\u202c", "\u200b", "\ufeff", "\x00", "\x7f", "é", "e\u0301", "ß", "İ", "🙂", "👩‍👩‍👧",
    "日本語", "\U0010ffff", "\ufffe", "[bold]x[/bold]", "[link=file:///x]y[/link]", "- item", "a: b", "null", "yes", "1e3", "0x1", "*alias", "!!python/object",
]  # fmt: skip
"""What a shell, a template, a page, a terminal, a log, Prometheus or YAML would take for more than text."""

URIS = ["hf://owner/name", "hf://gpt2", "s3://bucket/a/b", "gs://bucket/a", "az://container/a", "https://host/a?b=c", "pvc://claim/a",
        "configmap://rows/train.jsonl", "file://rows.csv"]  # fmt: skip
PATTERN_PARTS = ["a", "é", ".", "^", "$", "|", "*", "+", "?", "{2}", "{1001}", "(", "(?:", "(?i)", "(?P<n>", "(?=", ")", "[a-z]", "[^\\s]", "[", "]", "\\b", "\\d",
                 "\\p{L}", "\\pN", "\\p{Greek}", "\\1", "\\Qa\\E", "\\x{10FFFF}", "\\C", "\\z", "\\"]  # fmt: skip
KEYS = ["cpu", "memory", "example.com/thing", "a", "positive", "1"]

CHARACTERS = st.characters(codec="utf-8")
"""All but lone surrogates, which JSON in UTF-8 cannot hold."""


@cache
def schema() -> Node:
    """Of the whole resource."""
    crd = yaml.safe_load(CRD.read_text())
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


# --- values that the schema allows


def fitting(node: Node, name: str = "") -> SearchStrategy[Any]:
    """Values that this part of the schema allows. `name` is the field's: some have rules for what their text says."""
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "x-kubernetes-int-or-string" in node:
        return _matching(node["pattern"], node["maxLength"]) | st.integers(0, 2**40)
    return _BY_TYPE[node["type"]](node, name)


def _text(node: Node, name: str) -> SearchStrategy[str]:
    if "pattern" in node:
        return _matching(node["pattern"], node["maxLength"])
    least, most = node.get("minLength", 0), node.get("maxLength", 2**12)
    free = st.text(CHARACTERS, min_size=least, max_size=min(most, 20))
    hostile = st.tuples(st.sampled_from(INJECTIONS), free).map("".join)
    longest = CHARACTERS.map(lambda character: character * most)
    texts: list[SearchStrategy[str]] = [free, hostile, hostile, longest]
    if name == "uri":
        texts = [st.sampled_from(URIS)] * 6 + [
            st.sampled_from(URIS).flatmap(lambda uri: hostile.map(lambda end: uri + end)),
            free,
        ]
    elif name in ("pattern", "dropLines"):
        texts += [st.lists(st.sampled_from(PATTERN_PARTS), min_size=1, max_size=6).map("".join)] * 3
    return st.one_of(texts).filter(lambda text: least <= len(text) <= most)


@cache
def _matching(pattern: str, most: int) -> SearchStrategy[str]:
    """Texts of a pattern. In Python `$` also matches before a line break at the end, in RE2 it does not."""
    expression = re.compile(re.sub(r"\$$", r"\\Z", pattern))
    drawn = st.from_regex(expression).map(lambda text: text[:most])
    longest = st.sampled_from([c * most for c in "a1A"])
    return (drawn | drawn | longest).filter(lambda text: expression.search(text) is not None)


def _whole(node: Node, name: str) -> SearchStrategy[int]:
    low, high = node.get("minimum", -(2**63)), node.get("maximum", 2**63 - 1)
    return st.sampled_from([low, high]) | st.integers(low, min(high, low + 100)) | st.integers(low, high)


def _number(node: Node, name: str) -> SearchStrategy[float]:
    low, high = node.get("minimum", -1e9), node.get("maximum", 1e9)
    open_ends = {"exclude_min": node.get("exclusiveMinimum", False), "exclude_max": node.get("exclusiveMaximum", False)}
    usual = st.floats(low, min(high, low + 1), allow_subnormal=False, **open_ends)
    return usual | st.floats(low, high, allow_subnormal=False, **open_ends)


def _list(node: Node, name: str) -> SearchStrategy[list[Any]]:
    least, unique = node.get("minItems", 0), node.get("x-kubernetes-list-type") == "set"
    items = fitting(node["items"], name)
    return st.lists(items, min_size=least, max_size=min(node.get("maxItems", 100), least + 2), unique=unique)


def _object(node: Node, name: str) -> SearchStrategy[Manifest]:
    values = node.get("additionalProperties")
    return st.dictionaries(_keys(), fitting(values), max_size=3) if values else _fields(node)


def _keys() -> SearchStrategy[str]:
    return st.sampled_from(KEYS) | st.sampled_from(INJECTIONS) | st.text(CHARACTERS, max_size=8)


@st.composite
def _fields(draw: DrawFn, node: Node) -> Manifest:
    """What is required, and at most three fields more."""
    properties, required = node.get("properties", {}), node.get("required", [])
    optional = sorted(set(properties) - set(required))
    chosen = draw(st.lists(st.sampled_from(optional), max_size=3, unique=True)) if optional else []
    return {name: draw(fitting(properties[name], name)) for name in [*required, *chosen]}


_BY_TYPE: dict[str, Callable[[Node, str], SearchStrategy[Any]]] = {
    "string": _text,
    "integer": _whole,
    "number": _number,
    "boolean": lambda node, name: st.booleans(),
    "array": _list,
    "object": _object,
}


# --- values that it does not allow, or that nobody expects

WRONG_TYPES: list[Any] = [
    None, True, 0, -1, 1.5, 2**63, -(2**63) - 1, 2**64, 1e308, "", "text", "1", [], [None], ["a"], {}, {"a": "b"}, {"": None}, [[]], [{}],
]  # fmt: skip


def _broken(node: Node, value: Any, name: str) -> SearchStrategy[Any]:
    """`value` with something done to it that the schema forbids, most of the time."""
    ways: list[SearchStrategy[Any]] = [
        st.sampled_from(WRONG_TYPES),
        st.sampled_from(INJECTIONS) | st.text(CHARACTERS, max_size=8),
    ]
    if isinstance(value, dict):
        unknown = st.dictionaries(_keys(), st.sampled_from(WRONG_TYPES), min_size=1, max_size=1)
        many = st.sampled_from([17, 33, 513, 5000]).map(lambda count: {f"key-{i}": "x" * 32 for i in range(count)})
        ways += [(unknown | many).map(lambda more: value | more)]
    if isinstance(value, dict) and value:
        ways += [st.sampled_from(sorted(value)).map(lambda lost: {key: value[key] for key in value if key != lost})] * 2
    if isinstance(value, list):
        too_many = (value or [{}]) * (node.get("maxItems", 100) + 1)
        ways += [st.sampled_from([too_many, [*value, None], value + value[:1]])]
    if isinstance(value, str):
        too_long = value + "x" * (node.get("maxLength", 0) + 1 - len(value))
        endings = [value + end for end in ("\n", "\r", "\x00", " ", "\x85", "\u2028")]
        ways += [st.sampled_from([too_long, *endings])]
    if "minimum" in node:
        ends = [node["minimum"], node.get("maximum", 2**63 - 1)]
        ways += [st.sampled_from([*ends, ends[0] - 1, ends[1] + 1])] * 2
    return st.one_of(ways)


# --- somewhere in a job

Change = Callable[[Node, Any, str], SearchStrategy[Any]]


@st.composite
def _changed(draw: DrawFn, node: Node, value: Any, change: Change, name: str = "") -> Any:
    """`value` with one change somewhere within: down a field that is there or could be, an item, a key."""
    properties = node.get("properties")
    if properties and isinstance(value, dict) and (not name or draw(st.integers(0, 9))):
        field = draw(st.sampled_from(sorted(properties)))
        there = field in value
        new = _changed(properties[field], value[field], change, field) if there else fitting(properties[field], field)
        return {**value, field: draw(new)}
    if "items" in node and isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(_changed(node["items"], value[place], change, name)), *value[place + 1 :]]
    if "additionalProperties" in node and isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: draw(_changed(node["additionalProperties"], value[key], change))}
    return draw(change(node, value, name))


NAMES = st.sampled_from(["a", "a" * 50, "a-1", "x" + "-" * 48 + "y", "train", "true", "null"])
BAD_NAMES = st.sampled_from([*INJECTIONS, "a" * 51, "1", "-a", "a-", "A", "a.b", "", "a" * 254])
EXAMPLES = [case.manifest for case in VALID if "as much" not in case.name and "as many" not in case.name]


@st.composite
def jobs(draw: DrawFn) -> Manifest:
    """FineTuneJobs that the schema allows; rules between fields may be against them."""
    job = copy.deepcopy(draw(st.sampled_from(EXAMPLES)))
    spec = schema()["properties"]["spec"]
    if draw(st.integers(0, 19)) == 0:
        job["spec"] = draw(fitting(spec))
    for _ in range(draw(st.integers(0, 4))):
        job["spec"] = draw(_changed(spec, job["spec"], lambda node, value, name: fitting(node, name)))
    notes = st.dictionaries(st.sampled_from(["a", "example.com/b"]), st.sampled_from(INJECTIONS))
    job["metadata"] = {"name": draw(NAMES), "annotations": draw(notes)}
    return job


@st.composite
def broken_jobs(draw: DrawFn) -> Manifest:
    """FineTuneJobs with one or a few things in them that the schema forbids, most of the time."""
    job = draw(jobs())
    if draw(st.integers(0, 9)) == 0:
        job["metadata"]["name"] = draw(BAD_NAMES)
    for _ in range(draw(st.integers(1, 2))):
        job["spec"] = draw(_changed(schema()["properties"]["spec"], job["spec"], _broken))
    if draw(st.integers(0, 19)) == 0:
        job[draw(st.sampled_from(["metadata", "spec", "more"]))] = draw(st.sampled_from(WRONG_TYPES))
    return job
