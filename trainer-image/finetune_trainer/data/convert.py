"""Raw rows -> examples: one type for each way in which a row can be learned from.

Formats (`DataFormat`) are what files look like; Alpaca rows, for example, become a prompt and its completion.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from finetune_api.constants import Reason
from finetune_api.dataset import DataFormat
from finetune_api.plan import Plan, PlanSource
from finetune_api.spec import Task

from finetune_trainer.data.examples import (
    UNLABELLED,
    Conversation,
    Example,
    LabelledText,
    PlainText,
    Preference,
    PromptCompletion,
    Turn,
    example_texts,
)
from finetune_trainer.data.read import RawRow, Rejection, is_unicode, read_rows, recognise_file
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile

ROLES = ("system", "user", "assistant", "tool")
MAX_LABEL_LENGTH = 128

USUAL_COLUMNS = {
    "text": ("text", "sentence", "headline", "content"),
    "label": ("label", "labels", "category", "sentiment", "class"),
    "prompt": ("prompt",),
    "completion": ("completion", "response"),
    "messages": ("messages", "conversations"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
"""Field -> column names, the first that a row has counts."""

FIELDS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.TEXT: ("text",),
    DataFormat.PREFERENCE: ("chosen", "rejected"),
    DataFormat.LABELLED_TEXT: ("text", "label"),
}
"""Format -> fields that every row has. In the order in which a format is recognised."""

OPTIONAL_FIELDS = {DataFormat.ALPACA: ("input",), DataFormat.PREFERENCE: ("prompt",)}


def usable_formats(plan: Plan) -> list[DataFormat]:
    """The formats that a job can read."""
    if plan.task is Task.CLASSIFICATION:
        return [DataFormat.LABELLED_TEXT]
    if plan.dpo is not None:
        return [DataFormat.PREFERENCE]
    return [f for f in FIELDS if f not in (DataFormat.LABELLED_TEXT, DataFormat.PREFERENCE)]


class InvalidRowError(ValueError):
    """A row cannot be learned from; neither text quotes it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Unwanted(NamedTuple):
    """Why an example is left out; neither text quotes it. `invalid`: it is not sound."""

    reason: str
    detail: str = ""
    invalid: bool = False


class Row:
    """A raw row by the names of fields instead of columns. `optional`: fields that it may lack, see `lacks`."""

    def __init__(self, values: Mapping[str, Any], source: PlanSource, optional: Collection[str] = ()) -> None:
        self._values = values
        self._source = source
        self._optional = optional

    def get(self, field: str) -> Any:
        """The value of the field's column; None if it is null or there is none."""
        return next((self._values[name] for name in column_names(self._source, field) if name in self._values), None)

    def text(self, field: str) -> str:
        """Raises InvalidRowError unless the field is a text that says something."""
        return checked_text(self.get(field), field)

    def lacks(self, field: str) -> bool:
        """Whether an optional field says nothing."""
        if field not in self._optional:
            return False
        value = self.get(field)
        return value is None or (isinstance(value, str) and not value.strip()) or _is_nan(value)


def column_names(source: PlanSource, field: str) -> tuple[str, ...]:
    """The columns in which a source may have a field."""
    named = getattr(source.columns, field)
    return (named,) if named else USUAL_COLUMNS[field]


def checked_text(value: Any, name: str) -> str:
    """The value, if it is a text that says something; otherwise raises InvalidRowError, which calls it `name`."""
    if value is None:
        raise InvalidRowError(f"{name} is missing")
    if _is_nan(value):
        raise InvalidRowError(f"{name} is missing", "it is NaN")
    if not isinstance(value, str):
        raise InvalidRowError(f"{name} is not text", f"it is of type {type(value).__name__}")
    if not value.strip():
        raise InvalidRowError(f"{name} is empty")
    if not is_unicode(value):
        raise InvalidRowError("not Unicode", f"{name} holds half of a surrogate pair")
    return value


def _is_nan(value: Any) -> bool:
    """What pandas writes for what is missing."""
    return isinstance(value, float) and math.isnan(value)


def _labelled_text(row: Row) -> LabelledText:
    return LabelledText(row.text("text"), UNLABELLED if row.lacks("label") else _label(row.get("label")))


def _label(value: Any) -> str:
    """Names, and class numbers as JSON, Parquet and pandas (1.0) write them."""
    number = spelled_number(value)
    if number is not None:
        return number
    label = checked_text(value, "label").strip()
    if len(label) > MAX_LABEL_LENGTH:
        raise InvalidRowError("label is too long", f"{len(label)} characters, at most {MAX_LABEL_LENGTH}")
    return label


def spelled_number(value: Any) -> str | None:
    """A whole number or a truth value as JSON writes it; None if it is neither."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return None


def _plain_text(row: Row) -> PlainText:
    return PlainText(row.text("text"))


def _prompt_completion(row: Row) -> PromptCompletion:
    return PromptCompletion(row.text("prompt"), row.text("completion"))


def _alpaca(row: Row) -> PromptCompletion:
    parts = [row.text("instruction")]
    if row.get("input") not in (None, ""):
        parts.append(row.text("input"))
    return PromptCompletion("\n\n".join(parts) + "\n\n", row.text("output"))


def _conversation(row: Row) -> Conversation:
    messages = row.get("messages")
    if isinstance(messages, str):  # a CSV cell
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise InvalidRowError("messages are not valid", "the text of the column is not JSON") from None
    if messages is None:
        raise InvalidRowError("messages is missing")
    turns = _turns(messages)
    if turns[-1].role != "assistant":
        raise InvalidRowError("messages do not end with the assistant", "there is no answer to learn")
    return Conversation(turns)


def _turns(messages: Any, place: str = "") -> tuple[Turn, ...]:
    """`place` tells, in what is said of bad ones, which messages they are: " of chosen"."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRowError("messages are not valid", f"not a list of {{role, content}}{place}")
    return tuple(_turn(f"message {number}{place}", number, message) for number, message in enumerate(messages, start=1))


def _turn(name: str, number: int, message: Any) -> Turn:
    if not isinstance(message, dict):
        raise InvalidRowError("messages are not valid", f"{name} is not an object")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRowError("role is not valid", f"that of {name} is none of {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise InvalidRowError("role is not valid", f"{name} is of the system; only the first may be")
    try:
        return Turn(role, checked_text(message.get("content"), "content"))
    except InvalidRowError as error:
        raise InvalidRowError(error.reason, f"{name} {error.detail}".rstrip()) from None


def _preference(row: Row) -> Preference:
    """Texts, or lists of messages. Those that do not begin with the assistant are whole conversations, and what the two
    have in common is the prompt.
    """
    prompt, answers = row.get("prompt"), {name: row.get(name) for name in ("chosen", "rejected")}
    if any(isinstance(value, list) for value in (prompt, *answers.values())):
        begun = () if prompt is None else _spoken(prompt, "prompt", "user")
        chosen, rejected = (_whole(begun, _spoken(value, name, "assistant"), name) for name, value in answers.items())
        if isinstance(prompt, list) and not begun == chosen[: len(begun)] == rejected[: len(begun)]:
            raise InvalidRowError("chosen and rejected do not begin with the prompt")
        pair = _conversations(chosen, rejected)
    else:
        pair = Preference(*(PromptCompletion(row.text("prompt"), row.text(name)) for name in answers))
    if example_texts(pair.chosen) == example_texts(pair.rejected):
        raise InvalidRowError("chosen and rejected are the same")
    return pair


def _spoken(value: Any, name: str, role: str) -> tuple[Turn, ...]:
    """Messages; a text is one, of `role`."""
    return _turns(value, f" of {name}") if isinstance(value, list) else (Turn(role, checked_text(value, name)),)


def _whole(prompt: tuple[Turn, ...], answer: tuple[Turn, ...], name: str) -> tuple[Turn, ...]:
    if answer[-1].role != "assistant":
        raise InvalidRowError(f"{name} does not end with the assistant", "there is no answer to learn")
    return prompt + answer if answer[0].role == "assistant" else answer


def _conversations(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]) -> Preference:
    most = min(len(chosen), len(rejected)) - 1
    given = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    if given == 0:
        raise InvalidRowError("prompt is missing", "and chosen and rejected do not begin with the same message")
    return Preference(Conversation(chosen, given), Conversation(rejected, given))


CONVERTERS: dict[DataFormat, Callable[[Row], Example]] = {
    DataFormat.MESSAGES: _conversation,
    DataFormat.PROMPT_COMPLETION: _prompt_completion,
    DataFormat.ALPACA: _alpaca,
    DataFormat.TEXT: _plain_text,
    DataFormat.PREFERENCE: _preference,
    DataFormat.LABELLED_TEXT: _labelled_text,
}


def usable_columns(source: PlanSource) -> set[str]:
    """All columns in which a source may have any field."""
    return {name for field in USUAL_COLUMNS for name in column_names(source, field)}


def recognise_format(
    file: SourceFile,
    source: PlanSource,
    usable: list[DataFormat],
    check: Callable[[], None] = lambda: None,
    optional: Collection[str] = (),
) -> DataFormat:
    """The source's format: as the spec says, else by the columns of the first row of `file` that can be read.

    `check` is called for every row until then, and may raise to stop. `optional`: fields that need no column, unless
    the spec names it. Raises UserError if the columns fit none of the `usable` formats.
    """
    first = _first_row(file, source, check)
    if first is None:
        raise UserError(Reason.DATA_INVALID, f"{file.field}: {file.name} has no rows that can be read")
    candidates = [source.format] if source.format else _candidates(source, usable)
    spared = {field for field in optional if not getattr(source.columns, field)}
    fitting = [f for f in candidates if not {*_missing_fields(f, first, source)} - spared]
    if fitting:
        return fitting[0]
    if len(candidates) == 1 and not recognise_file(file).kind.tabular:  # another row of a JSONL file may have them
        return candidates[0]
    raise UserError(Reason.DATA_INVALID, _no_format(file, source, candidates or usable, first))


def _first_row(file: SourceFile, source: PlanSource, check: Callable[[], None]) -> RawRow | None:
    for row in read_rows(file, usable_columns(source)):
        check()
        if isinstance(row, RawRow):
            return row
    return None


def _candidates(source: PlanSource, usable: list[DataFormat]) -> list[DataFormat]:
    """The usable formats that have use for every column that the spec names."""
    mapped = {field for field in USUAL_COLUMNS if getattr(source.columns, field)}
    return [f for f in usable if mapped <= {*FIELDS[f], *OPTIONAL_FIELDS.get(f, ())}]


def _missing_fields(data_format: DataFormat, row: RawRow, source: PlanSource) -> list[str]:
    return [f for f in FIELDS[data_format] if not any(name in row.values for name in column_names(source, f))]


def _no_format(file: SourceFile, source: PlanSource, candidates: list[DataFormat], first: RawRow) -> str:
    """The columns that were looked for; those that the file has may be text where its header is missing."""
    needs = []
    for candidate in candidates:
        missing = _missing_fields(candidate, first, source)
        columns = [f"a column for {field} ({' or '.join(column_names(source, field))})" for field in missing]
        needs.append(f"format {candidate.value} needs {' and '.join(columns)}")
    generates = not {DataFormat.LABELLED_TEXT, DataFormat.PREFERENCE} & {*candidates}
    if generates and not _missing_fields(DataFormat.PREFERENCE, first, source):
        return (
            f"{file.at(first.line)}: pairs of a chosen and a rejected answer are learned from with method.dpo: set it"
        )
    return f"{file.at(first.line)}: {'; '.join(needs)}: name the columns in {file.field}.columns"


def convert_row(
    row: RawRow, source: PlanSource, data_format: DataFormat, optional: Collection[str] = ()
) -> Example | Rejection:
    """The example that a row of a source is, or why it is none. `optional`: fields that may say nothing."""
    try:
        return CONVERTERS[data_format](Row(row.values, source, optional))
    except InvalidRowError as error:
        return Rejection(row.line, error.reason, error.detail)
