"""Which rows can be learned from, in every format, and what is said about the others."""

import json
from pathlib import Path

import pytest
from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanSource
from finetune_trainer.data.convert import convert_row, find_columns, recognise_format, usable_columns, usable_formats
from finetune_trainer.data.examples import (
    Conversation,
    Example,
    LabelledText,
    PlainText,
    Preference,
    PromptCompletion,
    Turn,
    example_texts,
)
from finetune_trainer.data.read import Rejection, read_rows
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile
from hypothesis import given
from hypothesis import strategies as st

from tests.plans import make_plan

CLASSIFICATION, GENERATION, PREFERENCE = (
    usable_formats(make_plan(Path("unused"), **changes))
    for changes in ({}, {"task": "Generation"}, {"task": "Generation", "dpo": {"beta": 0.1}})
)


@pytest.fixture
def write(tmp_path):
    def write(*rows: dict, name: str = "a.jsonl", text: str | None = None) -> SourceFile:
        path = tmp_path / name
        path.write_text(text if text is not None else "".join(json.dumps(row) + "\n" for row in rows))
        return SourceFile("dataset.sources[1]", f"file://{name}", path)

    return write


def source(format: DataFormat | None = None, **columns: str) -> PlanSource:
    return PlanSource.model_validate(
        {"location": {"uri": "file://a"}, "field": "dataset.sources[1]", "format": format, "columns": columns}
    )


def convert(file: SourceFile, format: DataFormat, **columns: str) -> list:
    """Examples, and (reason, detail) of what was rejected."""
    results = converted(file, source(format, **columns), format)
    return [(row.reason, row.detail) if isinstance(row, Rejection) else row for row in results]


def converted(file: SourceFile, source: PlanSource, format: DataFormat) -> list[Example | Rejection]:
    rows = read_rows(file, usable_columns(source))
    return [row if isinstance(row, Rejection) else convert_row(row, source, format) for row in rows]


SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
WORSE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away"}]


def preferred(*prompt: Turn, better: str = "hello", worse: str = "go away") -> Preference:
    """A pair of conversations that differ in their last turn."""
    answers = (Turn("assistant", better), Turn("assistant", worse))
    return Preference(*(Conversation((*prompt, answer), len(prompt)) for answer in answers))


@pytest.mark.parametrize(
    ("row", "format", "example"),
    [
        ({"headline": "up", "sentiment": " good "}, DataFormat.LABELLED_TEXT, LabelledText("up", "good")),
        ({"text": "up", "label": 3}, DataFormat.LABELLED_TEXT, LabelledText("up", "3")),
        ({"text": "up", "label": 3.0}, DataFormat.LABELLED_TEXT, LabelledText("up", "3")),
        ({"text": "up", "label": True}, DataFormat.LABELLED_TEXT, LabelledText("up", "true")),
        ({"content": "up"}, DataFormat.TEXT, PlainText("up")),
        ({"prompt": "q ", "response": "a"}, DataFormat.PROMPT_COMPLETION, PromptCompletion("q ", "a")),
        ({"instruction": "do", "output": "x"}, DataFormat.ALPACA, PromptCompletion("do\n\n", "x")),
        ({"instruction": "do", "input": "", "output": "x"}, DataFormat.ALPACA, PromptCompletion("do\n\n", "x")),
        ({"instruction": "do", "input": "it", "output": "x"}, DataFormat.ALPACA, PromptCompletion("do\n\nit\n\n", "x")),
        ({"messages": CHAT}, DataFormat.MESSAGES, Conversation((Turn("user", "hi"), Turn("assistant", "hello")))),
        (
            {"conversations": json.dumps(CHAT)},
            DataFormat.MESSAGES,
            Conversation((Turn("user", "hi"), Turn("assistant", "hello"))),
        ),
        (
            {"conversations": SHARE},
            DataFormat.SHARE_GPT,
            Conversation((Turn("user", "hi"), Turn("assistant", "hello"))),
        ),
        (
            {"messages": json.dumps(SHARE)},
            DataFormat.SHARE_GPT,
            Conversation((Turn("user", "hi"), Turn("assistant", "hello"))),
        ),
        (
            {"question": "who?", "context": "I said it.", "answer": "I"},
            DataFormat.QUESTION_CONTEXT_ANSWER,
            PromptCompletion("I said it.\n\nwho?\n\n", "I"),
        ),
        (
            {"question": "who?", "answers": {"text": ["I", "me"], "answer_start": [0, 0]}, "text": "no"},
            DataFormat.QUESTION_CONTEXT_ANSWER,
            PromptCompletion("who?\n\n", "I"),
        ),
        (
            {"question": "who?", "context": None, "answers": [{"text": "I", "answer_start": 0}]},
            DataFormat.QUESTION_CONTEXT_ANSWER,
            PromptCompletion("who?\n\n", "I"),
        ),
        (
            {"prompt": "q ", "chosen": "a", "rejected": "b"},
            DataFormat.PREFERENCE,
            Preference(PromptCompletion("q ", "a"), PromptCompletion("q ", "b")),
        ),
        ({"chosen": CHAT, "rejected": WORSE}, DataFormat.PREFERENCE, preferred(Turn("user", "hi"))),
        ({"prompt": "hi", "chosen": CHAT, "rejected": WORSE}, DataFormat.PREFERENCE, preferred(Turn("user", "hi"))),
        (
            {"prompt": "hi", "chosen": CHAT[1:], "rejected": WORSE[1:]},
            DataFormat.PREFERENCE,
            preferred(Turn("user", "hi")),
        ),
        (
            {"prompt": CHAT[:1], "chosen": "hello", "rejected": WORSE},
            DataFormat.PREFERENCE,
            preferred(Turn("user", "hi")),
        ),
        (
            {"chosen": CHAT, "rejected": CHAT + WORSE},  # the longer one goes on where the other ends
            DataFormat.PREFERENCE,
            Preference(
                Conversation((Turn("user", "hi"), Turn("assistant", "hello")), 1),
                Conversation(
                    (Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "hi"), Turn("assistant", "go away")),
                    1,
                ),
            ),
        ),
        (
            {"chosen": [*CHAT, *CHAT], "rejected": [*CHAT, *WORSE]},
            DataFormat.PREFERENCE,
            preferred(Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "hi")),
        ),
    ],
)
def test_a_good_row_becomes_an_example_and_its_format_is_recognised(write, row, format, example):
    file = write(row)
    usable = {DataFormat.LABELLED_TEXT: CLASSIFICATION, DataFormat.PREFERENCE: PREFERENCE}.get(format, GENERATION)
    assert recognise_format(file, source(), usable) is format
    assert convert(file, format) == [example]


def test_named_columns_win_over_the_usual_ones(write):
    file = write({"text": "no", "body": "yes", "label": "l", "prompt": "p", "completion": "c"})
    assert convert(file, DataFormat.LABELLED_TEXT, text="body") == [LabelledText("yes", "l")]
    assert recognise_format(file, source(text="body"), GENERATION) is DataFormat.TEXT
    assert recognise_format(file, source(), GENERATION) is DataFormat.PROMPT_COMPLETION


def chat(*turns: tuple) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "format", "reason"),
    [
        ({"text": "a"}, DataFormat.LABELLED_TEXT, "label is missing"),
        ({"text": "a", "label": None}, DataFormat.LABELLED_TEXT, "label is missing"),
        ({"text": "a", "label": "  "}, DataFormat.LABELLED_TEXT, "label is empty"),
        ({"text": "a", "label": 0.5}, DataFormat.LABELLED_TEXT, "label is not text"),
        ({"text": "a", "label": ["x"]}, DataFormat.LABELLED_TEXT, "label is not text"),
        ({"text": "a", "label": "x" * 129}, DataFormat.LABELLED_TEXT, "label is too long"),
        ({"text": 5, "label": "x"}, DataFormat.LABELLED_TEXT, "text is not text"),
        ({"text": "\n ", "label": "x"}, DataFormat.LABELLED_TEXT, "text is empty"),
        ({"text": "a\ud800", "label": "x"}, DataFormat.LABELLED_TEXT, "not Unicode"),
        ({"prompt": "a", "completion": ""}, DataFormat.PROMPT_COMPLETION, "completion is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, DataFormat.ALPACA, "input is not text"),
        ({"messages": "[oops"}, DataFormat.MESSAGES, "messages are not valid"),
        ({"messages": {"role": "user"}}, DataFormat.MESSAGES, "messages are not valid"),
        ({"messages": []}, DataFormat.MESSAGES, "messages are not valid"),
        ({"messages": ["hi"]}, DataFormat.MESSAGES, "messages are not valid"),
        ({"messages": None}, DataFormat.MESSAGES, "messages is missing"),
        (chat(("user", "a")), DataFormat.MESSAGES, "messages do not end with the assistant"),
        (chat(("human", "a"), ("assistant", "b")), DataFormat.MESSAGES, "role is not valid"),
        (chat((["user"], "a"), ("assistant", "b")), DataFormat.MESSAGES, "role is not valid"),
        (chat(("user", "a"), ("system", "x"), ("assistant", "b")), DataFormat.MESSAGES, "role is not valid"),
        (chat(("user", "a"), ("assistant", None)), DataFormat.MESSAGES, "content is missing"),
        (chat(("user", ""), ("assistant", "b")), DataFormat.MESSAGES, "content is empty"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, DataFormat.MESSAGES, "messages are not valid"),
        ({"messages": SHARE}, DataFormat.MESSAGES, "role is not valid"),
        ({"messages": CHAT}, DataFormat.SHARE_GPT, "role is not valid"),
        ({"messages": [{"from": "human", "value": 7}]}, DataFormat.SHARE_GPT, "value is not text"),
        ({"messages": [SHARE[0], {"from": "gpt", "value": ""}]}, DataFormat.SHARE_GPT, "value is empty"),
        ({"messages": SHARE[:1]}, DataFormat.SHARE_GPT, "messages do not end with the assistant"),
        ({"messages": [*SHARE, {"from": "system"}]}, DataFormat.SHARE_GPT, "value is missing"),
        ({"question": "q", "answer": None}, DataFormat.QUESTION_CONTEXT_ANSWER, "answer is missing"),
        ({"question": "q", "answers": {"text": []}}, DataFormat.QUESTION_CONTEXT_ANSWER, "answer is missing"),
        ({"question": "q", "answers": []}, DataFormat.QUESTION_CONTEXT_ANSWER, "answer is missing"),
        ({"question": "q", "answers": {"texts": ["a"]}}, DataFormat.QUESTION_CONTEXT_ANSWER, "answer is not text"),
        ({"question": "q", "answers": {"text": [""]}}, DataFormat.QUESTION_CONTEXT_ANSWER, "answer is empty"),
        ({"question": "", "answer": "a"}, DataFormat.QUESTION_CONTEXT_ANSWER, "question is empty"),
        ({"question": "q", "context": 1, "answer": "a"}, DataFormat.QUESTION_CONTEXT_ANSWER, "context is not text"),
        ({"chosen": "a", "rejected": "b"}, DataFormat.PREFERENCE, "prompt is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, DataFormat.PREFERENCE, "rejected is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, DataFormat.PREFERENCE, "chosen and rejected are the same"),
        ({"chosen": CHAT, "rejected": CHAT}, DataFormat.PREFERENCE, "chosen and rejected are the same"),
        ({"chosen": CHAT, "rejected": WORSE[:1]}, DataFormat.PREFERENCE, "rejected does not end with the assistant"),
        ({"chosen": CHAT, "rejected": None}, DataFormat.PREFERENCE, "rejected is missing"),
        ({"chosen": CHAT, "rejected": [{"role": "user"}]}, DataFormat.PREFERENCE, "content is missing"),
        ({"chosen": CHAT[1:], "rejected": WORSE[1:]}, DataFormat.PREFERENCE, "prompt is missing"),
        (
            {"prompt": [{"role": "system", "content": "be kind"}], "chosen": CHAT, "rejected": WORSE},
            DataFormat.PREFERENCE,
            "chosen and rejected do not begin with the prompt",
        ),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason(write, row, format, reason):
    ((found, detail),) = convert(write(row), format)
    assert found == reason
    if format is DataFormat.MESSAGES and "content" in reason:
        assert "message" in detail


def test_the_line_of_a_bad_row_is_told(write):
    file = write({"text": "a", "label": "x"}, {"text": "a"})
    assert [r.line for r in converted(file, source(), DataFormat.LABELLED_TEXT) if isinstance(r, Rejection)] == [2]


def test_missing_columns_of_a_table_are_told_at_once_with_the_remedy(write):
    file = write(name="a.csv", text="title,class\nsecret text,x\n")
    with pytest.raises(UserError) as caught:
        recognise_format(file, source(), CLASSIFICATION)
    assert "text, sentence" not in caught.value.message
    assert "a column for text (text or sentence or headline or content)" in caught.value.message
    assert "label" not in caught.value.message
    assert "dataset.sources[1].columns" in caught.value.message
    assert "secret" not in caught.value.message
    with pytest.raises(UserError, match=r"a column for label \(topic\)"):
        recognise_format(write(name="a.csv", text="text,class\na,x\n"), source(label="topic"), CLASSIFICATION)


def test_a_csv_without_a_header_is_not_quoted(write):
    with pytest.raises(UserError) as caught:
        recognise_format(write(name="a.csv", text="my salary is 5,good\nx,y\n"), source(), CLASSIFICATION)
    assert "salary" not in caught.value.message


def test_the_first_row_of_jsonl_may_be_a_bad_one(write):
    file = write({"text": "no label"}, {"text": "a", "label": "x"})
    assert recognise_format(file, source(), CLASSIFICATION) is DataFormat.LABELLED_TEXT
    file = write(text='oops\n{"text": "a"}\n')
    assert recognise_format(file, source(), GENERATION) is DataFormat.TEXT


def test_the_form_of_messages_is_told_by_the_first_row_that_has_some(write):
    rows = [{"conversations": None}, {"conversations": []}, {"conversations": [{"x": 1}]}, {"conversations": SHARE}]
    assert recognise_format(write(*rows), source(), GENERATION) is DataFormat.SHARE_GPT
    assert recognise_format(write(*rows[:3]), source(), GENERATION) is DataFormat.MESSAGES
    assert recognise_format(write(rows[3]), source(DataFormat.MESSAGES), GENERATION) is DataFormat.MESSAGES
    file = write({"talk": SHARE, "text": "x"})
    assert recognise_format(file, source(messages="talk"), GENERATION) is DataFormat.SHARE_GPT
    late = write({"text": "x"}, {"talk": SHARE})
    assert recognise_format(late, source(messages="talk"), GENERATION) is DataFormat.SHARE_GPT


def test_the_columns_of_a_format_are_found(write):
    file = write({"question": "q", "passage": "c", "answers": {"text": ["a"]}, "text": "x", "id": 7})
    found = find_columns(file, source(context="passage"), DataFormat.QUESTION_CONTEXT_ANSWER)
    assert found == {"question": "question", "answer": "answers", "context": "passage"}
    assert find_columns(write(text="\n"), source(), DataFormat.TEXT) == {}


def test_columns_that_fit_no_format_and_files_without_rows_are_named(write):
    with pytest.raises(UserError, match=r"a\.jsonl line 1: .*Messages needs .*Text needs"):
        recognise_format(write({"x": 1}), source(), GENERATION)
    with pytest.raises(UserError, match=r"a\.jsonl has no rows"):
        recognise_format(write(text="\n\n"), source(), GENERATION)


def test_pairs_without_dpo_are_told_what_they_need_and_dpo_what_its_rows_need(write):
    pairs = write({"question": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=r"a\.jsonl line 1: pairs of a chosen and a rejected answer .* method\.dpo"):
        recognise_format(pairs, source(), GENERATION)
    with pytest.raises(
        UserError, match=r"Preference needs a column for chosen \(better\) and .* rejected \(rejected\)"
    ):
        recognise_format(write(name="a.csv", text="prompt,completion\na,b\n"), source(chosen="better"), PREFERENCE)
    assert recognise_format(pairs, source(prompt="question"), PREFERENCE) is DataFormat.PREFERENCE


WORDS = [
    *(
        "user",
        "assistant",
        "tool",
        "role",
        "content",
        "text",
        "label",
        "messages",
        "input",
        "tool_calls",
        "tool_call_id",
    ),
    *("function", "name", "arguments", "id", "type", "from", "value", "human", "gpt", "function_call", "observation"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.sampled_from(list(DataFormat)),
    st.dictionaries(
        st.sampled_from(
            [
                "text",
                "label",
                "messages",
                "prompt",
                "completion",
                "instruction",
                "input",
                "output",
                "chosen",
                "rejected",
                "tools",
                "question",
                "context",
                "answers",
            ]
        ),
        JSON,
    ),
)
def test_no_row_breaks_a_converter(tmp_path_factory, format, row):
    path = tmp_path_factory.mktemp("wild") / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (item,) = converted(SourceFile("f", "file://a.jsonl", path), source(format), format)
    assert isinstance(item, Rejection) or example_texts(item)
