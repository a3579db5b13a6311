"""Documents in the workspace's `report/` folder, for people and programs: the evidence behind the status.

- `report/data.json`: `DataReport`, written by prepare; rejected rows stand in `report/quarantine.jsonl`.
- `report/evaluation.json`: `EvaluationReport`, written by train.
"""

from pydantic import Field

from finetune_api.base import Document
from finetune_api.status import DataStatus, GateResult, ModelStatus, Score

DATA_REPORT = "data.json"
QUARANTINE = "quarantine.jsonl"
EVALUATION_REPORT = "evaluation.json"


class FileReport(Document):
    """How a file was read: recognised by its content."""

    kind: str = Field(description="JSONL, JSON, CSV, Text, Parquet, Arrow or ArrowStream.")
    compression: str | None = Field(None, description="gzip, zstd or bz2.")
    encoding: str | None = Field(None, description="Python's name of it. One that is not UTF-8 and has no byte order mark is an informed guess.")
    delimiter: str | None = Field(None, description="Between the fields of a CSV file.")


class SourceReport(Document):
    """What was found in one source."""

    field: str = Field(description="Where it stands in the spec, for example dataset.sources[0].")
    uri: str
    sha256: str = Field(description="Hash of the file's bytes.")
    format: str
    file: FileReport
    rows_read: int
    rows_rejected: int


class LengthReport(Document):
    """Tokens per training row, before truncation."""

    mean: float
    p50: int
    p90: int
    p99: int
    longest: int


class CleaningSample(Document):
    """Around the first change, or the beginning of a row that was dropped. Redacted: a letter is x, X, ø or Ø (beyond ASCII), a digit 0;
    other characters beyond ASCII are shown as their code point.
    """

    before: str
    after: str | None = Field(None, description="Unset: the row was dropped.")


class CleaningStep(Document):
    """What one setting of dataset.clean did, to all splits."""

    rows_changed: int = 0
    rows_dropped: int = 0
    samples: list[CleaningSample] = Field(default_factory=list, description="The first few.")


class CleaningReport(Document):
    steps: dict[str, CleaningStep] = Field(description="By the name of the setting in dataset.clean.")
    languages: dict[str, int] | None = Field(None, description="Rows by language, before the filter; 'unknown' could not be told. With dataset.clean.languages only.")


class PersonalDataReport(Document):
    action: str
    rows: int = Field(description="Rows in which something was found.")
    found: dict[str, int] = Field(description="Values by kind, or name of a pattern of dataset.personalData.")


class RuleReport(Document):
    """One of dataset.labelling.rules, on the rows of all splits; all but `accuracy` are rows."""

    votes: int = Field(description="On which it votes: its coverage.")
    overlaps: int = Field(description="Of those: on which another rule votes, too.")
    conflicts: int = Field(description="Of those: on which another rule votes for another label.")
    judged: int = Field(description="On which it votes and that have a label of their own.")
    right: int = Field(description="Of those: that have the label it votes for.")
    accuracy: float | None = Field(None, description="right / judged; unset if nothing could be judged.")


class ConflictReport(Document):
    """The same text with different labels, duplicates that are left out included."""

    groups: int = Field(description="Texts with several labels.")
    rows: int = Field(description="Rows with such a text.")
    held_out_rows: int = Field(description="Of those: rows of validation and test. They are kept.")
    rows_dropped: int = Field(description="Of those: training rows that dataset.labelling.conflicts leaves out.")


class BalanceReport(Document):
    """How evenly the labels share the training rows."""

    majority_share: float = Field(description="Share of the commonest label: the accuracy of always answering it.")
    imbalance_ratio: float = Field(description="Rows of the commonest label for each row of the rarest.")
    note: str | None = Field(None, description="What follows from it, where it is extreme.")


class LabellingReport(Document):
    aliases: dict[str, int] | None = Field(None, description="Rows by alias of dataset.labelling.")
    weak_rows: dict[str, int] | None = Field(None, description="Split -> rows whose label is of dataset.labelling.rules. On test they judge how well the model learned the rules.")
    rule_rows: int | None = Field(None, description="Rows that the rules looked at.")
    by_rule: dict[str, RuleReport] | None = Field(None, description="By the name of the rule.")
    balance: BalanceReport | None = None
    conflicts: ConflictReport | None = None


class DataReport(Document):
    """Written also when the data is refused; `model` and `lengths` are unset if that was before they were known."""

    summary: DataStatus
    reused: bool = Field(False, description="Prepared by an earlier job, or an earlier run of this one, from the same files, settings and tokenizer.")
    model: ModelStatus | None = None
    sources: list[SourceReport]
    ignored_files: list[str] = Field(default_factory=list, description="Hidden and foreign files of the sources' folders, the first hundred.")
    rejections: dict[str, int] = Field(description="Rejected rows by reason.")
    cleaning: CleaningReport | None = Field(None, description="Set if the spec has dataset.clean.")
    personal_data: PersonalDataReport | None = Field(None, description="Set if the spec has dataset.personalData.")
    labels: dict[str, dict[str, int]] | None = Field(None, description="Split -> label -> rows (Classification).")
    labelling: LabellingReport | None = Field(None, description="Where the labels come from, and what is odd about them (Classification).")
    lengths: LengthReport | None = None


class Quarantined(Document):
    """One line of quarantine.jsonl; the row's text stays in its source."""

    uri: str
    line: int
    reason: str
    detail: str


class ClassScores(Document):
    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Evaluation(Document):
    """Scores of one predictor on one split."""

    name: str = Field(description="'tuned', or the baseline's name.")
    metrics: dict[str, float] = Field(description="All metrics of the task, by their name in the spec.")
    classes: list[ClassScores] | None = Field(None, description="Per class, in the order of the class ids.")
    confusion: list[list[int]] | None = Field(None, description="Rows: true class; columns: predicted class.")


class EvaluationReport(Document):
    split: str
    rows: int
    tuned: Evaluation
    baseline: Evaluation
    scores: list[Score] = Field(description="The metrics that the spec asks for, tuned against baseline.")
    gate: GateResult | None = None
