"""Thoughts, weights, contents in parts and system prompts of chats: what becomes of them, and what is refused."""

from typing import Any

import pytest
from finetune_api.dataset import DataFormat, PersonalDataAction, PersonalDataSpec
from finetune_api.plan import PlanPersonalData, PlanSource
from finetune_trainer.data.convert import convert_row
from finetune_trainer.data.examples import Conversation, Turn, map_texts, spoken_texts
from finetune_trainer.data.personal_data.protect import PersonalDataLog, Protector
from finetune_trainer.data.read import RawRow, Rejection
from finetune_trainer.data.split import whole_key
from finetune_trainer.data.work import Packed

SOURCE = PlanSource.model_validate({"location": {"uri": "file://a"}, "field": "dataset.sources[0]"})


def user(content: Any = "q") -> dict:
    return {"role": "user", "content": content}


END = {"role": "assistant", "content": "a"}


def convert(messages: Any, format: DataFormat = DataFormat.MESSAGES, **columns: Any) -> Conversation | Rejection:
    return convert_row(RawRow(1, {"messages": messages, **columns}), SOURCE, format)


def test_thoughts_and_weights_of_the_assistant():
    found = convert([user(), {**END, "weight": 0}, user(), {**END, "reasoning_content": "hm", "weight": 1}])
    assert found == Conversation(
        (
            Turn("user", "q"),
            Turn("assistant", "a", learned=False),
            Turn("user", "q"),
            Turn("assistant", "a", thoughts="hm"),
        )
    )
    shouted = map_texts(found, str.upper)
    assert isinstance(shouted, Conversation)
    assert shouted.turns[3] == Turn("assistant", "A", thoughts="HM")
    assert not shouted.turns[1].learned
    assert "hm" in spoken_texts(found)
    assert whole_key(found) != whole_key(convert([user(), {**END, "weight": 0}, user(), END]))
    assert Packed.pack([found]).unpack() == [found]


@pytest.mark.parametrize("key", ["reasoning", "thinking"])
def test_other_names_for_thoughts(key):
    assert convert([user(), {**END, key: "hm", "reasoning_content": None}]) == Conversation(
        (Turn("user", "q"), Turn("assistant", "a", thoughts="hm"))
    )


def test_personal_data_in_thoughts_is_replaced():
    settings = PersonalDataSpec(action=PersonalDataAction.REDACT)
    protector = Protector(PlanPersonalData(settings=settings))
    found = convert([user(), {**END, "reasoning_content": "mail anna@example.com"}])
    protected = protector.protect(found, PersonalDataLog(PersonalDataAction.REDACT))
    assert isinstance(protected, Conversation)
    assert protected.turns[1].thoughts == "mail [EMAIL]"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**END, "weight": 2}, "weight is not valid"),
        ({**END, "weight": "0"}, "weight is not valid"),
        ({**END, "weight": 0}, "no answer is learned"),
        ({**END, "reasoning_content": 3}, "reasoning_content is not text"),
        ({**END, "content": [{"type": "image_url", "image_url": {}}]}, "content is not text"),
        ({**END, "content": [{"type": "text", "text": 3}]}, "content is not text"),
        ({**END, "content": [3]}, "content is not text"),
        ({**END, "content": []}, "content is empty"),
    ],
)
def test_an_answer_of_which_nothing_can_be_learned(message, reason):
    refused = convert([user(), message])
    assert isinstance(refused, Rejection) and refused.reason == reason


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert convert([user(parts), {**END, "content": parts}]) == Conversation(
        (Turn("user", "a b"), Turn("assistant", "a b"))
    )


@pytest.mark.parametrize("form", [DataFormat.MESSAGES, DataFormat.SHARE_GPT])
def test_a_column_for_the_system_prompt(form):
    said = [("human", "q"), ("gpt", "a")] if form is DataFormat.SHARE_GPT else [("user", "q"), ("assistant", "a")]
    keys = ("from", "value") if form is DataFormat.SHARE_GPT else ("role", "content")
    messages = [dict(zip(keys, each, strict=True)) for each in said]
    expected = Conversation((Turn("system", "be brief"), Turn("user", "q"), Turn("assistant", "a")))
    assert convert(messages, form, system="be brief") == expected
    begun = [dict(zip(keys, ("system", "be brief"), strict=True)), *messages]
    assert convert(begun, form, system="be brief") == expected
    refused = convert(begun, form, system="be long")
    assert isinstance(refused, Rejection) and refused.reason == "system is given twice"
    for nothing in ("", None):
        assert convert(messages, form, system=nothing) == Conversation(expected.turns[1:])


def test_a_weight_in_share_gpt():
    messages = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}] * 2
    messages[3] = {"from": "gpt", "value": "a"}
    found = convert(messages, DataFormat.SHARE_GPT)
    assert isinstance(found, Conversation)
    assert [turn.learned for turn in found.turns] == [True, False, True, True]
