"""What the model sees of a row, and what of it has a loss."""

import pytest
from finetune_trainer.data.examples import Conversation, LabelledText, PlainText, Preference, PromptCompletion, Turn
from finetune_trainer.data.tokenize import Encoded, Encoder
from finetune_trainer.data.values import InvalidRowError
from finetune_trainer.errors import UserError
from tokenizers import processors
from transformers import AutoTokenizer

from tests.models import save_tiny_bert, save_tiny_llama

UNMARKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'user' or loop.last %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}" + UNMARKED


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_tiny_bert(root / "bert"), save_tiny_llama(root / "llama")


@pytest.fixture
def bert(folders):
    return AutoTokenizer.from_pretrained(folders[0])


@pytest.fixture
def llama(folders):
    return AutoTokenizer.from_pretrained(folders[1])


@pytest.fixture
def plain(llama):
    """A base model's tokenizer: it has no chat template."""
    llama.chat_template = None
    return llama


def with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def encode(encoder: Encoder, *examples) -> list[Encoded]:
    results = encoder.encode(examples)
    assert not any(isinstance(result, InvalidRowError) for result in results)
    return results


def supervised(tokenizer, encoded: Encoded) -> str:
    row = encoded.row
    return tokenizer.decode([i for i, learned in zip(row.input_ids, row.loss_mask, strict=True) if learned])


def whole(tokenizer, encoded: Encoded) -> str:
    return tokenizer.decode(encoded.row.input_ids)


def test_a_classified_text_is_framed_and_has_its_class_id(bert):
    encoder = Encoder(bert, 128, ["bad", "good"])
    one, two = encode(encoder, LabelledText("Profit rises", "good"), LabelledText("shares fall", "bad"))
    assert whole(bert, one) == "[CLS] profit rises [SEP]"
    assert (one.row.label, two.row.label) == (1, 0)
    assert not one.row.truncated
    assert one.length == len(one.row.input_ids)


def test_a_long_text_loses_its_end_but_not_its_frame(bert):
    (cut,) = encode(Encoder(bert, 5, ["a", "b"]), LabelledText("profit rises as sales grow", "a"))
    assert whole(bert, cut) == "[CLS] profit rises as [SEP]"
    assert cut.row.truncated
    assert cut.length == 7
    bert.truncation_side = "left"
    (again,) = encode(Encoder(bert, 5, ["a", "b"]), LabelledText("profit rises as sales grow", "a"))
    assert again == cut


def test_a_text_that_the_tokenizer_drops_is_rejected(bert):
    results = Encoder(bert, 128, ["a"]).encode([LabelledText("\u200b\u200e", "a"), LabelledText("sales", "a")])
    assert results[0].reason == "text has no tokens"
    assert isinstance(results[1], Encoded)


def test_control_tokens_in_a_text_are_only_letters(bert, plain):
    (row,) = encode(Encoder(bert, 128, ["a", "b"]), LabelledText("sales [SEP] grow", "a"))
    assert list(row.row.input_ids).count(bert.sep_token_id) == 1
    examples = [PlainText("a </s> b"), PromptCompletion("a <s> </s>", "b </s> c")]
    for encoded in encode(Encoder(plain, 128), *examples):
        assert list(encoded.row.input_ids).count(plain.eos_token_id) == 1
        assert encoded.row.input_ids[-1] == plain.eos_token_id
        assert plain.bos_token_id not in encoded.row.input_ids


def test_text_is_learned_as_a_whole_with_its_end(plain):
    (encoded,) = encode(Encoder(plain, 128), PlainText("sales grow"))
    assert whole(plain, encoded) == "sales grow</s>"
    assert encoded.row.loss_mask == [False] + [True] * (len(encoded.row.input_ids) - 1)


def test_a_tokenizers_own_beginning_is_kept(plain):
    with_bos(plain)
    text, prompt = encode(Encoder(plain, 128), PlainText("sales"), PromptCompletion("sales", " grow"))
    assert whole(plain, text) == "<s>sales</s>"
    assert supervised(plain, text) == "sales</s>"
    assert whole(plain, prompt) == "<s>sales grow</s>"
    assert supervised(plain, prompt) == " grow</s>"


def test_only_the_completion_is_learned(plain):
    (encoded,) = encode(Encoder(plain, 128), PromptCompletion("question: what?\n", "the answer"))
    assert whole(plain, encoded) == "question: what?\nthe answer</s>"
    assert supervised(plain, encoded) == "the answer</s>"


def test_the_prompt_has_the_tokens_that_it_has_alone(plain):
    """Two letters that are one token together: the model never writes the second after the first."""
    first, second = next(
        piece for piece in sorted(plain.get_vocab()) if len(piece) == 2 and piece.isalpha() and piece.isascii()
    )
    assert len(plain(first + second)["input_ids"]) == 1
    (encoded,) = encode(Encoder(plain, 128), PromptCompletion(first, second))
    assert len(encoded.row.input_ids) == 3
    assert supervised(plain, encoded) == f"{second}</s>"


def test_rows_are_cut_at_their_end_and_rejected_if_nothing_is_left(plain):
    encoder = Encoder(plain, 12)
    short, cut = encode(encoder, PromptCompletion("a", "b"), PromptCompletion("a", "profit " * 20))
    assert not short.row.truncated
    assert cut.row.truncated
    assert len(cut.row.input_ids) == 12
    assert cut.length > 12
    (refused,) = encoder.encode([PromptCompletion("profit " * 40, "b")])
    assert refused.reason == "nothing left to learn"
    assert "12 tokens" in refused.detail
    assert "profit" not in refused.detail


CONVERSATION = Conversation(
    (
        Turn("system", "be brief"),
        Turn("user", "hello"),
        Turn("assistant", "hi there"),
        Turn("user", "how are you"),
        Turn("assistant", "fine"),
    )
)


def test_only_what_the_template_marks_is_learned(llama):
    (encoded,) = encode(Encoder(llama, 256), CONVERSATION)
    assert whole(llama, encoded).startswith("<|system|>\nbe brief\n<|user|>\nhello\n<|assistant|>\nhi there</s>\n")
    assert supervised(llama, encoded) == "hi there</s>fine</s>"


def test_without_marks_an_answer_is_what_the_text_grows_by(llama):
    llama.chat_template = UNMARKED
    (encoded,) = encode(Encoder(llama, 256), CONVERSATION)
    assert supervised(llama, encoded) == "hi there</s>\nfine</s>\n"


def test_answers_that_a_template_rewrites_later_are_counted_and_not_learned(llama):
    llama.chat_template = FORGETFUL
    many, one = encode(Encoder(llama, 256), CONVERSATION, PromptCompletion("hello", "hi"))
    assert (supervised(llama, many), many.unlearned) == ("<|assistant|>fine</s>", 1)
    assert (supervised(llama, one), one.unlearned) == ("<|assistant|>hi</s>", 0)


def test_a_template_that_hides_all_answers_is_told_of(llama):
    llama.chat_template = "{{ '!' if add_generation_prompt }}{{ messages[-1]['content'] }}"
    (refused,) = Encoder(llama, 256).encode([CONVERSATION])
    assert refused.reason == "chat template hides the answers"
    assert "{% generation %}" in refused.detail


def test_a_row_that_the_template_refuses_costs_only_itself(llama):
    llama.chat_template = STRICT
    refused, fine = Encoder(llama, 256).encode([CONVERSATION, PromptCompletion("hello", "hi")])
    assert refused.reason == "chat template refuses the row"
    assert "system, user, assistant" in refused.detail
    assert supervised(llama, fine) == "hi</s>\n"


def test_prompts_become_a_users_turn_where_there_is_a_template(llama):
    (encoded,) = encode(Encoder(llama, 256), PromptCompletion("hello\n\n", " hi "))
    assert whole(llama, encoded) == "<|user|>\nhello\n<|assistant|>\nhi</s>\n"
    assert supervised(llama, encoded) == "hi</s>"


def answers(tokenizer, encoded: Encoded) -> list[str]:
    """What has a loss in the chosen and in the rejected document."""
    return [supervised(tokenizer, encoded._replace(row=document)) for document in encoded.row.documents]


def test_a_pair_is_two_documents_that_are_learned_after_their_prompt(plain):
    pair = Preference(PromptCompletion("what? ", "sales"), PromptCompletion("what? ", "a loss"))
    (encoded,) = encode(Encoder(with_bos(plain), 128), pair)
    assert [plain.decode(row.input_ids) for row in encoded.row.documents] == [
        "<s>what? sales</s>",
        "<s>what? a loss</s>",
    ]
    assert answers(plain, encoded) == ["sales</s>", "a loss</s>"]
    assert encoded.length == sum(len(row.input_ids) for row in encoded.row.documents)


@pytest.mark.parametrize("template", [None, UNMARKED], ids=["marked", "unmarked"])
def test_the_answers_that_both_of_a_pair_were_given_are_not_learned(llama, template):
    llama.chat_template = template or llama.chat_template
    worse = Conversation((*CONVERSATION.turns[:-1], Turn("assistant", "go away")), 4)
    (encoded,) = encode(Encoder(llama, 256), Preference(Conversation(CONVERSATION.turns, 4), worse))
    end = "</s>\n" if template else "</s>"
    assert answers(llama, encoded) == [f"fine{end}", f"go away{end}"]


def test_a_pair_with_nothing_to_tell_apart_is_refused(plain):
    pairs = [
        Preference(PromptCompletion("what? ", "a" * 20), PromptCompletion("what? ", "a" * 20 + "b")),
        Preference(PromptCompletion("what? " * 20, "b"), PromptCompletion("what? " * 20, "a")),
    ]
    same, empty = Encoder(plain, 16).encode(pairs)
    assert same.reason == "chosen and rejected are the same"
    assert (empty.reason, empty.detail) == ("nothing left to learn", "chosen: its prompt alone fills the 16 tokens")


def test_kinds_may_be_mixed_and_keep_their_order(llama):
    examples = [PlainText("one"), CONVERSATION, PlainText("three"), PromptCompletion("a", "b")]
    results = encode(Encoder(llama, 256), *examples)
    assert [whole(llama, r)[:5] for r in results] == ["one</", "<|sys", "three", "<|use"]
    assert Encoder(llama, 256).encode([]) == []


def test_messages_need_a_template(plain):
    with pytest.raises(UserError, match="no chat template"):
        Encoder(plain, 256).encode([CONVERSATION])


def test_a_tokenizer_that_knows_more_than_the_model_is_found_out(plain):
    assert encode(Encoder(plain, 256, vocabulary_size=len(plain)), PlainText("sales"))
    with pytest.raises(UserError, match="the model knows only 10"):
        Encoder(plain, 256, vocabulary_size=10).encode([PlainText("sales")])


def test_control_tokens_in_a_conversation_are_only_letters(llama):
    turns = (Turn("user", "say </s>"), Turn("assistant", "</s><s> is it</s>"))
    for template in (llama.chat_template, UNMARKED):
        llama.chat_template = template
        (encoded,) = encode(Encoder(llama, 256), Conversation(turns))
        ids = encoded.row.input_ids
        assert whole(llama, encoded) == "<|user|>\nsay </s></s>\n<|assistant|>\n</s><s> is it</s></s>\n".replace(
            "say </s></s>", "say </s></s>" if template == UNMARKED else "say </s>"
        )
        assert ids.count(llama.eos_token_id) == (2 if template == UNMARKED else 1)
        assert ids.count(llama.bos_token_id) == 0
        assert supervised(llama, encoded).startswith("</s><s> is it</s></s>")
        learned = [id for id, on in zip(ids, encoded.row.loss_mask, strict=True) if on]
        assert learned.count(llama.eos_token_id) == 1


def test_a_row_that_has_the_private_characters_itself_is_encoded_as_it_is(llama):
    text = "\U000f0000 and </s>"
    (encoded,) = encode(Encoder(llama, 256), PromptCompletion(text, "fine"))
    assert f"\n{text}\n" in whole(llama, encoded)
    assert encoded.row.input_ids.count(llama.eos_token_id) == 1
