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


class DataReport(Document):
    """Written also when the data is refused; `model`, `lengths` and `tokenization` are unset if that was before they were known."""

    summary: DataStatus
    reused: bool = Field(False, description="Prepared by an earlier job, or an earlier run of this one, from the same files, settings and tokenizer.")
    model: ModelStatus | None = None
    sources: list[SourceReport]
    ignored_files: list[str] = Field(default_factory=list, description="Hidden and foreign files of the sources' folders, the first hundred.")
    rejections: dict[str, int] = Field(description="Rejected rows by reason.")
    cleaning: CleaningReport | None = Field(None, description="Set if the spec has dataset.clean.")
    personal_data: PersonalDataReport | None = Field(None, description="Set if the spec has dataset.personalData.")
    labels: dict[str, dict[str, int]] | None = Field(None, description="Split -> label -> rows (Classification).")
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
