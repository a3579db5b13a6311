"""What a config says about a model, for the families that say it in different ways."""

from types import SimpleNamespace

import pytest
from finetune_api.spec import Task
from finetune_trainer.errors import UserError
from finetune_trainer.model.facts import check_task, check_tokenizer, context_length
from transformers import AutoConfig


def config(model_type: str, **settings):
    return AutoConfig.for_model(model_type, **settings)


def tokenizer(**settings):
    return SimpleNamespace(**{"model_max_length": 10**30, "eos_token_id": 1, "pad_token_id": None} | settings)


@pytest.mark.parametrize(
    ("found", "length"),
    [
        (config("bert", max_position_embeddings=512), 512),
        (config("roberta", max_position_embeddings=514, pad_token_id=1), 512),
        (config("xlm-roberta", max_position_embeddings=514, pad_token_id=1), 512),
        (config("gpt2", n_positions=1024), 1024),
        (config("llama", max_position_embeddings=4096), 4096),
        (config("gemma3", text_config={"max_position_embeddings": 8192}), 8192),
        (config("bloom"), None),
    ],
)
def test_the_context_is_what_a_model_can_place(found, length):
    assert context_length(found) == context_length(found, tokenizer()) == length


def test_the_tokenizers_limit_counts_too():
    assert context_length(config("llama", max_position_embeddings=4096), tokenizer(model_max_length=512)) == 512
    assert context_length(config("bloom"), tokenizer(model_max_length=512)) == 512


@pytest.mark.parametrize(
    ("found", "task"),
    [
        (config("llama"), Task.GENERATION),
        (config("gpt2", architectures=["GPT2LMHeadModel"]), Task.GENERATION),
        (config("gpt2"), Task.GENERATION),
        (config("bert", architectures=["BertLMHeadModel"], is_decoder=True), Task.GENERATION),
        (config("roberta", architectures=["RobertaForMaskedLM"]), Task.CLASSIFICATION),
        (config("llama"), Task.CLASSIFICATION),
    ],
)
def test_models_that_fit(found, task):
    check_task(found, task)


@pytest.mark.parametrize(
    ("found", "task"),
    [
        (config("bert", architectures=["BertForMaskedLM"]), Task.GENERATION),
        (config("bert"), Task.GENERATION),
        (config("deberta-v2"), Task.GENERATION),
        (config("vit"), Task.CLASSIFICATION),
        (config("clip"), Task.GENERATION),
    ],
)
def test_models_that_do_not_fit(found, task):
    with pytest.raises(UserError, match=r"model\.uri"):
        check_task(found, task)


def test_a_padding_token_needs_an_embedding():
    check_tokenizer(tokenizer(pad_token_id=9), Task.CLASSIFICATION, 10)
    with pytest.raises(UserError, match="pads with token 10, but it has only 10 embeddings"):
        check_tokenizer(tokenizer(pad_token_id=10), Task.CLASSIFICATION, 10)


def test_a_generation_needs_an_end_of_text():
    check_tokenizer(tokenizer(), Task.GENERATION)
    check_tokenizer(tokenizer(eos_token_id=None), Task.CLASSIFICATION)
    with pytest.raises(UserError, match="end-of-text"):
        check_tokenizer(tokenizer(eos_token_id=None), Task.GENERATION)
