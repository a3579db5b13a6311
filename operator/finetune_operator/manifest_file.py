"""A FineTuneJob manifest as a file: read as kubectl reads it, with file and line in every complaint."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from finetune_api.constants import API_VERSION, KIND
from finetune_api.rules import Finding, InvalidManifestError, parse_job
from finetune_api.text import visible
from finetune_api.v1alpha1 import FineTuneJob

FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
PART = re.compile(r"[^.\[\]]+")
"""Of a field's path: spec.dataset.sources[0].uri."""


class Problem(NamedTuple):
    """Something that is wrong in a manifest file, and where."""

    path: Path
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line else f"{self.path}"
        return visible(": ".join(filter(None, (where, self.field, self.message))))


class ManifestFileError(Exception):
    """The file holds no FineTuneJob that could run. `problems`: file, line, field and what is wrong, for people."""

    def __init__(self, *found: Problem) -> None:
        self.found = found
        self.problems = [str(problem) for problem in found]
        super().__init__("\n".join(self.problems))


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: 1e-3 is a number, a date is text, and no key stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_job(path: Path) -> FineTuneJob:
    """The one FineTuneJob in the file, checked by the rules of the API server. Raises ManifestFileError."""
    node, document = _read(path)
    found = {key: document.get(key) for key in ("apiVersion", "kind")}
    if found != {"apiVersion": API_VERSION, "kind": KIND}:
        names = " ".join(str(value or "(none)") for value in found.values())
        message = f"this is a {names}; expected apiVersion: {API_VERSION}, kind: {KIND}"
        raise ManifestFileError(Problem(path, None, "", message))
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        where = _line(node, "metadata.name")
        raise ManifestFileError(Problem(path, where, "metadata.name", "is required; give the job a name, as text"))
    try:
        return parse_job(document)
    except InvalidManifestError as error:
        raise ManifestFileError(*point_out(path, error.findings)) from None


def point_out(path: Path, findings: Iterable[Finding]) -> list[Problem]:
    """The findings, each with the line of its field, in the order of the file."""
    node, _ = _read(path)
    return sorted(Problem(path, _line(node, found.field), found.field, found.message) for found in findings)


def _read(path: Path) -> tuple[yaml.Node, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ManifestFileError(Problem(path, None, "", "this is not a text file in UTF-8")) from None
    except OSError as error:
        raise ManifestFileError(Problem(path, None, "", error.strerror or "it cannot be read")) from None
    try:
        nodes = [node for node in yaml.compose_all(text, _Loader) if not _is_empty(node)]
        if len(nodes) > 1:
            line = nodes[1].start_mark.line + 1
            raise ManifestFileError(
                Problem(path, line, "", "a second document begins here; give one FineTuneJob a file")
            )
        if not nodes or not isinstance(nodes[0], yaml.MappingNode):
            raise ManifestFileError(Problem(path, None, "", "this is not a Kubernetes manifest"))
        return nodes[0], _Loader("").construct_document(nodes[0])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise ManifestFileError(Problem(path, line, "", f"not valid YAML: {error.problem or error.context}")) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ManifestFileError(Problem(path, None, "", f"not valid YAML: {' '.join(str(error).split())}")) from None


def _is_empty(node: yaml.Node) -> bool:
    """What a lone `---` leaves."""
    return isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")


def _line(node: yaml.Node, field: str) -> int:
    """Line of the field, or of the innermost part of its path that is there."""
    line = node.start_mark.line + 1
    for part in PART.findall(field):
        child: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            child = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value):
            child = (node.value[int(part)],) * 2
        if child is None:
            break
        line, node = child[0].start_mark.line + 1, child[1]
    return line
