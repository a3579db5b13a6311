"""Lists of messages -> turns: {role, content} and tool calls as OpenAI has them, {from, value} as ShareGPT does."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from finetune_trainer.data.examples import ToolCall, Turn
from finetune_trainer.data.values import InvalidRowError, checked_text, parsed, written

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""ShareGPT's names -> roles."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Where datasets keep what the assistant thinks before it speaks."""

FUNCTION_NAME = re.compile(r"[\w./:-]{1,128}")
WRITTEN_CALL = re.compile(r"tool_?call|function_?call|python_tag", re.IGNORECASE)
"""How a call is marked where it is text like any other: <tool_call>, [TOOL_CALLS], <|python_tag|>."""


def read_messages(messages: Any, place: str = "") -> tuple[Turn, ...]:
    """Turns of messages {role, content}, with tool_calls, thoughts and weight of the assistant, tool_call_id of tools.
    `place` tells, in what is said of bad ones, which messages they are: " of chosen". Raises InvalidRowError.
    """
    return tuple(_each(messages, _message, "{role, content}", place))


def read_share_gpt(messages: Any) -> tuple[Turn, ...]:
    """Turns of messages {from, value}; a function_call is JSON {name, arguments} or a list of them. A text and the
    calls that follow it are one turn. Raises InvalidRowError.
    """
    turns: list[Turn] = []
    for turn in _each(messages, _share_gpt_message, "{from, value}"):
        if turn.calls and turns and turns[-1].role == "assistant" and not turns[-1].calls:
            turns[-1] = turns[-1]._replace(calls=turn.calls)
        else:
            turns.append(turn)
    return tuple(turns)


def is_share_gpt(messages: Any) -> bool | None:
    """Which of the two forms a list of messages has, by its first; None if it has neither."""
    try:
        messages = parsed(messages, "messages")
    except InvalidRowError:
        return None
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict) or not {"role", "from"} & first.keys():
        return None
    return "role" not in first


def read_tools(value: Any) -> str:
    """The functions of a row, a list or its JSON, as `Conversation.tools`. A bare {name, description, parameters}
    becomes {type: function, function: ...}, which is what chat templates expect. Raises InvalidRowError.
    """
    tools = parsed(value, "tools") if value != "" else None
    if not tools and tools in (None, []):
        return ""
    if not isinstance(tools, list):
        raise InvalidRowError("tools are not valid", "not a list of functions")
    wrapped = []
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise InvalidRowError("tools are not valid", f"tool {number} is not an object")
        whole = tool if "function" in tool else {"type": "function", "function": tool}
        function = whole["function"]
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise InvalidRowError("tools are not valid", f"tool {number} has no function with a name")
        wrapped.append(whole)
    names = tool_names(wrapped)
    if len(set(names)) < len(names):
        raise InvalidRowError("tools are not valid", "two have the same name")
    return written(wrapped, "tools")


def tool_names(tools: list[dict[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


@lru_cache(maxsize=64)
def _known_names(tools: str) -> frozenset[str]:
    """Most rows of a source have the same tools."""
    return frozenset(tool_names(json.loads(tools)))


def match_calls(turns: tuple[Turn, ...], tools: str = "") -> tuple[Turn, ...]:
    """The turns, with the call that each tool's turn answers: by its id, or else in the order of the calls. A call
    without an id is given one.

    Raises InvalidRowError for an answer without a call, ids that fit none, and calls of none of the `tools`.
    """
    if not any(turn.calls or turn.role == "tool" for turn in turns):
        return turns
    known = _known_names(tools) if tools else None
    matched: list[Turn] = []
    waiting: list[ToolCall] = []
    as_text = False
    count = 0
    for number, turn in enumerate(turns, start=1):
        if turn.role == "tool" and as_text:
            matched.append(turn)
            continue
        if turn.role == "tool":
            call = _called(waiting, turn, number)
            waiting.remove(call)
            matched.append(turn._replace(call_id=call.id, name=call.name))
            continue
        calls = tuple(c if c.id else c._replace(id=f"call_{n}") for n, c in enumerate(turn.calls, start=count + 1))
        count += len(calls)
        _check_calls(calls, known, number)
        waiting = list(calls)
        as_text = turn.role == "assistant" and not calls and bool(WRITTEN_CALL.search(turn.content))
        matched.append(turn._replace(calls=calls))
    return tuple(matched)


def _called(waiting: list[ToolCall], turn: Turn, number: int) -> ToolCall:
    """The call that a tool's turn answers."""
    found = [call for call in waiting if turn.call_id in (None, call.id)]
    if waiting and not found:
        raise InvalidRowError("tool call id is unknown", f"message {number} answers none of the calls before it")
    named = [call for call in found if turn.name in (None, call.name)]
    if not named:
        detail = "names another function than its call" if found else "is of a tool that was not called"
        raise InvalidRowError("tool answers no call", f"message {number} {detail}")
    return named[0]


def _check_calls(calls: tuple[ToolCall, ...], known: frozenset[str] | None, number: int) -> None:
    if len({call.id for call in calls}) < len(calls):
        raise InvalidRowError("tool call id is not unique", f"message {number} has one twice")
    if known is not None and not all(call.name in known for call in calls):
        raise InvalidRowError("called tool is unknown", f"message {number} calls a function that tools does not list")


def _each(messages: Any, read: Callable[[dict[str, Any]], Turn], form: str, place: str = "") -> list[Turn]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRowError("messages are not valid", f"not a list of {form}{place}")
    turns: list[Turn] = []
    for message in messages:
        try:
            turns.append(_one(message, read, first=not turns))
        except InvalidRowError as error:
            detail = f"message {len(turns) + 1}{place} {error.detail}"
            raise InvalidRowError(error.reason, detail.rstrip()) from None
    return turns


def _one(message: Any, read: Callable[[dict[str, Any]], Turn], first: bool) -> Turn:
    if not isinstance(message, dict):
        raise InvalidRowError("messages are not valid", "is not an object")
    turn = read(message)
    if turn.role == "system" and not first:
        raise InvalidRowError("role is not valid", "is of the system; only the first may be")
    return turn


def _message(message: dict[str, Any]) -> Turn:
    role = message.get("role")
    if role not in ROLES:
        hint = "; {from, value} is format ShareGPT" if role is None and "from" in message else ""
        raise InvalidRowError("role is not valid", f"has none of {', '.join(ROLES)}{hint}")
    calls = _tool_calls(message.get("tool_calls"))
    if calls and role != "assistant":
        raise InvalidRowError("role is not valid", "calls tools, which only the assistant may")
    content = _joined(message.get("content"))
    if calls and content is None:
        content = ""
    may_be_blank = bool(calls) or role == "tool"
    if not (may_be_blank and isinstance(content, str) and not content.strip()):
        content = checked_text(content, "content")
    if role == "tool":
        return Turn(role, content, (), _optional_text(message, "tool_call_id"), _optional_text(message, "name"))
    if role == "assistant":
        return Turn(role, content, calls, thoughts=_thoughts(message), learned=_is_learned(message))
    return Turn(role, content)


def _joined(content: Any) -> Any:
    """The text of a content that is a list of parts {type: text, text}; any other content as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRowError("content is not text", "has a part that is none, such as an image")
    return "".join(part["text"] for part in content)


def _thoughts(message: dict[str, Any]) -> str:
    """What is thought, but for white space."""
    for key in THOUGHTS:
        value = message.get(key)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return checked_text(value, key)
    return ""


def _is_learned(message: dict[str, Any]) -> bool:
    """By OpenAI's `weight`: 1, which need not be written, or 0."""
    weight = message.get("weight")
    if weight is None:
        return True
    if isinstance(weight, int | float) and weight in (0, 1):
        return bool(weight)
    raise InvalidRowError("weight is not valid", "has one that is neither 0 nor 1")


def _share_gpt_message(message: dict[str, Any]) -> Turn:
    speaker = message.get("from")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise InvalidRowError("role is not valid", f"is from none of {', '.join(SPEAKERS)}")
    value = message.get("value")
    if speaker == "function_call":
        calls = parsed(value, "tool calls")
        return Turn(role, "", _tool_calls(calls if isinstance(calls, list) else [calls], needed=True))
    if role == "tool" and isinstance(value, str) and not value.strip():
        return Turn(role, value)
    return Turn(role, checked_text(value, "value"), learned=role != "assistant" or _is_learned(message))


def _tool_calls(value: Any, needed: bool = False) -> tuple[ToolCall, ...]:
    if value is None and not needed:
        return ()
    calls = parsed(value, "tool calls")
    if not isinstance(calls, list) or (needed and not calls):
        raise InvalidRowError("tool calls are not valid", "has no list of them")
    return tuple(map(_tool_call, calls))


def _tool_call(call: Any) -> ToolCall:
    """{id, type, function: {name, arguments}}, or {name, arguments} alone."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise InvalidRowError("tool calls are not valid", "has one that is no call of a function")
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise InvalidRowError("tool calls are not valid", "calls a function without a name, or with one that is none")
    if function.get("arguments") is None:
        raise InvalidRowError("arguments are missing", "a function without parameters is called with {}")
    arguments = parsed(function["arguments"], "arguments")
    if not isinstance(arguments, dict):
        raise InvalidRowError("arguments are not valid", f"not an object, but of type {type(arguments).__name__}")
    written(arguments, "arguments")
    return ToolCall(name, arguments, _optional_text(call, "id") or "")


def _optional_text(message: dict[str, Any], key: str) -> str | None:
    value = message.get(key)
    return None if value is None else checked_text(value, key)
