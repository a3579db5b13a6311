"""Tiny models in Hugging Face layout: made in a second, without a network, always the same weights."""

import re
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LETTERS = string.ascii_lowercase + string.digits

SENTENCES = [
    "profit rises as sales grow beyond the forecast",
    "the company cuts its outlook after a weak quarter",
    "shares fall on a loss that was wider than expected",
    "the board meets on monday to discuss the results",
    "question and answer: what is the capital of a country?",
    "hello, how are you today? i am fine, thank you.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def save_tiny_bert(folder: Path, context_length: int = 128) -> Path:
    """A 2-layer encoder of width 32 with a lower-case WordPiece tokenizer, and no classification head."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # a trained WordPiece vocabulary is another one at every training: ties are broken by a hash
    words = sorted({word for sentence in SENTENCES for word in re.findall(r"[a-z]+", sentence)} - set(LETTERS))
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *string.punctuation, *words]
    vocabulary = {piece: position for position, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=context_length,
        pad_token_id=special.index("[PAD]"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def save_tiny_llama(folder: Path, context_length: int = 256) -> Path:
    """A 2-layer decoder of width 32 with a byte-level BPE tokenizer and a chat template that marks answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.chat_template = CHAT_TEMPLATE
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=32, **ids)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """A 2-layer decoder of width 32 whose linear layers store their weights transposed, with the tokenizer of the Llama."""
    save_tiny_llama(folder)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_tiny_bloom(folder: Path) -> Path:
    """A 2-layer decoder of width 32 whose attention cannot be packed, with dropout and the tokenizer of the Llama."""
    save_tiny_llama(folder)
    config = BloomConfig(
        vocab_size=320, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BloomForCausalLM(config).save_pretrained(folder)
    return folder
