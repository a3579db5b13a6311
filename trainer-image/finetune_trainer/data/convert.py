"""Raw rows -> examples: one type for each way in which a row can be learned from.

Formats (`DataFormat`) are what files look like; Alpaca rows, for example, become a prompt and its completion.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
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
from finetune_trainer.data.messages import is_share_gpt, match_calls, read_messages, read_share_gpt, read_tools
from finetune_trainer.data.read import RawRow, Rejection, read_rows, recognise_file
from finetune_trainer.data.values import InvalidRowError, checked_text, is_nan, parsed
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile

MAX_LABEL_LENGTH = 128

USUAL_COLUMNS = {
    "text": ("text", "sentence", "headline", "content"),
    "label": ("label", "labels", "category", "sentiment", "class"),
    "prompt": ("prompt",),
    "completion": ("completion", "response"),
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "system": ("system",),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "question": ("question",),
    "context": ("context",),
    "answer": ("answer", "answers"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
"""Field -> column names, the first that a row has counts."""

FIELDS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.SHARE_GPT: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.QUESTION_CONTEXT_ANSWER: ("question", "answer"),
    DataFormat.TEXT: ("text",),
    DataFormat.PREFERENCE: ("chosen", "rejected"),
    DataFormat.LABELLED_TEXT: ("text", "label"),
}
"""Format -> fields that every row has. In the order in which a format is recognised; Messages and ShareGPT are told
apart by the messages themselves."""

OPTIONAL_FIELDS = {
    DataFormat.MESSAGES: ("tools", "system"),
    DataFormat.SHARE_GPT: ("tools", "system"),
    DataFormat.ALPACA: ("input",),
    DataFormat.QUESTION_CONTEXT_ANSWER: ("context",),
    DataFormat.PREFERENCE: ("prompt", "tools"),
}


def usable_formats(plan: Plan) -> list[DataFormat]:
    """The formats that a job can read."""
    if plan.task is Task.CLASSIFICATION:
        return [DataFormat.LABELLED_TEXT]
    if plan.dpo is not None:
        return [DataFormat.PREFERENCE]
    return [f for f in FIELDS if f not in (DataFormat.LABELLED_TEXT, DataFormat.PREFERENCE)]


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
        return value is None or (isinstance(value, str) and not value.strip()) or is_nan(value)


def column_names(source: PlanSource, field: str) -> tuple[str, ...]:
    """The columns in which a source may have a field."""
    named = getattr(source.columns, field)
    return (named,) if named else USUAL_COLUMNS[field]


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


def _question_context_answer(row: Row) -> PromptCompletion:
    """The context comes first, as people read it; the prompt is put together like that of an Alpaca row."""
    parts = [row.text("question")]
    if row.get("context") not in (None, ""):
        parts.insert(0, row.text("context"))
    return PromptCompletion("\n\n".join(parts) + "\n\n", checked_text(_first_answer(row.get("answer")), "answer"))


def _first_answer(value: Any) -> Any:
    """Of answers as SQuAD writes them, {text: [...], answer_start: [...]} or a list of {text, ...}, the first."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, list):
        if not value:
            raise InvalidRowError("answer is missing", "the list of answers is empty: the question has none")
        value = value[0]["text"] if isinstance(value[0], dict) and "text" in value[0] else value[0]
    return value


def _conversation(row: Row, read: Callable[[Any], tuple[Turn, ...]]) -> Conversation:
    messages = parsed(row.get("messages"), "messages")
    if messages is None:
        raise InvalidRowError("messages is missing")
    tools = read_tools(row.get("tools"))
    turns = match_calls(_begun(read(messages), row.get("system")), tools)
    if turns[-1].role != "assistant":
        raise InvalidRowError("messages do not end with the assistant", "there is no answer to learn")
    _check_learned(turns)
    return Conversation(turns, tools=tools)


def _check_learned(turns: tuple[Turn, ...]) -> None:
    if not any(turn.learned for turn in turns if turn.role == "assistant"):
        raise InvalidRowError("no answer is learned", "all that the assistant says has weight 0")


def _begun(turns: tuple[Turn, ...], system: Any) -> tuple[Turn, ...]:
    """With the system prompt of a column of its own at the beginning."""
    if system is None or system == "":
        return turns
    first = Turn("system", checked_text(system, "system"))
    if turns[0].role != "system":
        return (first, *turns)
    if turns[0] != first:
        raise InvalidRowError("system is given twice", "its column says another thing than the first message")
    return turns


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
        pair = _conversations(chosen, rejected, read_tools(row.get("tools")))
    else:
        pair = Preference(*(PromptCompletion(row.text("prompt"), row.text(name)) for name in answers))
    if example_texts(pair.chosen) == example_texts(pair.rejected):
        raise InvalidRowError("chosen and rejected are the same")
    return pair


def _spoken(value: Any, name: str, role: str) -> tuple[Turn, ...]:
    """Messages; a text is one, of `role`."""
    return read_messages(value, f" of {name}") if isinstance(value, list) else (Turn(role, checked_text(value, name)),)


def _whole(prompt: tuple[Turn, ...], answer: tuple[Turn, ...], name: str) -> tuple[Turn, ...]:
    if answer[-1].role != "assistant":
        raise InvalidRowError(f"{name} does not end with the assistant", "there is no answer to learn")
    return prompt + answer if answer[0].role == "assistant" else answer


def _conversations(chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], tools: str) -> Preference:
    chosen, rejected = match_calls(chosen, tools), match_calls(rejected, tools)
    most = min(len(chosen), len(rejected)) - 1
    given = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    if given == 0:
        raise InvalidRowError("prompt is missing", "and chosen and rejected do not begin with the same message")
    _check_learned(chosen[given:])
    _check_learned(rejected[given:])
    return Preference(Conversation(chosen, given, tools), Conversation(rejected, given, tools))


CONVERTERS: dict[DataFormat, Callable[[Row], Example]] = {
    DataFormat.MESSAGES: partial(_conversation, read=read_messages),
    DataFormat.SHARE_GPT: partial(_conversation, read=read_share_gpt),
    DataFormat.PROMPT_COMPLETION: _prompt_completion,
    DataFormat.ALPACA: _alpaca,
    DataFormat.QUESTION_CONTEXT_ANSWER: _question_context_answer,
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
    if not fitting and len(candidates) == 1 and not recognise_file(file).kind.tabular:
        fitting = candidates  # another row of a JSONL file may have them
    if fitting and fitting[0] is DataFormat.MESSAGES and source.format is None:
        return _form_of_messages(file, source, check)
    if fitting:
        return fitting[0]
    raise UserError(Reason.DATA_INVALID, _no_format(file, source, candidates or usable, first))


def _form_of_messages(file: SourceFile, source: PlanSource, check: Callable[[], None]) -> DataFormat:
    """By the first row whose messages tell it."""
    for row in read_rows(file, usable_columns(source)):
        check()
        is_other = is_share_gpt(Row(row.values, source).get("messages")) if isinstance(row, RawRow) else None
        if is_other is not None:
            return DataFormat.SHARE_GPT if is_other else DataFormat.MESSAGES
    return DataFormat.MESSAGES


def find_columns(
    file: SourceFile, source: PlanSource, data_format: DataFormat, check: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Field of the format -> the column in which the first row of `file` that can be read has it."""
    first = _first_row(file, source, check)
    fields = (*FIELDS[data_format], *OPTIONAL_FIELDS.get(data_format, ()))
    found = {f: next((n for n in column_names(source, f) if first and n in first.values), None) for f in fields}
    return {field: name for field, name in found.items() if name}


def _first_row(file: SourceFile, source: PlanSource, check: Callable[[], None]) -> RawRow | None:
    for row in read_rows(file, usable_columns(source)):
        check()
        if isinstance(row, RawRow):
            return row
    return None


def _candidates(source: PlanSource, usable: list[DataFormat]) -> list[DataFormat]:
    """The usable formats that have use for every column that the spec names; ShareGPT is a form of Messages here."""
    mapped = {field for field in USUAL_COLUMNS if getattr(source.columns, field)}
    formats = [f for f in usable if f is not DataFormat.SHARE_GPT]
    return [f for f in formats if mapped <= {*FIELDS[f], *OPTIONAL_FIELDS.get(f, ())}]


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
