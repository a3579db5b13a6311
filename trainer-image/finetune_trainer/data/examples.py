"""What can be learned from: one type for each way, and the texts in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    role: str
    content: str


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
        case Conversation(turns):
            return [part for turn in turns for part in turn]
        case Preference(chosen, rejected):
            return example_texts(chosen) + example_texts(rejected)


def map_texts(example: Example, change: Callable[[str], str]) -> Example:
    """The example with its texts changed; roles and labels are none, and the white space between a prompt and its
    completion, which says how they are joined, belongs to neither.
    """
    match example:
        case LabelledText(text, label):
            return LabelledText(change(text), label)
        case PlainText(text):
            return PlainText(change(text))
        case PromptCompletion(prompt, completion):
            before, after = prompt.rstrip(), completion.lstrip()
            end, start = prompt[len(before) :], completion[: len(completion) - len(after)]
            return PromptCompletion(change(before) + end, start + change(after))
        case Conversation(turns, given):
            return Conversation(tuple(Turn(turn.role, change(turn.content)) for turn in turns), given)
        case Preference(chosen, rejected):
            return Preference(map_texts(chosen, change), map_texts(rejected, change))  # type: ignore[arg-type]


def spoken_texts(example: Example) -> list[str]:
    """The texts that `map_texts` changes, each once: without roles, and of a pair the prompt only once."""
    texts: dict[str, None] = {}

    def note(text: str) -> str:
        texts[text] = None
        return text

    map_texts(example, note)
    return list(texts)


def input_texts(example: Example) -> list[str]:
    """The texts that a model is given before it answers; all of them where there is no answer to tell from them."""
    match example:
        case PromptCompletion(prompt, _):
            return [prompt]
        case Conversation(turns, given) if len(turns) > 1:
            return example_texts(Conversation(turns[: given or -1]))
        case Preference(chosen, _):
            return input_texts(chosen)
    return example_texts(example)
