"""Documents in the workspace's `report/` folder, for people and programs: the evidence behind the status.

- `report/data.json`: `DataReport`, written by prepare; rejected rows stand in `report/quarantine.jsonl`. `report/data.html` is the same for people.
- `report/evaluation.json`: `EvaluationReport`, written by train.
"""

from enum import StrEnum

from pydantic import Field

from finetune_api.base import Document
from finetune_api.constants import Reason
from finetune_api.status import DataStatus, GateResult, ModelStatus, Score

DATA_REPORT = "data.json"
DATA_PAGE = "data.html"
QUARANTINE = "quarantine.jsonl"
EVALUATION_REPORT = "evaluation.json"


class FileReport(Document):
    """How a file was read: recognised by its content."""

    kind: str = Field(description="JSONL, JSON, CSV, Text, Parquet, Arrow or ArrowStream.")
    compression: str | None = Field(None, description="gzip, zstd, bz2 or xz.")
    encoding: str | None = Field(None, description="Python's name of it. One that is not UTF-8 and has no byte order mark is an informed guess.")
    delimiter: str | None = Field(None, description="Between the fields of a CSV file.")


class SourceReport(Document):
    """What was found in one source."""

    field: str = Field(description="Where it stands in the spec, for example dataset.sources[0].")
    uri: str
    sha256: str = Field(description="Hash of the file's bytes.")
    format: str = Field(description="What a row looks like: as the spec says, or as it was recognised.")
    columns: dict[str, str] = Field(default_factory=dict, description="Which column stands for which field of the format, as the first row has them.")
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


class LengthHistogram(Document):
    """Tokens per training row, before truncation, in buckets that grow: two for each doubling."""

    edges: list[int] = Field(description="Bucket i holds rows of at least edges[i] and less than edges[i + 1] tokens.")
    rows: list[int] = Field(description="One less than edges.")


class SplitTokens(Document):
    """What is learned from a split, and what was cut."""

    rows: int
    tokens: int
    supervised_tokens: int | None = Field(None, description="Tokens that have a loss (Generation).")
    supervised_share: float | None = None
    truncated_rows: int
    truncated_share: float
    answers_cut: int | None = Field(None, description="Rows of which tokens were cut that would have been learned (Generation).")
    answers_not_learned: int | None = Field(
        None, description="Answers that the chat template writes differently once other turns follow them: learning them so would be learning what is never to be written (Generation)."
    )


class TextTokens(Document):
    """How well the tokenizer fits: of the texts of some training rows, without what a chat template adds."""

    sampled_rows: int = Field(description="Spread evenly over the training rows.")
    tokens_per_word: float = Field(
        description="Fertility. Words are parted by white space; in scripts without it (Chinese, Japanese, Thai, Lao, Burmese, Khmer, Tibetan) every letter counts as one."
    )
    characters_per_token: float
    unknown_share: float | None = Field(None, description="Share of the tokens that stand for what the tokenizer does not know. Unset: it has no such token.")


class PackingReport(Document):
    """Shares of real tokens in random steps of 32 training rows, cut by the functions that the training uses."""

    sampled_rows: int
    packed: float | None = Field(None, description="In sequences of maxLength tokens, into which rows are packed; what is left of one is not padded (Generation).")
    padded: float = Field(description="Where rows of like length are padded to the longest of them, as for Classification and models that cannot be packed.")
    fixed: float = Field(description="If every row were padded to maxLength.")


class TokenizationReport(Document):
    truncation: str = Field(description="What becomes of rows that are too long, in words.")
    splits: dict[str, SplitTokens]
    histogram: LengthHistogram | None = None
    texts: TextTokens | None = None
    packing: PackingReport | None = None


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


class DuplicateReport(Document):
    """Rows that say what an earlier row says, of all splits."""

    similarity: float | None = Field(None, description="From which rows count as nearly the same; unset: that was not looked for.")
    exact_rows: int = Field(description="With the texts, and the answer or label, of an earlier row.")
    near_rows: int | None = Field(None, description="Others that are similar to an earlier row with the same label.")
    rows_dropped: int = Field(description="Of both: left out.")
    held_out_rows: int = Field(description="Rows that are left out since a validation or test source has them, or similar ones.")
    groups: int = Field(description="Sets of rows that are similar or have the same input, by way of others too.")
    largest_group: int = Field(description="Rows of the largest.")
    group_sizes: dict[str, int] = Field(description="How many groups have so many rows.")
    note: str | None = Field(None, description="What to look at, where one group holds much of the data.")


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


class Level(StrEnum):
    ERROR = "Error"
    WARNING = "Warning"


class Remark(StrEnum):
    """Reasons of warnings. The comment says what one can do."""

    ROWS_REJECTED = "RowsRejected"  # no more than dataset.maxRejected allows: look at quarantine.jsonl
    ROWS_TRUNCATED = "RowsTruncated"  # raise training.maxLength, or shorten the rows
    ANSWERS_NOT_LEARNED = "AnswersNotLearned"  # mark the answers in the chat template with {% generation %}, or give each its own row
    ENCODING_GUESSED = "EncodingGuessed"  # look at some rows, or save the file as UTF-8
    PERSONAL_DATA_KEPT = "PersonalDataKept"  # choose another dataset.personalData.action
    SAMPLE_TOO_SMALL = "SampleTooSmall"  # the sample does not show it: read more rows, or all
    MODEL_UNREACHABLE = "ModelUnreachable"  # the tokens were not counted, and the model was not checked
    CLUSTER_ONLY = "ClusterOnly"  # good for `finetune run`, refused by a cluster


class DataFinding(Document):
    """One thing about the data that somebody should know before training."""

    level: Level = Field(description="Error: the job fails. Warning: it goes on.")
    reason: Reason | Remark = Field(description="Why, as a constant for programs.")
    field: str | None = Field(None, description="Where in the spec, for example dataset.sources[0].")
    message: str = Field(description="What was found, for people. It holds no text of the dataset.")
    rows: int | None = Field(None, description="How many rows it is about.")


class SampleReport(Document):
    """Of `finetune validate`."""

    rows_per_source: int | None = Field(None, description="Most rows that were read of each source; unset: all.")
    complete: bool = Field(description="Whether that was all of the data.")


class DataReport(Document):
    """Written also when the data is refused; `model`, `lengths` and `tokenization` are unset if that was before they were known."""

    summary: DataStatus
    findings: list[DataFinding] = Field(default_factory=list, description="Errors, then warnings.")
    sample: SampleReport | None = Field(None, description="Set by `finetune validate`, which reads a sample.")
    reused: bool = Field(False, description="Prepared by an earlier job, or an earlier run of this one, from the same files, settings and tokenizer.")
    model: ModelStatus | None = None
    sources: list[SourceReport]
    ignored_files: list[str] = Field(default_factory=list, description="Hidden and foreign files of the sources' folders, the first hundred.")
    rejections: dict[str, int] = Field(description="Rejected rows by reason.")
    cleaning: CleaningReport | None = Field(None, description="Set if the spec has dataset.clean.")
    personal_data: PersonalDataReport | None = Field(None, description="Set if the spec has dataset.personalData.")
    duplicates: DuplicateReport | None = Field(None, description="Set if the spec has dataset.duplicates.")
    labels: dict[str, dict[str, int]] | None = Field(None, description="Split -> label -> rows (Classification).")
    labelling: LabellingReport | None = Field(None, description="Where the labels come from, and what is odd about them (Classification).")
    lengths: LengthReport | None = None
    tokenization: TokenizationReport | None = None


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
