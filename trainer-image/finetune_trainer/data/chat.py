"""Conversations -> text by the model's chat template, and where in it the assistant speaks.

A turn that calls tools is given to the template as transformers documents it, and in other ways only if that fails:
templates differ in what they expect beside a call.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import compress, product
from typing import Any, NamedTuple

from finetune_api.constants import Reason
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.data.examples import Turn
from finetune_trainer.data.messages import THOUGHTS, tool_names
from finetune_trainer.data.values import InvalidRowError
from finetune_trainer.errors import UserError

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says (transformers, chat templates)."""

STAND_INS = range(0xF0000, 0xFFFFE)
"""Private characters, of which one that a row does not have stands for each control token that its text spells."""

ID_LENGTH = 9
"""Of a call's id, where a template accepts no other (Mistral's)."""

Span = tuple[int, int]
Message = dict[str, Any]


class Rendered(NamedTuple):
    """A conversation as text. In characters: where the assistant speaks, and where the turns spell a control token."""

    text: str
    answers: list[Span]
    spelled: list[Span]
    unlearned: int
    """Answers that are not learned from, since the template writes them differently once other turns follow."""


class ChatTemplate:
    """The chat template of a tokenizer. `control_token` finds what the tokenizer would take for a control token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_token: re.Pattern[str]) -> None:
        self._template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self._marked = bool(self._template and GENERATION_MARK.search(self._template))
        self._special_tokens = tokenizer.special_tokens_map
        self._control_token = control_token

    @property
    def exists(self) -> bool:
        return self._template is not None

    def render(self, turns: Sequence[Turn], given: int, tools: str = "") -> Rendered | InvalidRowError:
        """The conversation as text. Only answers after the `given` turns count, and of them those that are to be
        learned. `tools`: as in `Conversation`.
        """
        learned = [turn.role == "assistant" and turn.learned for turn in turns]
        learned[:given] = [False] * given
        results = (self._hide_and_render(messages, learned, tools) for messages in _variants(turns))
        first = next(results)
        if not isinstance(first, InvalidRowError):
            return first
        return next((result for result in results if not isinstance(result, InvalidRowError)), first)

    def _hide_and_render(self, messages: list[Message], learned: list[bool], tools: str) -> Rendered | InvalidRowError:
        schemas, names = _read_tools(tools)
        try:
            texts = [*_texts(messages), tools]
            spelled = {token for text in texts for token in self._control_token.findall(text)}
            if not spelled:
                text, answers, unlearned = self._find_answers(messages, learned, schemas, names)
                return Rendered(text, answers, [], unlearned)
            used = {character for text in texts for character in text}
            free = (character for character in map(chr, STAND_INS) if character not in used)
            stand_ins = dict(zip(sorted(spelled), free, strict=False))
            hidden, hidden_tools = self._hide(messages, stand_ins), self._hide(schemas, stand_ins)
            text, answers, unlearned = self._find_answers(hidden, learned, hidden_tools, names)
        except InvalidRowError as error:
            return error
        return _reveal(text, answers, unlearned, {character: token for token, character in stand_ins.items()})

    def _hide(self, value: Any, stand_ins: dict[str, str]) -> Any:
        """The value with the control tokens in its texts hidden."""
        match value:
            case str():
                return self._control_token.sub(lambda found: stand_ins[found[0]], value)
            case dict():
                return {self._hide(key, stand_ins): self._hide(inner, stand_ins) for key, inner in value.items()}
            case list():
                return [self._hide(inner, stand_ins) for inner in value]
        return value

    def _find_answers(
        self, messages: list[Message], learned: list[bool], tools: list[Any] | None, names: Sequence[str]
    ) -> tuple[str, list[Span], int]:
        """The text, where in it the messages that are `learned` stand, and how many of them cannot be found. Raises
        InvalidRowError.
        """
        try:
            marked = self._answers_by_mark(messages, learned, tools) if self._marked else None
            text, answers, unlearned = marked or self._answers_by_prefix(messages, learned, tools)
        except InvalidRowError:
            raise
        except (TemplateError, ValueError, TypeError, KeyError, IndexError):
            what = "tool calls or order of roles" if _called(messages) else "order of roles"
            raise InvalidRowError(
                "chat template refuses the row", f"the model knows no such {what}: {_roles(messages)}"
            ) from None
        if not all(name in text for name in names):
            raise InvalidRowError(
                "chat template leaves tools out", "the model does not know tools: use one that does, or rows without"
            )
        if learned[-1] and messages[-1].get(THOUGHTS[0], "").strip() not in text:  # earlier ones are often left out
            raise InvalidRowError(
                "chat template leaves thoughts out", "the model does not know them: use one that does, or rows without"
            )
        return text, answers, unlearned

    def _answers_by_mark(
        self, messages: list[Message], learned: list[bool], tools: list[Any] | None
    ) -> tuple[str, list[Span], int] | None:
        """None if the marks do not tell which is whose, or tool calls are outside of them."""
        texts, spans = self._render(messages, tools, mark_answers=True)
        wanted = [is_learned for message, is_learned in zip(messages, learned, strict=True) if _is_answer(message)]
        if all(wanted):
            wanted = [True] * len(spans[0])
        elif len(wanted) != len(spans[0]):
            return None
        answers = [(int(start), int(end)) for start, end in compress(spans[0], wanted)]
        said = "".join(texts[0][start:end] for start, end in answers)
        return (texts[0], answers, 0) if all(name in said for name in _called(compress(messages, learned))) else None

    def _answers_by_prefix(
        self, messages: list[Message], learned: list[bool], tools: list[Any] | None
    ) -> tuple[str, list[Span], int]:
        """Each answer is what the text grows by when it is added to the turns before it. One that the template writes
        differently when other turns follow is none.
        """
        (text,) = self._render(messages, tools)
        spans, unlearned = [], 0
        for number, message in enumerate(messages):
            if not learned[number]:
                continue
            if number == 0:
                raise InvalidRowError("messages begin with the assistant", "there is nothing that it answers")
            (before,) = self._render(messages[:number], tools, add_generation_prompt=True)
            (after,) = self._render(messages[: number + 1], tools)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                unlearned += 1
                continue
            if not all(name in text[len(before) : len(after)] for name in _called([message])):
                raise InvalidRowError(
                    "chat template leaves tool calls out", "the model does not know them: use one that does"
                )
            spans.append((len(before), len(after)))
        if not spans:
            raise InvalidRowError(
                "chat template hides the answers",
                "it writes them differently when their turn comes; mark the answers in the template "
                "with {% generation %}",
            )
        return text, spans, unlearned

    def _render(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        mark_answers: bool = False,
        add_generation_prompt: bool = False,
    ) -> Any:
        if self._template is None:
            raise UserError(
                Reason.MODEL_INVALID,
                "model.uri: its tokenizer has no chat template, which lists of messages need: use a model that is "
                "made for chat, or data in format PromptCompletion",
            )
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self._template,
            return_assistant_tokens_mask=mark_answers,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )
        return (texts, spans) if mark_answers else texts


def _variants(turns: Sequence[Turn]) -> Iterator[list[Message]]:
    """The turns as a template may want them: at first as transformers documents them, at last the arguments of calls as
    JSON, ids made short, or what an assistant that only calls tools says as null.
    """
    if not any(turn.calls for turn in turns):
        yield [_message(turn) for turn in turns]
        return
    short = [_shorten_ids(turn) for turn in turns]
    for as_text, chosen, silence in product((False, True), (turns, short), ("", None)):
        yield [_message(turn, silence, as_text) for turn in chosen]


def _message(turn: Turn, silence: str | None = "", arguments_as_text: bool = False) -> Message:
    message: Message = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["content"] = turn.content or silence
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
            for call in turn.calls
            for arguments in [json.dumps(call.arguments, ensure_ascii=False) if arguments_as_text else call.arguments]
        ]
    if turn.thoughts:  # templates differ in what they call them
        message |= dict.fromkeys(THOUGHTS, turn.thoughts)
    if turn.call_id is not None:
        message["tool_call_id"] = turn.call_id
    if turn.name is not None:
        message["name"] = turn.name
    return message


def _shorten_ids(turn: Turn) -> Turn:
    calls = tuple(call._replace(id=_short_id(call.id)) for call in turn.calls)
    return turn._replace(calls=calls, call_id=None if turn.call_id is None else _short_id(turn.call_id))


def _short_id(id: str) -> str:
    return hashlib.blake2b(id.encode(), digest_size=ID_LENGTH).hexdigest()[:ID_LENGTH]


@lru_cache(maxsize=64)
def _read_tools(tools: str) -> tuple[list[Any] | None, tuple[str, ...]]:
    """The schemas and their names; most rows of a source have the same."""
    if not tools:
        return None, ()
    schemas = json.loads(tools)
    return schemas, tuple(tool_names(schemas))


def _texts(value: Any) -> Iterator[str]:
    """All texts in messages, wherever they stand."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _called(messages: Iterable[Message]) -> list[str]:
    """The names of the functions that are called."""
    return [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]


def _reveal(text: str, answers: Sequence[Span], unlearned: int, stand_ins: dict[str, str]) -> Rendered:
    """The text with what its stand-ins stand for, and every span where it is then."""
    parts, spelled, place = [], [], [0]
    for character in text:
        part = stand_ins.get(character, character)
        if part is not character:
            spelled.append((place[-1], place[-1] + len(part)))
        parts.append(part)
        place.append(place[-1] + len(part))
    return Rendered("".join(parts), [(place[start], place[end]) for start, end in answers], spelled, unlearned)


def _roles(messages: Sequence[Message], most: int = 8) -> str:
    return ", ".join(message["role"] for message in messages[:most]) + (", …" if len(messages) > most else "")
