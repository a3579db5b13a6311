"""Checks a manifest without an API server, by the rules that the API server would use: types, bounds and CEL.

Needs cel-python and kubernetes, which the operator's extra brings; the trainer has no use for it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import celpy
import re2
from celpy.celtypes import BoolType
from kubernetes.utils.quantity import parse_quantity
from pydantic import ValidationError

from finetune_api.advice import Path, dotted, explain, explain_uri
from finetune_api.base import Document, Rule
from finetune_api.crd import Schema, resource_schema
from finetune_api.spec import FineTuneJobSpec
from finetune_api.uri import URI_FORM
from finetune_api.v1alpha1 import FineTuneJob

M = TypeVar("M", bound=Document)

_QUIET = re2.Options()
_QUIET.log_errors = False  # the rule's message tells


def _matches(text: str, pattern: str) -> BoolType:
    """celpy's own prints to stderr what it thinks of a pattern."""
    try:
        return BoolType(re2.search(pattern, text, options=_QUIET) is not None)
    except re2.error as error:
        raise ValueError("not a pattern") from error


# What Kubernetes adds to CEL, as far as our rules use it (https://kubernetes.io/docs/reference/using-api/cel/).
FUNCTIONS: dict[str, Any] = {
    "matches": _matches,
    "quantity": parse_quantity,
    "isGreaterThan": lambda one, other: BoolType(one > other),
}


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
    job = _parse(FineTuneJob, {key: value for key, value in manifest.items() if key != "status"}, ())
    findings = list(_broken_rules(job, (), lambda rule: not rule.cluster_only))
    if findings:
        raise InvalidManifestError(findings)
    return job


def local_only(job: FineTuneJob) -> list[Finding]:
    """What `finetune run` accepts and a cluster would refuse at creation."""
    return list(_broken_rules(job, (), lambda rule: rule.cluster_only and "oldSelf" not in rule.rule))


def parse_spec(spec: dict[str, Any]) -> FineTuneJobSpec:
    """A spec that an API server has already accepted. Raises InvalidManifestError if its CRD was not ours."""
    return _parse(FineTuneJobSpec, spec, ("spec",))


def _parse(model: type[M], document: dict[str, Any], path: Path) -> M:
    schema = resource_schema()["properties"]["spec"] if path else resource_schema()
    try:
        return model.model_validate_json(json.dumps(_as_sent(document, schema), default=str), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        places = [(e, (*path, *e["loc"])) for e in error.errors(include_url=False)]
        raise InvalidManifestError([Finding(dotted(place), explain(e, place)) for e, place in places]) from None


def _as_sent(value: Any, node: Schema) -> Any:
    """The value as it reaches the API server's checks: kubectl sends 2.0 as 2, what has more than 64 bits is no
    integer, and `key: null` counts as left out, but for a field that `node`, the schema, does not know.
    """
    if isinstance(value, dict):
        fields: Schema = node.get("properties", {})
        others: Schema = node.get("additionalProperties", {})
        return {
            key: _as_sent(inner, fields.get(key, others))
            for key, inner in value.items()
            if inner is not None or (fields and key not in fields)
        }
    if isinstance(value, list):
        return [_as_sent(inner, node.get("items", {})) for inner in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return float(str(value)) if type(value) is int and abs(value) >= 2**63 else value


def _broken_rules(document: Document, path: Path, applies: Callable[[Rule], bool]) -> Iterator[Finding]:
    data = celpy.json_to_cel(document.to_dict())
    for rule in document.rules:
        if applies(rule) and not _holds(rule, data):
            place = (*path, *filter(None, rule.field.split(".")))
            is_form = rule.message == URI_FORM
            message = explain_uri(rule.message, place, data["uri"]) if is_form else rule.message
            yield Finding(dotted(place), message)
    for name, field in type(document).model_fields.items():
        value = getattr(document, name)
        child = (*path, str(field.alias))
        if isinstance(value, Document):
            yield from _broken_rules(value, child, applies)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Document):
                    yield from _broken_rules(item, (*child, index), applies)


def _holds(rule: Rule, data: Any) -> bool:
    try:
        return bool(_program(rule.rule).evaluate({"self": data}))
    except celpy.CELEvalError:  # such as a name that is a number
        return False


@cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule), functions=FUNCTIONS)
