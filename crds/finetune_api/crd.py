"""Generates the CustomResourceDefinition from the pydantic models: `python -m finetune_api.crd > crds/finetunejobs.yaml`.

The result is a structural schema (https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/):
references inlined, no unknown fields preserved, every field described.
"""

import json
import sys
from functools import cache
from typing import Any

import yaml

from finetune_api.constants import GROUP, KIND, PLURAL, VERSION
from finetune_api.v1alpha1 import FineTuneJob

Schema = dict[str, Any]

COLUMNS = [
    ("Phase", "string", ".status.phase", "Where the job stands.", 0),
    ("Progress", "integer", ".status.progress.percentage", "Share of the job that is done, in percent.", 0),
    ("Metric", "string", ".status.metric", "Loss while training, the first score at the end.", 0),
    ("ETA", "string", ".status.progress.eta", "Time to the end of the current stage.", 0),
    ("Model", "string", ".spec.model.uri", "Foundation model.", 1),
    ("Method", "string", ".status.resolved.method", "Which weights are trained.", 1),
    ("Attempt", "integer", ".status.attempt", "Which try of the current stage this is.", 1),
    ("GPUs", "integer", ".status.resolved.gpus", "GPUs per node.", 1),
    ("Message", "string", ".status.message", "Where the job stands, in a sentence.", 1),
    ("Age", "date", ".metadata.creationTimestamp", "Time since creation.", 0),
]


def custom_resource_definition() -> Schema:
    """The CRD as a dict, ready for YAML."""
    schema = FineTuneJob.model_json_schema(by_alias=True)
    schema["properties"]["metadata"] = {"type": "object", "properties": {"name": {"type": "string"}}}  # for the rule's path
    for key in ("apiVersion", "kind"):  # the API server's own
        del schema["properties"][key]["default"], schema["properties"][key]["const"]
    root = _structural(schema, schema["$defs"])
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, "description": text} | ({"priority": 1} if wide else {})
                        for name, kind, path, text, wide in COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }


@cache
def resource_schema() -> Schema:
    """The schema of a FineTuneJob as the API server has it. Not to be changed."""
    schema: Schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def _structural(node: Schema, definitions: Schema) -> Schema:
    """One JSON-Schema node of pydantic as a node of Kubernetes' structural OpenAPI v3.0."""
    node = dict(node)
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            inner = definitions[node.pop("$ref").rsplit("/", 1)[-1]]
        else:
            (inner,) = (c for c in node.pop("anyOf") if c.get("type") != "null")  # the models say only "X or unset"
        node = {**inner, **node}
    values = node.pop("additionalProperties", False)
    if values:
        node["additionalProperties"] = _structural(values, definitions)
    if "items" in node:
        node["items"] = _structural(node["items"], definitions)
    if "properties" in node:
        node["properties"] = {name: _structural(child, definitions) for name, child in node["properties"].items()}
    return _keywords(node)


def _keywords(node: Schema) -> Schema:
    """The node with the keywords that OpenAPI v3.0 and Kubernetes know."""
    for key in ("title", "$defs", "propertyNames"):
        node.pop(key, None)
    default = node.get("default", ...)
    if default is None:
        del node["default"]
    elif default not in (..., {}):
        node["description"] += f" Default: {default if isinstance(default, str) else json.dumps(default)}."  # `kubectl explain` does not show it
    if "const" in node:
        node["enum"] = [node.pop("const")]
    for bound, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node and not isinstance(node[bound], bool):
            node[limit] = node[bound]
            node[bound] = True
    return {key: node.pop(key) for key in ("description", "type") if key in node} | node


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def main() -> None:
    """Prints the CRD as YAML."""
    sys.stdout.write("# Generated from crds/finetune_api by `make crds`; do not edit.\n")
    yaml.dump(custom_resource_definition(), sys.stdout, _Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    main()
