"""What can be learned from: one type for each way, and the texts in it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    name: str
    arguments: dict[str, Any]
    """As JSON has them."""
    id: str


class Turn(NamedTuple):
    """`content` may be empty for an assistant that calls tools and for what a tool returns."""

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    """Of the assistant."""
    call_id: str | None = None
    """Of a tool: the call that it answers."""
    name: str | None = None
    """Of a tool: its name."""
    thoughts: str = ""
    """Of the assistant, before it speaks or calls."""
    learned: bool = True
    """Whether what the assistant says is to be learned, and not only read."""


UNLABELLED = ""


@dataclass(frozen=True, slots=True)
class LabelledText:
    text: str
    label: str
    """UNLABELLED until dataset.labelling.rules have given one."""


@dataclass(frozen=True, slots=True)
class PlainText:
    text: str


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Without a chat template the two are simply joined: the prompt brings its own last space or line break."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Ends with the assistant. Its first `given` turns are not learned from."""

    turns: tuple[Turn, ...]
    given: int = 0
    tools: str = ""
    """The functions that the assistant may call, as a JSON list; empty without any."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A better and a worse answer to the same prompt: both are conversations whose first turns are the same, or
    both have the same prompt before their completion.
    """

    chosen: PromptCompletion | Conversation
    rejected: PromptCompletion | Conversation


Example = LabelledText | PlainText | PromptCompletion | Conversation | Preference


def example_texts(example: Example) -> list[str]:
    """All texts of an example that a model reads or writes, roles included; a label is none."""
    match example:
        case LabelledText(text, _) | PlainText(text):
            return [text]
        case PromptCompletion(prompt, completion):
            return [prompt, completion]
        case Conversation(turns, _, tools):
            return [part for turn in turns for part in _turn_texts(turn)] + ([tools] if tools else [])
        case Preference(chosen, rejected):
            return example_texts(chosen) + example_texts(rejected)


def _turn_texts(turn: Turn) -> list[str]:
    texts = [turn.role, turn.thoughts, turn.content] if turn.thoughts else [turn.role, turn.content]
    for call in turn.calls:
        texts += [call.name, json.dumps(call.arguments, ensure_ascii=False, sort_keys=True)]
    return texts


def map_texts(example: Example, change: Callable[[str], str]) -> Example:
    """The example with its texts changed, those in the arguments of tool calls among them. Roles, labels, names of
    functions and arguments, and the schemas of tools are none, and the white space between a prompt and its
    completion, which says how they are joined, belongs to neither.
    """
    match example:
        case LabelledText(text, label):
            return LabelledText(change(text), label)
        case PlainText(text):
            return PlainText(change(text))
        case PromptCompletion() | Conversation():
            return _map_answer(example, change)
        case Preference(chosen, rejected):
            return Preference(_map_answer(chosen, change), _map_answer(rejected, change))


def _map_answer(
    answer: PromptCompletion | Conversation, change: Callable[[str], str]
) -> PromptCompletion | Conversation:
    if isinstance(answer, Conversation):
        return Conversation(tuple(_map_turn(turn, change) for turn in answer.turns), answer.given, answer.tools)
    before, after = answer.prompt.rstrip(), answer.completion.lstrip()
    end, start = answer.prompt[len(before) :], answer.completion[: len(answer.completion) - len(after)]
    return PromptCompletion(change(before) + end, start + change(after))


def _map_turn(turn: Turn, change: Callable[[str], str]) -> Turn:
    calls = tuple(call._replace(arguments=_map_json(call.arguments, change)) for call in turn.calls)
    thoughts = change(turn.thoughts) if turn.thoughts else ""
    return Turn(turn.role, change(turn.content), calls, turn.call_id, turn.name, thoughts, turn.learned)


def _map_json(value: Any, change: Callable[[str], str]) -> Any:
    """A whole number is looked at as the text that it is, too: it may be that of a card or a telephone."""
    match value:
        case str():
            return change(value)
        case bool():
            return value
        case int():
            text = str(value)
            changed = change(text)
            return value if changed == text else changed
        case dict():
            return {key: _map_json(inner, change) for key, inner in value.items()}
        case list():
            return [_map_json(inner, change) for inner in value]
    return value


def lacks_text(example: Example) -> bool:
    """Whether a text that must say something is blank: a call says something, and a tool may return nothing."""
    match example:
        case Conversation(turns):
            return any(not (turn.content.strip() or turn.calls or turn.role == "tool") for turn in turns)
        case Preference(chosen, rejected):
            return lacks_text(chosen) or lacks_text(rejected)
    return not all(text.strip() for text in example_texts(example))


def spoken_texts(example: Example) -> list[str]:
    """The texts that `map_texts` changes, each once: without roles, and of a pair the prompt only once."""
    texts: dict[str, None] = {}

    def note(text: str) -> str:
        texts[text] = None
        return text

    map_texts(example, note)
    return list(texts)


def input_texts(example: Example) -> list[str]:
    """The texts that a model is given before it answers; all of them where there is no answer to tell from them. The
    tools are left out: the same question with other tools beside the right one is still the same question.
    """
    match example:
        case PromptCompletion(prompt, _):
            return [prompt]
        case Conversation(turns, given):
            return example_texts(Conversation(turns[: given or -1] if len(turns) > 1 else turns))
        case Preference(chosen, _):
            return input_texts(chosen)
    return example_texts(example)
