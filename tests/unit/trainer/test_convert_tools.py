"""Tool calls in rows: what becomes of them, what is refused, and which of their texts are changed."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetune_api.dataset import CleanSpec, DataFormat, PersonalDataAction, PersonalDataSpec
from finetune_api.plan import PlanPersonalData, PlanSource
from finetune_trainer.data.clean import Cleaner, CleaningLog
from finetune_trainer.data.convert import Unwanted, convert_row
from finetune_trainer.data.examples import Conversation, Preference, ToolCall, Turn, map_texts, spoken_texts
from finetune_trainer.data.personal_data.protect import PersonalDataLog, Protector
from finetune_trainer.data.read import RawRow, Rejection, read_rows
from finetune_trainer.data.split import input_key, whole_key
from finetune_trainer.data.work import Packed
from finetune_trainer.fetch import SourceFile
from hypothesis import given
from hypothesis import strategies as st

SOURCE = PlanSource.model_validate({"location": {"uri": "file://a"}, "field": "dataset.sources[0]"})
FUNCTION = {"name": "find", "description": "Finds", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def user(content: Any = "q") -> dict:
    return {"role": "user", "content": content}


def call(arguments: Any = '{"x": 1}', name: Any = "find", **more: Any) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*each: Any, **more: Any) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(each), **more}


def result(content: Any = "r", id: Any = "c1", **more: Any) -> dict:
    return {"role": "tool", "content": content, "tool_call_id": id, **more}


END = {"role": "assistant", "content": "a"}


def convert(messages: Any, format: DataFormat = DataFormat.MESSAGES, **columns: Any) -> Conversation | Rejection:
    return convert_row(RawRow(1, {"messages": messages, **columns}), SOURCE, format)


def test_calls_and_results_of_openai():
    found = convert([user(), calls(call()), result(name="find"), END], tools=[TOOL])
    assert found == Conversation(
        (
            Turn("user", "q"),
            Turn("assistant", "", (ToolCall("find", {"x": 1}, "c1"),)),
            Turn("tool", "r", (), "c1", "find"),
            Turn("assistant", "a"),
        ),
        tools=json.dumps([TOOL]),
    )


@pytest.mark.parametrize("written", [{"x": 1}, '{"x": 1}', '{\n "x":1}\n'])
def test_arguments_may_be_an_object_or_its_json(written):
    assert convert([user(), calls(call(written))]).turns[1].calls == (ToolCall("find", {"x": 1}, "c1"),)


@pytest.mark.parametrize(
    "tools",
    [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION])],
    ids=["whole", "bare", "text", "bare text"],
)
def test_tools_may_be_bare_or_text(tools):
    assert convert([user(), END], tools=tools).tools == json.dumps([TOOL])


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_are_no_tools(tools):
    assert convert([user(), calls(call())], tools=tools).tools == ""


def test_results_belong_to_calls_by_id_or_by_order():
    two = calls(call('{"n": 1}', id="a"), call('{"n": 2}', id="b"))
    by_id = convert([user(), two, result("2", "b"), result("1", "a"), END])
    assert [turn.call_id for turn in by_id.turns[2:4]] == ["b", "a"]
    without = [{**one, "id": None} for one in two["tool_calls"]]
    by_order = convert([user(), calls(*without), result("1", None), result("2", None), END])
    assert [c.id for c in by_order.turns[1].calls] == ["call_1", "call_2"] == [t.call_id for t in by_order.turns[2:4]]
    assert {turn.name for turn in by_order.turns[2:4]} == {"find"}


def test_what_an_old_api_or_a_tool_says_in_few_words():
    spoken = convert([user(), calls(call(), content="one moment"), result(""), END])
    assert [turn.content for turn in spoken.turns] == ["q", "one moment", "", "a"]
    assert convert([user(), {**END, "tool_calls": None}]).turns[1] == Turn("assistant", "a")
    assert convert([user(), {**END, "tool_calls": []}]).turns[1] == Turn("assistant", "a")


@pytest.mark.parametrize("mark", ['<tool_call>{"name": "find"}</tool_call>', "[TOOL_CALLS] []", "<|python_tag|>find()"])
def test_a_call_may_be_written_as_text(mark):
    found = convert([user(), {"role": "assistant", "content": mark}, result("r", None), result("s", None), END])
    assert found.turns[2] == Turn("tool", "r")


def share(*turns: tuple[str, Any]) -> list[dict]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


def test_calls_of_share_gpt():
    one = json.dumps({"name": "find", "arguments": {"x": "y"}})
    found = convert(
        share(("system", "s"), ("human", "q"), ("function_call", one), ("observation", "r"), ("gpt", "a")),
        DataFormat.SHARE_GPT,
        tools=json.dumps([FUNCTION]),
    )
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.turns[2] == Turn("assistant", "", (ToolCall("find", {"x": "y"}, "call_1"),))
    assert found.turns[3] == Turn("tool", "r", (), "call_1", "find")
    both = convert(
        share(("user", "q"), ("gpt", "let me see"), ("function_call", f"[{one}, {one}]"), ("tool", "r"), ("tool", ""),
              ("assistant", "a")), DataFormat.SHARE_GPT)  # fmt: skip
    assert [(turn.content, len(turn.calls)) for turn in both.turns] == [
        ("q", 0), ("let me see", 2), ("r", 0), ("", 0), ("a", 0)]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user(), calls(call(), content=7)], "content is not text"),
        ([user(None), calls(call())], "content is missing"),
        ([user(), {"role": "assistant", "content": None}], "content is missing"),
        ([user(), {"role": "assistant", "content": None, "tool_calls": []}], "content is missing"),
        ([user(), calls(call()), result(None), END], "content is missing"),
        ([user(), calls(call("{x: 1}"))], "arguments are not valid"),
        ([user(), calls(call(""))], "arguments are not valid"),
        ([user(), calls(call("[1]"))], "arguments are not valid"),
        ([user(), calls(call('"x"'))], "arguments are not valid"),
        ([user(), calls(call('{"x": NaN}'))], "arguments are not valid"),
        ([user(), calls(call('{"x": 1, "x": 2}'))], "arguments are not valid"),
        ([user(), calls(call('{"x":' * 101 + "1" + "}" * 101))], "arguments are not valid"),
        ([user(), calls(call({"x": "\ud800"}))], "not Unicode"),
        ([user(), calls(call('{"x": "\\ud800"}'))], "not Unicode"),
        ([user(), calls(call([{"x": 1}]))], "arguments are not valid"),
        ([user(), calls(call({"x": b"bytes"}))], "arguments are not valid"),
        ([user(), calls(call(None))], "arguments are missing"),
        ([user(), calls({"id": "c1", "type": "function", "function": {"name": "find"}})], "arguments are missing"),
        ([user(), calls(call(name=None))], "tool calls are not valid"),
        ([user(), calls(call(name=""))], "tool calls are not valid"),
        ([user(), calls(call(name='find", "x'))], "tool calls are not valid"),
        ([user(), calls(call(name="x" * 129))], "tool calls are not valid"),
        ([user(), calls(call(type="custom"))], "tool calls are not valid"),
        ([user(), calls("find")], "tool calls are not valid"),
        ([user(), {**calls(), "tool_calls": {"name": "find"}}], "tool calls are not valid"),
        ([user(), {**calls(), "tool_calls": "find()"}], "tool calls are not valid"),
        ([user(), calls(call(id=7))], "id is not text"),
        ([user(), calls(call(), call())], "tool call id is not unique"),
        ([{**user(), "tool_calls": [call()]}, END], "role is not valid"),
        ([result(), END], "tool answers no call"),
        ([user(), result(), END], "tool answers no call"),
        ([user(), END, result(), END], "tool answers no call"),
        ([user(), calls(call()), user(), result(), END], "tool answers no call"),
        ([user(), calls(call()), result(), result(), END], "tool answers no call"),
        ([user(), calls(call()), result(), END, result(), END], "tool answers no call"),
        ([user(), calls(call()), result(name="lose"), END], "tool answers no call"),
        ([user(), calls(call()), result(id="c2"), END], "tool call id is unknown"),
        ([user(), calls(call(), call(id="c2")), result(), result(), END], "tool call id is unknown"),
        ([user(), calls(call()), result(id=1), END], "tool_call_id is not text"),
        ([user(), calls(call()), result()], "messages do not end with the assistant"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_calls_is_named(messages, reason):
    found = convert(messages)
    assert isinstance(found, Rejection)
    assert found.reason == reason
    assert "message" in found.reason + found.detail


@pytest.mark.parametrize(
    "tools",
    ["find", "[", {"x": 1}, 7, ["find"], [7], [{}], [{"function": None}], [{"function": {"name": 1}}], [{"name": ""}],
     [TOOL, FUNCTION], [{**FUNCTION, "parameters": {"x": float("nan")}}], '[{"name": "find", "name": "find"}]'],
)  # fmt: skip
def test_tools_that_are_none_are_refused(tools):
    assert convert([user(), END], tools=tools).reason == "tools are not valid"


def test_only_listed_tools_may_be_called():
    found = convert([user(), calls(call(name="lose"))], tools=[TOOL])
    assert (found.reason, found.detail) == (
        "called tool is unknown",
        "message 2 calls a function that tools does not list",
    )


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("human", "q"), ("function_call", "find()")], "tool calls are not valid"),
        ([("human", "q"), ("function_call", None)], "tool calls are not valid"),
        ([("human", "q"), ("function_call", "[]")], "tool calls are not valid"),
        ([("human", "q"), ("function_call", '{"name": "find", "arguments": "x"}')], "arguments are not valid"),
        ([("human", "q"), ("function_call", '{"name": "find"}')], "arguments are missing"),
        ([("human", "q"), ("observation", "r"), ("gpt", "a")], "tool answers no call"),
        ([("human", "q"), ("GPT", "a")], "role is not valid"),
        ([("human", "q"), (None, "a")], "role is not valid"),
        ([("human", "q"), (["gpt"], "a")], "role is not valid"),
        ([("human", "q"), ("system", "s"), ("gpt", "a")], "role is not valid"),
    ],
)
def test_what_is_wrong_with_share_gpt_is_named(turns, reason):
    assert convert(share(*turns), DataFormat.SHARE_GPT).reason == reason


def test_nothing_that_is_said_of_bad_calls_quotes_them():
    secret = "hunter2"
    rows = [
        [user(), calls(call(f'{{"{secret}"'))],
        [user(), calls(call(name=f"{secret} {secret}"))],
        [user(), calls(call(name=secret))],
        [user(), calls(call()), result(id=secret), END],
        [user(), calls(call()), result(name=secret), END],
        [user(), calls(call(type=secret))],
    ]
    for messages in rows:
        found = convert(messages, tools=[TOOL])
        assert secret not in found.reason + found.detail


def test_pairs_may_call_tools():
    worse = calls(call('{"x": 2}'))
    row = {"prompt": [user()], "chosen": [calls(call())], "rejected": [worse], "tools": [TOOL]}
    pair = convert_row(RawRow(1, row), SOURCE, DataFormat.PREFERENCE)
    assert isinstance(pair, Preference)
    assert (pair.chosen.given, pair.chosen.tools) == (1, json.dumps([TOOL]))
    assert pair.rejected.turns[1].calls[0].arguments == {"x": 2}
    same = convert_row(RawRow(1, {**row, "rejected": [calls(call({"x": 1}))]}), SOURCE, DataFormat.PREFERENCE)
    assert same.reason == "chosen and rejected are the same"


def test_a_table_gives_no_object_the_keys_of_others(tmp_path):
    """Parquet has one schema: each call has the arguments of all others, as nulls."""
    text = {"type": "string"}
    tool = {**FUNCTION, "parameters": {"type": "object", "properties": {"x": text}}}
    rows = [
        {"messages": [user(), calls(call({"x": 1, "deep": {"a": None, "b": [{"c": 1}]}}))], "tools": [tool]},
        {
            "messages": [user(), calls(call({"y": "z"}), content="so"), result(), END],
            "tools": [{"name": "find", "parameters": {"properties": {"y": text}}, "strict": True}],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [
        convert_row(row, SOURCE, DataFormat.MESSAGES)
        for row in read_rows(SourceFile("f", "file://a.parquet", tmp_path / "a.parquet"))
    ]
    assert found[0].turns[1].calls[0].arguments == {"x": 1, "deep": {"b": [{"c": 1}]}}
    assert found[1].turns[1].calls[0].arguments == {"y": "z"}
    assert [json.loads(talk.tools)[0]["function"] for talk in found] == [
        tool,
        {"name": "find", "parameters": {"properties": {"y": text}}, "strict": True},
    ]


TALK = convert(
    [
        user("ask me@here.org"),
        calls(call({"to": "you@there.org", "cc": ["ÃŸ", {"card": 4111111111111111}], "n": 3, "on": True, "no": None})),
        result("sent to you@there.org"),
        END,
    ],
    tools=[{**FUNCTION, "description": "mail to a@b.org"}],
)


def test_personal_data_is_found_in_arguments():
    settings = PersonalDataSpec(action=PersonalDataAction.REDACT)
    log = PersonalDataLog("Redact")
    safe = Protector(PlanPersonalData(settings=settings)).protect(TALK, log)
    assert isinstance(safe, Conversation)
    assert safe.turns[1].calls[0] == ToolCall(
        "find", {"to": "[EMAIL]", "cc": ["ÃŸ", {"card": "[CREDIT_CARD]"}], "n": 3, "on": True, "no": None}, "c1"
    )
    assert log.found == {"Email": 3, "CreditCard": 1}
    assert safe.turns[2] == Turn("tool", "sent to [EMAIL]", (), "c1", "find")
    assert safe.tools == TALK.tools


def test_arguments_are_cleaned_and_a_silent_call_is_not_empty():
    cleaner = Cleaner(CleanSpec(repair_encoding=True, normalize_whitespace=True, drop_lines=["^q$"]))
    cleaned = cleaner.clean(TALK, CleaningLog(cleaner.names))
    assert isinstance(cleaned, Conversation)
    assert cleaned.turns[1].calls[0].arguments["cc"][0] == "ß"
    emptied = convert([user(), calls(call()), result(), END])
    log = CleaningLog(cleaner.names)
    assert cleaner.clean(emptied, log) == Unwanted("empty once cleaned")


def test_equal_calls_are_equal_rows_whatever_their_ids_and_tools():
    one, other = (convert([user(), calls(call(id=i)), result(id=i), END], tools=[TOOL]) for i in ("a", "b"))
    assert whole_key(one) == whole_key(other)
    more = convert([user(), calls(call()), result(), END], tools=[TOOL, {"name": "lose"}])
    assert input_key(more) == input_key(one)
    assert whole_key(more) != whole_key(one)
    changed = convert([user(), calls(call({"x": 2})), result(), END], tools=[TOOL])
    assert whole_key(changed) != whole_key(one)
    assert input_key(changed) != input_key(one)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_any_arguments_come_back_as_they_were(arguments):
    """From JSON, through processes, and through a change of texts that changes nothing."""
    written = json.dumps(arguments)
    arguments = json.loads(written)
    if "\\ud" in written:
        return  # halves of surrogate pairs are refused
    found = convert([user(), calls(call(written))])
    assert found.turns[1].calls[0].arguments == arguments
    assert Packed.pack([found]).unpack() == [found]
    assert map_texts(found, lambda text: text) == found
    assert all(isinstance(text, str) for text in spoken_texts(found))
