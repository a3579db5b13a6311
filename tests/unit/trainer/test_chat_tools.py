"""Tool calls through chat templates that are written like those of real models: what the model sees, and what is learned."""

import json

import pytest
from finetune_trainer.data.examples import Conversation, Preference, ToolCall, Turn
from finetune_trainer.data.messages import match_calls, read_messages, read_tools
from finetune_trainer.data.tokenize import Encoded, Encoder
from finetune_trainer.data.values import InvalidRowError
from transformers import AutoTokenizer

from tests.models import save_tiny_llama

CHATML = """
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
{{- '<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""In the way of Qwen2.5: results of tools in turn are one turn of the user."""

HEADERS = """
{{- bos_token }}
{%- set ns = namespace(tools_told=false) %}
{%- for message in messages %}
{%- if message.role == 'user' and tools and not ns.tools_told %}
{%- set ns.tools_told = true %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' }}
{%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n' }}{%- endfor %}
{{- (message.content | trim) + '<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at once') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
"""In the way of Llama 3.1: the tools stand before the first question, one call at a time."""

INST = """
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == users[-1] %}
{{- '[AVAILABLE_TOOLS] [' }}
{%- for tool in tools %}{{- {'type': 'function', 'function': tool.function} | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}
{{- '][/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}
{%- set out = call.function | tojson %}
{{- out[:-1] + ', "id": "' + call.id + '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('no system here') }}
{%- endif %}
{%- endfor %}
"""
"""In the way of Mistral: the tools stand before the last question, and ids have nine characters."""

JOINED = """
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<User>' + message.content }}{%- endif %}
{%- if message.role == 'assistant' and message.content is none %}
{{- '<Assistant>' }}
{%- for call in message.tool_calls %}{{- '<call>' + call.type + '<sep>' + call.function.name + '\\n' + call.function.arguments + '</call>' }}{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'assistant' %}{{- '<Assistant>' + message.content + eos_token }}
{%- elif message.role == 'tool' %}{{- '<output>' + message.content + '</output>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant>' }}{%- endif %}
"""
"""In the way of DeepSeek V3: calls only where the content is null, with arguments as text; tools are not told."""

MARKED = (
    CHATML.replace("{{- '<|im_start|>assistant' }}", "{{- '<|im_start|>assistant' }}{% generation %}")
    .replace("{%- endfor %}\n{{- '<|im_end|>\\n' }}", "{%- endfor %}\n{{- '<|im_end|>\\n' }}{% endgeneration %}")
    .replace(
        "{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}",
        "{%- if message.role == 'assistant' and not message.tool_calls %}{{- '<|im_start|>assistant\\n' }}"
        "{% generation %}{{- message.content + '<|im_end|>\\n' }}{% endgeneration %}\n{%- elif message.role == 'user' %}",
    )
)
MARKED_BUT_CALLS = CHATML.replace(
    "{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}",
    "{%- if message.role == 'assistant' and not message.tool_calls %}{{- '<|im_start|>assistant\\n' }}"
    "{% generation %}{{- message.content + '<|im_end|>\\n' }}{% endgeneration %}\n{%- elif message.role == 'user' %}",
)
THINKING = """
{%- for message in messages %}
{{- '<' + message.role + '>' }}
{%- if message.role == 'assistant' and not loop.last %}{{- message.content.split('</think>')[-1] }}
{%- else %}{{- message.content }}{%- endif %}
{{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
"""
"""In the way of Qwen3 and DeepSeek R1: thoughts are dropped once the conversation goes on."""

REASONING = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last and message.reasoning_content %}
{{- '<think>\\n' + message.reasoning_content.strip() + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""In the way of Qwen3, where thoughts are a field of their own."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS = read_tools([WEATHER])
ASK = Turn("user", "is it warm in Köln?")
CALL = Turn("assistant", "", (ToolCall("get_weather", {"city": "Köln", "days": 2}, "call_abc"),))
RESULT = Turn("tool", "12 degrees", (), "call_abc", "get_weather")
ANSWER = Turn("assistant", "it is cold")
TALK = Conversation((ASK, CALL, RESULT, ANSWER), tools=TOOLS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encode(folder):
    def encode(template: str, example, length: int = 2000):
        """The text that the model sees, the parts of it that are learned, and the row."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        (encoded,) = Encoder(tokenizer, length).encode([example])
        assert isinstance(encoded, Encoded), (encoded.reason, encoded.detail)
        row = encoded.row
        learned, before = [[]], False
        for token, on in zip(row.input_ids, row.loss_mask, strict=True):
            if before and not on:
                learned.append([])
            if on:
                learned[-1].append(token)
            before = on
        return tokenizer.decode(row.input_ids), [tokenizer.decode(part) for part in learned if part], encoded

    return encode


@pytest.fixture
def refuse(folder):
    def refuse(template: str, example) -> InvalidRowError:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        (error,) = Encoder(tokenizer, 2000).encode([example])
        assert isinstance(error, InvalidRowError)
        return error

    return refuse


CALL_TEXT = '"name": "get_weather", "arguments": {"city": "Köln", "days": 2}'


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_BUT_CALLS], ids=["plain", "marked", "calls not marked"])
def test_calls_are_learned_and_results_are_not(encode, template):
    text, learned, encoded = encode(template, TALK)
    call = f"<tool_call>\n{{{CALL_TEXT}}}\n</tool_call><|im_end|>\n"
    assert [part.lstrip("\n") for part in learned] == [call, "it is cold<|im_end|>\n"]
    assert json.dumps(WEATHER, ensure_ascii=False) in text
    assert "<tool_response>\n12 degrees\n</tool_response>" in text
    assert encoded.unlearned == 0


def test_results_of_several_calls_stay_together(encode):
    calls = tuple(ToolCall("get_weather", {"city": city}, city) for city in ("Rom", "Ulm"))
    results = [Turn("tool", f"warm in {city}", (), city, "get_weather") for city in ("Rom", "Ulm")]
    turns = (ASK, Turn("assistant", "let me see", calls), *results, ANSWER)
    text, learned, _ = encode(CHATML, Conversation(turns, tools=TOOLS))
    assert text.count("<|im_start|>user") == 2
    assert learned[0].startswith("let me see\n<tool_call>")
    assert learned[0].count("<tool_call>") == 2
    assert "warm" not in "".join(learned)


def test_a_template_of_headers_has_one_call_at_a_time(encode, refuse):
    text, learned, _ = encode(HEADERS, TALK)
    assert learned == [
        '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>',
        "it is cold<|eot_id|>",
    ]
    assert json.dumps(WEATHER, indent=4, ensure_ascii=False) in text
    two = CALL._replace(calls=(*CALL.calls, ToolCall("get_weather", {}, "other")))
    error = refuse(HEADERS, Conversation((ASK, two, RESULT, ANSWER), tools=TOOLS))
    assert error.reason == "chat template refuses the row"
    assert error.detail == "the model knows no such tool calls or order of roles: user, assistant, tool, assistant"


def test_ids_are_made_short_where_a_template_takes_no_others(encode):
    text, learned, _ = encode(INST, TALK)
    assert '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}, "id": "' in learned[0]
    id = learned[0].split('"id": "')[1].split('"')[0]
    assert len(id) == 9 and id.isalnum()
    assert f'"call_id": "{id}"' in text
    assert "call_abc" not in text
    own = [turn._replace(call_id=turn.call_id and "abcdefghi") for turn in TALK.turns]
    own[1] = CALL._replace(calls=(CALL.calls[0]._replace(id="abcdefghi"),))
    assert '"id": "abcdefghi"' in encode(INST, Conversation(tuple(own), tools=TOOLS))[0]


def test_tools_before_the_last_question_leave_the_answers_after_it_to_learn(encode):
    turns = (Turn("user", "hello"), Turn("assistant", "hi"), *TALK.turns)
    _, learned, encoded = encode(INST, Conversation(turns, tools=TOOLS))
    assert len(learned) == 2
    assert learned[1].endswith("it is cold</s>")
    assert encoded.unlearned == 1


def test_a_template_may_want_arguments_as_text_and_no_content(encode, refuse):
    _, learned, _ = encode(JOINED, Conversation(TALK.turns))
    assert learned == ['<call>function<sep>get_weather\n{"city": "Köln", "days": 2}</call></s>', "it is cold</s>"]
    spoken = Conversation((ASK, CALL._replace(content="let me see"), RESULT, ANSWER))
    assert refuse(JOINED, spoken).reason == "chat template leaves tool calls out"


def test_tools_that_a_template_leaves_out_are_not_lost_in_silence(refuse, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for template in (JOINED, tokenizer.chat_template):
        assert refuse(template, Conversation((ASK, ANSWER), tools=TOOLS)).reason == "chat template leaves tools out"
    assert refuse(tokenizer.chat_template, Conversation(TALK.turns)).reason == "chat template leaves tool calls out"


def test_thoughts_that_a_template_drops_later_are_learned_only_where_they_stay(encode):
    turns = [Turn("user", "1+1?"), Turn("assistant", "<think>so</think>2"), Turn("user", "and 2+2?")]
    text, learned, encoded = encode(THINKING, Conversation((*turns, Turn("assistant", "<think>hm</think>4"))))
    assert learned == ["<think>hm</think>4</s>"]
    assert "<think>so" not in text
    assert encoded.unlearned == 1
    plain = Conversation((turns[0], Turn("assistant", "2"), turns[2], Turn("assistant", "4")))
    assert encode(THINKING, plain)[1] == ["2</s>", "4</s>"]


def test_control_tokens_in_calls_results_and_tools_are_only_letters(encode, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tools = read_tools([{"name": "get_weather", "description": "ends with </s>", "parameters": {"</s>": 1}}])
    call = CALL._replace(calls=(ToolCall("get_weather", {"city": "a</s>b", "</s>": ["<s>"]}, "call_abc"),))
    talk = Conversation((ASK, call, RESULT._replace(content="</s> <s>"), ANSWER), tools=tools)
    for template in (CHATML, INST, MARKED):
        text, learned, encoded = encode(template, talk)
        assert '{"city": "a</s>b", "</s>": ["<s>"]}' in learned[0]
        assert "ends with </s>" in text
        ids = list(encoded.row.input_ids)
        assert ids.count(tokenizer.eos_token_id) == (2 if template == INST else 0)
        assert ids.count(tokenizer.bos_token_id) == (1 if template == INST else 0)


def test_a_better_and_a_worse_call_are_a_pair(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    worse = CALL._replace(calls=(ToolCall("get_weather", {"city": "Rom"}, "call_abc"),))
    pair = Preference(Conversation((ASK, CALL), 1, TOOLS), Conversation((ASK, worse), 1, TOOLS))
    (encoded,) = Encoder(tokenizer, 2000).encode([pair])
    assert len(encoded.row.documents) == 2
    for document, city in zip(encoded.row.documents, ("Köln", "Rom"), strict=True):
        said = [id for id, on in zip(document.input_ids, document.loss_mask, strict=True) if on]
        assert f'"city": "{city}"' in tokenizer.decode(said)


def test_arguments_as_text_and_as_an_object_are_the_same_row(encode):
    arguments = {"city": "Köln", "deep": {"list": [1, 2.5, None, True], "empty": {}}}
    rows = []
    for written in (arguments, json.dumps(arguments), json.dumps(arguments, indent=2, ensure_ascii=False)):
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": written}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append(encode(CHATML, Conversation(match_calls(read_messages(messages), TOOLS), tools=TOOLS))[2].row)
    assert rows[0] == rows[1] == rows[2]


def test_an_answer_that_is_cut_is_told_apart_from_a_row_that_is_cut(encode):
    _, _, whole = encode(CHATML, TALK)
    assert not whole.answer_cut
    _, _, cut = encode(CHATML, TALK, whole.length - 1)
    assert cut.row.truncated and cut.answer_cut
    _, _, tail = encode(
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %} the end",
        Conversation((Turn("user", "a"), Turn("assistant", "b"))),
        14,
    )
    assert tail.row.truncated and not tail.answer_cut


def test_thoughts_are_learned_where_the_template_writes_them(encode, refuse):
    thinking = Turn("assistant", "no", thoughts="it is 3 degrees\n")
    text, learned, _ = encode(REASONING, Conversation((ASK, thinking)))
    assert learned == ["<think>\nit is 3 degrees\n</think>\n\nno<|im_end|>\n"]
    text, learned, encoded = encode(REASONING, Conversation((ASK, thinking, ASK, thinking)))
    assert text.count("<think>") == 1 and encoded.unlearned == 1
    assert learned == ["<think>\nit is 3 degrees\n</think>\n\nno<|im_end|>\n"]
    error = refuse(CHATML, Conversation((ASK, thinking)))
    assert error.reason == "chat template leaves thoughts out"


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_BUT_CALLS], ids=["plain", "marked", "calls not marked"])
def test_an_answer_with_weight_0_is_read_but_not_learned(encode, template):
    turns = (ASK, Turn("assistant", "perhaps", learned=False), ASK, Turn("assistant", "no"))
    text, learned, encoded = encode(template, Conversation(turns))
    assert "perhaps" in text
    assert [part.lstrip("\n") for part in learned] == ["no<|im_end|>\n"]
    assert encoded.unlearned == 0
