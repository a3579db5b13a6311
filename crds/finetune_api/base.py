"""What every document of ours has in common: camelCase keys, no unknown fields, CEL rules beside the fields."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """A CEL rule: enforced by the API server (`crd`) and, with the same text, by `finetune run` (`rules`).

    `field` is the path, relative to the model, that the error points to.
    `cluster_only` marks what does not hold outside a cluster: transition rules and `file://`.
    """

    rule: str
    message: str
    field: str = ""
    cluster_only: bool = False


def _complete(schema: dict[str, Any], model: type["Document"]) -> None:
    """Adds what pydantic leaves out of a schema: CEL rules, and `{}` as the default of blocks.

    With that default the API server fills in a left-out block's own defaults, so rules need not ask whether it is there.
    """
    for field in model.model_fields.values():
        if isinstance(field.default_factory, type) and issubclass(field.default_factory, Document):
            schema["properties"][field.alias]["default"] = {}
    if model.rules:
        schema["x-kubernetes-validations"] = [
            {"rule": r.rule, "message": r.message} | ({"fieldPath": f".{r.field}"} if r.field else {}) for r in model.rules
        ]


class Document(BaseModel):
    """Base of all models: immutable, camelCase in JSON, unknown fields are errors."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, json_schema_extra=_complete
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without unset optional fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_json(self, indent: int | None = None) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=indent)
