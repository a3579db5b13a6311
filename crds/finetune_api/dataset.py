"""`spec.dataset`: the data to learn from, and what is done to it before it is learned from."""

from enum import StrEnum
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from finetune_api.base import Document, Rule
from finetune_api.kubernetes import LocalReference
from finetune_api.uri import URI_HELP, Uri, uri_rules

Text = TypeVar("Text", bound=str)
Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class DataFormat(StrEnum):
    MESSAGES = "Messages"
    SHARE_GPT = "ShareGPT"
    PROMPT_COMPLETION = "PromptCompletion"
    ALPACA = "Alpaca"
    QUESTION_CONTEXT_ANSWER = "QuestionContextAnswer"
    TEXT = "Text"
    PREFERENCE = "Preference"
    LABELLED_TEXT = "LabelledText"


def _once(values: list[Text]) -> list[Text]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise PydanticCustomError("duplicate", "'{value}' may be given only once", {"value": value})
    return values


class Columns(Document):
    """Names of the columns where they differ from the usual ones."""

    text: Column | None = Field(None, description="Column with the text (Text, LabelledText). Usual names: text, sentence, headline, content.")
    label: Column | None = Field(None, description="Column with the label (LabelledText). Usual names: label, labels, category, sentiment, class.")
    prompt: Column | None = Field(None, description="Column with the prompt (PromptCompletion, Preference). Usual name: prompt.")
    completion: Column | None = Field(None, description="Column with the completion (PromptCompletion). Usual names: completion, response.")
    messages: Column | None = Field(None, description="Column with the list of {role, content} (Messages) or {from, value} (ShareGPT), or its JSON. Usual names: messages, conversations.")
    tools: Column | None = Field(None, description="Column with the list of functions that the assistant may call, or its JSON (Messages, ShareGPT, Preference). Usual name: tools.")
    system: Column | None = Field(None, description="Column with the system prompt, for messages that do not begin with one (Messages, ShareGPT). Usual name: system.")
    instruction: Column | None = Field(None, description="Column with the instruction (Alpaca). Usual name: instruction.")
    input: Column | None = Field(None, description="Column with the optional input (Alpaca). Usual name: input.")
    output: Column | None = Field(None, description="Column with the answer (Alpaca). Usual name: output.")
    question: Column | None = Field(None, description="Column with the question (QuestionContextAnswer). Usual name: question.")
    context: Column | None = Field(None, description="Column with the optional text that the question is about (QuestionContextAnswer). Usual name: context.")
    answer: Column | None = Field(None, description="Column with the answer, or with answers as SQuAD has them, of which the first is learned (QuestionContextAnswer). Usual names: answer, answers.")
    chosen: Column | None = Field(None, description="Column with the better answer (Preference): a text, a list of {role, content}, or a conversation that begins like the rejected one. Usual name: chosen.")
    rejected: Column | None = Field(None, description="Column with the worse answer (Preference). Usual name: rejected.")


class Source(Document):
    rules: ClassVar = uri_rules()
    uri: Uri = Field(description=f"A file, a folder of them, or a pattern (*, ?, [a-z], and ** for folders): JSONL, JSON, CSV, TSV, Parquet, Arrow or plain text; gzip, zstd, bz2 or xz. {URI_HELP}.")
    format: DataFormat | None = Field(None, description="What a row looks like. Left out: recognised from the columns of the first row, Messages and ShareGPT from its messages.")
    columns: Columns | None = Field(None, description="Column names, where they differ from the usual ones.")
    secret_ref: LocalReference | None = Field(None, description="Secret with the credentials for this URI; keys as for model.secretRef.")


Sources = Annotated[list[Source], Field(min_length=1, max_length=32)]


class Split(Document):
    """A part of the data that is not trained on: files of its own, or a fraction of the sources."""

    rules: ClassVar = (Rule("has(self.sources) != has(self.fraction)", "give either sources or fraction, not both and not neither"),)
    sources: Sources | None = Field(None, description="Files of this split.")
    fraction: float | None = Field(None, gt=0, lt=1, description="Share of the rows of dataset.sources, drawn by row hash, so that a row keeps its split when data is added.")


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]
RE2_HELP = "a regular expression in RE2 syntax (https://github.com/google/re2/wiki/Syntax), which has no look-around and no back-references"
# The condition is there to fail: with it, a pattern that cannot be compiled breaks the rule.
_COMPILES = "(''.matches({0}) ? true : true)"


class UnicodeForm(StrEnum):
    NFC = "NFC"
    NFKC = "NFKC"


class CleanSpec(Document):
    """Steps in the order in which they are done; each is off unless it is asked for. A label is never changed."""

    rules: ClassVar = (
        Rule("!has(self.minCharacters) || !has(self.maxCharacters) || self.minCharacters <= self.maxCharacters",
             "minCharacters is above maxCharacters: no row would be left", "minCharacters"),
        Rule(f"!has(self.dropLines) || self.dropLines.all(p, {_COMPILES.format('p')})", f"expected {RE2_HELP}", "dropLines"),
    )
    repair_encoding: bool = Field(False, description="Repair text that was decoded by the wrong encoding (mojibake): 'schÃ¶n' becomes 'schön'.")
    unicode: UnicodeForm | None = Field(
        None, description="Unicode normalization form. NFC: one code for each character, the same look. NFKC: also replaces ligatures, full-width letters and superscripts by plain ones, "
        "which changes formulas."
    )
    remove_control_characters: bool = Field(
        False, description="Remove control characters but tab and line break, terminal escapes, invisible characters (zero-width space, soft hyphen, byte order mark, tags) "
        "and marks of the writing direction. Joiners, which emoji and some scripts need, stay."
    )
    normalize_whitespace: bool = Field(
        False, description="Line breaks become \\n, any unusual space an ordinary one, several in a line one, three empty lines and more two; spaces at the ends of lines and of the text go. "
        "Indentation stays, and so does what stands between a prompt and its completion."
    )
    drop_lines: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = Field(
        None, description=f"Drop the lines in which one of these is found, such as menus and footers. Each is {RE2_HELP}."
    )
    min_characters: int | None = Field(None, ge=1, le=16_777_216, description="Drop rows whose texts together have less characters.")
    max_characters: int | None = Field(None, ge=1, le=16_777_216, description="Drop rows whose texts together have more characters.")
    max_repetition: float | None = Field(
        None, ge=0, lt=1, description="Drop rows with a text that repeats itself: the larger of its share of characters in lines that stand in it before, and of words in sequences of five that do. "
        "Rae et al. (https://arxiv.org/abs/2112.11446, table A1) drop documents above 0.2 and 0.15."
    )
    languages: Annotated[list[Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-Hant|-ME)?$", max_length=8)]], Field(min_length=1, max_length=64), AfterValidator(_once)] | None = Field(
        None, description="Keep rows in these languages (ISO 639-1 codes such as en and de; zh-Hant for traditional Chinese). Rows too short or too mixed to tell are kept.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class DuplicateAction(StrEnum):
    DROP = "Drop"
    KEEP = "Keep"


class DuplicatesSpec(Document):
    action: DuplicateAction = Field(
        DuplicateAction.DROP, description="What is done with rows of dataset.sources that say what an earlier row says. Drop: only the first is kept. Keep: they are only counted. "
        "Rows of validation and test sources always stay, so that scores can be compared."
    )
    similarity: float | None = Field(
        None, ge=0.5, lt=1, description="From which similarity on two rows say nearly the same: the estimated share of the sequences of three words that they have in common (MinHash), 0.8 for example. "
        "Such rows go to one split, and rows that are similar to one of a validation or test source are not trained on. Left out: only rows with the same texts are duplicates."
    )


class ConflictAction(StrEnum):
    KEEP = "Keep"
    DROP = "Drop"
    MAJORITY = "Majority"


class LabelRule(Document):
    rules: ClassVar = (
        Rule("(has(self.keywords) ? 1 : 0) + (has(self.pattern) ? 1 : 0) + (has(self.table) ? 1 : 0) == 1", "give exactly one of keywords, pattern and table"),
        Rule("has(self.table) != has(self.label)", "keywords and pattern need a label; a table has labels of its own", "label"),
        Rule(f"!has(self.pattern) || {_COMPILES.format('self.pattern')}", f"expected {RE2_HELP}", "pattern"),
    )
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)] = Field(description="What the report calls it, for example profit-warning.")
    label: Label | None = Field(None, description="The label that keywords or pattern vote for.")
    keywords: Annotated[list[Annotated[str, StringConstraints(pattern=r"\S", max_length=64)]], Field(min_length=1, max_length=128)] | None = Field(
        None, description="It votes where one of these stands as whole words, whatever their case and the white space between them. Scripts that write no spaces need a pattern."
    )
    pattern: Pattern | None = Field(None, description=f"It votes where this is found: {RE2_HELP}. (?i) at its beginning ignores case.")
    table: Annotated[dict[str, Label], Field(max_length=256)] | None = Field(
        None, description="Value -> label. It votes where the whole value stands here, with the same case; white space at the ends does not count, and 5.0 is 5."
    )
    column: Column | None = Field(None, description="The column of the source to look at, as it stands there. Left out: the text, once it is cleaned and before personal data is replaced.")


class LabellingSpec(Document):
    rules: ClassVar = (
        Rule("!has(self.aliases) || self.aliases.all(a, !(self.aliases[a] in self.aliases))", "an alias may not lead to another alias", "aliases"),
        Rule("!has(self.rules) || self.rules.all(r, self.rules.exists_one(q, q.name == r.name))", "every rule needs a name of its own", "rules"),
    )
    aliases: Annotated[dict[str, Label], Field(max_length=512)] | None = Field(
        None, description="Other name -> label, for example {pos: positive, '1': positive}, in all splits. Names are compared as they are written, case included, but for white space at their ends."
    )
    minimum_rows: int | None = Field(None, ge=1, le=1_000_000, description="Fewest training rows of each label, after everything else was decided: with less the job fails. Left out: 1.")
    conflicts: ConflictAction = Field(
        ConflictAction.KEEP, description="What is done where the same text (with duplicates.similarity, nearly the same) has different labels. Keep: nothing. Drop: none of these rows is trained on. Majority: only those are that have the label of more than half of them. "
        "Validation and test rows stay, for they show how good the labels are. All are counted in the report."
    )
    label_rules: Annotated[list[LabelRule], Field(min_length=1, max_length=32)] | None = Field(
        None, alias="rules", description="Weak labels: a row without a label gets the one that most rules vote for, in all splits; it is left out if none votes or several labels have as many votes. A label that a row has stays. "
        "A source then needs no label column, and the report tells for each rule how often it votes, with others, against others, and against labels that rows have."
    )


class PersonalDataAction(StrEnum):
    REDACT = "Redact"
    PSEUDONYMIZE = "Pseudonymize"
    REJECT = "Reject"
    KEEP = "Keep"


class PersonalDataKind(StrEnum):
    EMAIL = "Email"
    PHONE = "Phone"
    IBAN = "IBAN"
    CREDIT_CARD = "CreditCard"
    NATIONAL_ID = "NationalId"
    IP_ADDRESS = "IPAddress"
    URL_CREDENTIALS = "UrlCredentials"
    SECRET = "Secret"
    PERSON_NAME = "PersonName"


class PersonalDataPattern(Document):
    rules: ClassVar = (Rule(_COMPILES.format("self.pattern"), f"expected {RE2_HELP}", "pattern"),)
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$", max_length=32)] = Field(
        description="What it is called in the placeholder and in the counts, for example EMPLOYEE_NUMBER."
    )
    pattern: Pattern = Field(description=f"{RE2_HELP[0].upper()}{RE2_HELP[1:]}. All that it matches counts as found; there is no check beyond it.")


class PersonalDataSpec(Document):
    rules: ClassVar = (
        Rule("(self.action == 'Pseudonymize') == has(self.keySecretRef)", "keySecretRef is needed by action Pseudonymize, and by no other", "keySecretRef"),
        Rule("!has(self.patterns) || self.patterns.all(p, self.patterns.exists_one(q, q.name == p.name))", "every pattern needs a name of its own", "patterns"),
    )
    action: PersonalDataAction = Field(
        description="What is done with what is found. Redact: a placeholder such as [EMAIL] takes its place. Pseudonymize: one that is the same for the same value, such as [EMAIL_5f0e8d3c21b7a964] "
        "(HMAC-SHA256 with the key of keySecretRef). Reject: the row is left out. Keep: it is only counted."
    )
    kinds: Annotated[list[PersonalDataKind], Field(min_length=1, max_length=9), AfterValidator(_once)] | None = Field(
        None, description="What is looked for. Left out: all but PersonName. Numbers count only if their check digits are right. PersonName needs a trainer image with Presidio "
        "and a language model, and takes many times as long as all others.", json_schema_extra={"x-kubernetes-list-type": "set"}
    )
    countries: Annotated[list[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$", max_length=2)]], Field(min_length=1, max_length=32), AfterValidator(_once)] | None = Field(
        None, description="Countries (ISO 3166, such as DE) whose phone numbers are also found without +, and whose national ids are looked for. Left out: phone numbers with + only, and "
        "ids of AT, AU, BE, BR, CA, CH, DE, DK, ES, FI, FR, GB, IE, IT, NL, NO, PL, SE and US.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    patterns: Annotated[list[PersonalDataPattern], Field(min_length=1, max_length=16)] | None = Field(None, description="What else to look for, whatever kinds says.")
    key_secret_ref: LocalReference | None = Field(None, description="Secret whose entry 'key', at least 16 bytes, makes the pseudonyms. Who has it can tell whether a pseudonym is that of a known value.")


class DecisionFile(Document):
    rules: ClassVar = uri_rules()
    uri: Uri = Field(description=f"report/review.jsonl with its decisions filled in; or any file of rows with the columns rowHash and decision: JSONL, JSON, CSV, TSV, Parquet or Arrow; or a folder or a pattern, as in dataset.sources. {URI_HELP}.")
    secret_ref: LocalReference | None = Field(None, description="Secret with the credentials for this URI; keys as for model.secretRef.")


class ReviewSpec(Document):
    """A classifier of its own, on CPU, judges each training row by the other ones (confident learning, https://arxiv.org/abs/1911.00068). Nothing is removed but by a decision."""

    suspect_weight: float | None = Field(None, ge=0, le=1, description="How much the loss of a suspicious row counts in training; other rows count 1. Left out: 1, they are only reported.")
    max_rows: int = Field(1000, ge=1, le=100_000, description="Most rows in report/review.jsonl, the most suspicious ones. That file holds text of the dataset, cleaned and with personal data treated as the spec says.")
    decisions: Annotated[list[DecisionFile], Field(min_length=1, max_length=8)] | None = Field(
        None, description="What people decided on rows of report/review.jsonl: the right label, 'keep' (the label is right) or 'drop' (leave the row out). It holds for every row with this text, in all splits; "
        "an empty decision is none. Rows that were decided are not asked about again."
    )


class DatasetSpec(Document):
    rules: ClassVar = (
        Rule("(has(self.validation) ? (has(self.validation.fraction) ? self.validation.fraction : 0.0) : 0.1) "
             "+ (has(self.test) && has(self.test.fraction) ? self.test.fraction : 0.0) <= 0.9",
             "validation (a tenth if left out) and test leave less than a tenth of the rows for training; lower their fractions"),
        Rule("!has(self.labels) || !has(self.labelling) || !has(self.labelling.aliases) || self.labelling.aliases.all(a, self.labelling.aliases[a] in self.labels && !(a in self.labels))",
             "an alias must lead from a name that dataset.labels does not list to one that it lists", "labelling.aliases"),
        # Labels of tables are checked by prepare: all of them would cost more than the API server allows.
        Rule("!has(self.labels) || !has(self.labelling) || !has(self.labelling.rules) || self.labelling.rules.all(r, !has(r.label) || r.label in self.labels)",
             "a rule must vote for a label that dataset.labels lists", "labelling.rules"),
        Rule("!has(self.labels) || !has(self.review) || !('keep' in self.labels || 'drop' in self.labels)",
             "in a review, 'keep' and 'drop' are decisions and cannot be labels; give the labels other names by labelling.aliases", "labels"),
    )
    sources: Sources = Field(description="Training data. All sources together must fit the task.")
    validation: Split | None = Field(None, description="Rows to choose the best checkpoint by. Left out: a tenth of the sources.")
    test: Split | None = Field(None, description="Held-out rows for the final scores and the gate. Left out: the scores are those on validation.")
    labels: Annotated[list[Label], Field(min_length=2, max_length=512), AfterValidator(_once)] | None = Field(
        None, description="The closed set of labels, in the order of the class ids (Classification). Left out: all labels found, sorted.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    duplicates: DuplicatesSpec | None = Field(None, description="Rows that say the same, or nearly. Left out: they are kept, those with the same input in one split.")
    labelling: LabellingSpec | None = Field(None, description="How labels are read, checked and made (Classification).")
    review: ReviewSpec | None = Field(None, description="Wrong labels: found in the training rows, shown to people in report/review.jsonl, and corrected by their decisions (Classification). Left out: not looked for.")
    clean: CleanSpec | None = Field(None, description="What is repaired in the texts of all splits, and which rows are left out. Left out: nothing is changed.")
    personal_data: PersonalDataSpec | None = Field(None, description="E-mail addresses, phone numbers, secrets and the like in the texts of all splits; labels are not looked at. Left out: not looked for.")
    max_rejected: float = Field(0, ge=0, lt=1, description="Share of rows that may be rejected before the job fails. 0: every row must be valid.")
