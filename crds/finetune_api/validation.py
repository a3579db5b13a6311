"""What `finetune validate -o json` prints. Names of fields and values of enums stay what they are."""

from pydantic import Field

from finetune_api.base import Document
from finetune_api.report import DataFinding, DataReport


class ValidationFinding(DataFinding):
    """One thing that is wrong, or worth a look, with its place in the manifest: `field` begins with spec or metadata."""

    line: int | None = Field(None, description="Line of the manifest.")


class Validation(Document):
    manifest: str = Field(description="The file.")
    job: str | None = Field(None, description="metadata.name; unset if the file holds no FineTuneJob.")
    valid: bool = Field(description="Whether there is no finding of level Error.")
    findings: list[ValidationFinding] = Field(description="Errors, then warnings, each in the order of the manifest.")
    data: DataReport | None = Field(None, description="As in report/data.json; unset if the data was not looked at.")
