"""`FineTuneJob` v1alpha1: the resource as a whole."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import Document, Rule
from finetune_api.constants import API_VERSION, KIND, NAME_LENGTH
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus


class FineTuneJob(Document):
    """A FineTuneJob customises a language model: it prepares data, trains, proves the gain and publishes the result."""

    rules: ClassVar = (
        Rule(f"has(self.metadata.name) && self.metadata.name.size() <= {NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
             f"the name must begin with a letter and have at most {NAME_LENGTH} characters of a-z, 0-9 and '-', because pods and services are named after it",
             "metadata.name"),
    )
    api_version: Annotated[Literal["finetune-operator.io/v1alpha1"], Field(description="Version of this schema.")] = API_VERSION
    kind: Annotated[Literal["FineTuneJob"], Field(description=f"Always {KIND}.")] = KIND
    metadata: dict[str, Any] = Field(default_factory=dict)
    spec: FineTuneJobSpec = Field(description="What to fine-tune, with what, how, and how good it must be.")
    status: FineTuneJobStatus | None = Field(
        # tools that wait (kstatus: Flux, Helm) take an object without a status for one that is up to date
        None, description="What the operator reports.", json_schema_extra={"default": {"observedGeneration": -1}}
    )
