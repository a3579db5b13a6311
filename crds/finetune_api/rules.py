"""Checks a manifest without an API server, by the rules that the API server would use: types, bounds and CEL.

Needs cel-python, which the operator's extra brings; the trainer has no use for it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import celpy
from pydantic import ValidationError

from finetune_api.base import Document, Rule
from finetune_api.spec import FineTuneJobSpec
from finetune_api.v1alpha1 import FineTuneJob

M = TypeVar("M", bound=Document)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a manifest."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidManifestError(ValueError):
    """The manifest breaks the schema or a rule; `findings` names every place."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("; ".join(map(str, findings)))
        self.findings = findings


def parse_job(manifest: dict[str, Any]) -> FineTuneJob:
    """A manifest as the API server would accept it, except rules that hold only in a cluster.

    Raises InvalidManifestError with every finding.
    """
    job = _parse(FineTuneJob, {key: value for key, value in manifest.items() if key != "status"}, "")
    findings = list(_broken_rules(job, ""))
    if findings:
        raise InvalidManifestError(findings)
    return job


def parse_spec(spec: dict[str, Any]) -> FineTuneJobSpec:
    """A spec that an API server has already accepted. Raises InvalidManifestError if its CRD was not ours."""
    return _parse(FineTuneJobSpec, spec, "spec")


def _parse(model: type[M], document: dict[str, Any], path: str) -> M:
    try:
        return model.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise InvalidManifestError([_finding(e, path) for e in error.errors(include_url=False)]) from None


def _finding(error: Any, path: str) -> Finding:
    field = path
    for part in error["loc"]:
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
    if error["type"] == "extra_forbidden":
        return Finding(field, "unknown field; see `kubectl explain ftj --recursive` for those that exist")
    if error["type"] == "missing":
        return Finding(field, "is required")
    found = json.dumps(error["input"], default=str, ensure_ascii=False)
    return Finding(field, f"{error['msg'][0].lower()}{error['msg'][1:]}, found {found[:80]}")


def _broken_rules(document: Document, path: str) -> Iterator[Finding]:
    data = celpy.json_to_cel(document.to_dict())
    for rule in document.rules:
        if not rule.cluster_only and not _holds(rule, data):
            yield Finding(".".join(part for part in (path, rule.field) if part), rule.message)
    for name, field in type(document).model_fields.items():
        value = getattr(document, name)
        child = f"{path}.{field.alias}" if path else str(field.alias)
        if isinstance(value, Document):
            yield from _broken_rules(value, child)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Document):
                    yield from _broken_rules(item, f"{child}[{index}]")


def _holds(rule: Rule, data: Any) -> bool:
    environment = celpy.Environment()
    return bool(environment.program(environment.compile(rule.rule)).evaluate({"self": data}))
