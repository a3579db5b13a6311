"""The CustomResourceDefinition: structural, complete, and the same in every copy."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml
from finetune_api import crd
from finetune_api.v1alpha1 import FineTuneJob
from jsonschema import Draft4Validator

from tests.spec_updates import UPDATES
from tests.specs_against_rules import INVALID

ROOT = Path(__file__).parents[3]
COPIES = [ROOT / "crds" / "finetunejobs.yaml", ROOT / "helm" / "finetune-operator" / "files" / "finetunejobs.yaml"]

DEFINITION = crd.custom_resource_definition()
(VERSION,) = DEFINITION["spec"]["versions"]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]
MODELS = FineTuneJob.model_json_schema()

# https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema
STRUCTURE = {"type", "description", "properties", "items", "additionalProperties", "required", "default"}
BOUNDS = {
    *("enum", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
EXTENSIONS = {
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
}


def nodes(node: dict[str, Any] = SCHEMA, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of the schema with its path; [] is a list's item, {} a map's value."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}" if path else name)
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in node:
            yield from nodes(node[key], path + mark)


def owned(path: str) -> str:
    """The path from the innermost model on, such as Source.uri: what is shown at one place of a model holds at all.

    A list's item is [] or has a number, a map's value is {} or has its key.
    """
    node, owner = MODELS, "FineTuneJob"
    for part in re.findall(r"\[\d*\]|[^.\[\]{}]+|\{\}", path):
        if part.startswith("["):
            node, owner = node["items"], owner + "[]"
        elif part in node.get("properties", {}):
            node, owner = node["properties"][part], f"{owner}.{part}"
        else:
            node, owner = node["additionalProperties"], owner + "{}"
        if node is True:  # metadata
            return path
        node = next(choice for choice in node.get("anyOf", [node]) if choice.get("type") != "null")
        if "$ref" in node:
            owner = node["$ref"].rpartition("/")[2]
            node = MODELS["$defs"][owner]
    return owner


def test_every_copy_is_what_the_models_generate(capsys: pytest.CaptureFixture[str]) -> None:
    crd.main()
    generated = capsys.readouterr().out
    for copy in COPIES:
        assert copy.read_text(encoding="utf-8") == generated, f"{copy} is stale: run `make crds`"
    assert yaml.safe_load(generated) == DEFINITION
    crd.main()
    assert capsys.readouterr().out == generated


def test_the_schema_is_structural() -> None:
    for path, node in nodes():
        assert_structural(path, node)


def assert_structural(path: str, node: dict[str, Any]) -> None:
    assert set(node) <= STRUCTURE | BOUNDS | EXTENSIONS  # no $ref, no anyOf, no unknown fields preserved
    if node.get("x-kubernetes-int-or-string"):
        assert "type" not in node
    else:
        assert node["type"] in ("object", "array", "string", "integer", "number", "boolean")
    assert ("items" in node) == (node.get("type") == "array")
    assert not ("properties" in node and "additionalProperties" in node)
    if node.get("type") == "object" and path:
        assert "properties" in node or "additionalProperties" in node, "an object without fields would lose all of them"
    assert set(node.get("required", ())) <= set(node.get("properties", ()))
    for key in node.get("x-kubernetes-list-map-keys", ()):
        assert key in node["items"]["required"]
    if path == "metadata":
        assert set(node["properties"]) <= {"name", "generateName"}
    if "default" in node:
        assert node["default"] is not None
        Draft4Validator(node).validate(node["default"])


def test_every_field_has_a_description() -> None:
    silent = [
        path
        for path, node in nodes()
        if not path.endswith(("[]", "{}")) and path not in ("metadata", "metadata.name") and not node.get("description")
    ]
    assert silent == []


def test_a_description_tells_the_default() -> None:
    """`kubectl explain` shows no defaults of its own."""
    described = {path: node["description"] for path, node in nodes() if node.get("default", {}) != {}}
    assert described["spec.training.seed"].endswith("Default: 42.")
    assert described["spec.suspend"].endswith("Default: false.")
    assert all("Default: " in text for text in described.values())


def test_every_text_and_list_of_the_spec_is_bounded() -> None:
    """Rules on them cost the API server time, and it refuses definitions whose rules could cost too much."""
    endless = [
        path
        for path, node in nodes(SCHEMA["properties"]["spec"], "spec")
        if (node.get("type") == "string" and not {"maxLength", "enum"} & set(node))
        or (node.get("type") == "array" and "maxItems" not in node)
        or ("additionalProperties" in node and "maxProperties" not in node)
    ]
    assert endless == []


def test_rules_compile_and_point_to_fields() -> None:
    for path, node in nodes():
        for rule in node.get("x-kubernetes-validations", ()):
            celpy.Environment().compile(rule["rule"])
            assert "\n" not in rule["message"]
            target = node
            for part in filter(None, rule.get("fieldPath", "").split(".")):
                assert part in target["properties"], (path, rule)
                target = target["properties"][part]


def test_every_rule_has_an_example_that_breaks_it() -> None:
    told = [(owned(case.field), case.words) for case in INVALID]
    told += [(owned(case.field), "cannot be changed after creation") for case in UPDATES if case.field]
    untold = [
        (field, rule["message"])
        for path, node in nodes()
        for rule in node.get("x-kubernetes-validations", ())
        for field in [f"{path}{rule.get('fieldPath', '')}".removeprefix(".")]
        if not any(owned(field) == shown and words in rule["message"] for shown, words in told)
    ]
    assert untold == []


def test_every_bound_has_an_example_beyond_it() -> None:
    broken = {owned(case.field) for case in INVALID}
    bounded = {path for path, node in nodes(SCHEMA["properties"]["spec"], "spec") if BOUNDS & set(node)}
    assert {owned(path) for path in bounded} - broken == set()


def test_names_and_columns() -> None:
    names = DEFINITION["spec"]["names"]
    assert (names["shortNames"], names["categories"]) == (["ftj"], ["all"])
    assert VERSION["subresources"] == {"status": {}}
    columns = VERSION["additionalPrinterColumns"]
    assert [c["name"] for c in columns if not c.get("priority")] == ["Phase", "Progress", "Metric", "ETA", "Age"]
    paths = {"." + path for path, _ in nodes()} | {".metadata.creationTimestamp"}
    assert {c["jsonPath"] for c in columns} <= paths
