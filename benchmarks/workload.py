"""Makes the model and the rows of a benchmark: seeded, without a network, of the sizes that were asked for.

workload.py FOLDER SIZES.json   ->   FOLDER/model/  train.jsonl  held-out.jsonl
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
WORDS = 20_000
"""Distinct words; their frequencies follow Zipf's law."""
TOKENIZER_WORDS = 400_000
SHORTEST = 16
SUPERVISED = (0.15, 0.55)
"""Smallest and largest share of a row that is the completion."""


class Text:
    """Random text of made-up words."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        words: dict[str, None] = {}
        while len(words) < WORDS:
            pairs = self.random.integers((len(CONSONANTS), len(VOWELS)), size=(self.random.integers(1, 5), 2))
            words["".join(CONSONANTS[first] + VOWELS[second] for first, second in pairs)] = None
        self.words = list(words)
        self.shares = np.cumsum(1 / np.arange(3, WORDS + 3))

    def draw(self, count: int) -> str:
        places = np.searchsorted(self.shares, self.random.random(count) * self.shares[-1])
        return " ".join(self.words[place] for place in places)


def main(folder: Path, sizes: dict[str, float]) -> None:
    text = Text(int(sizes["seed"]))
    sentences = (text.draw(100) for _ in range(TOKENIZER_WORDS // 100))
    tokenizer = save_tokenizer(folder / "model", sentences, int(sizes["vocabulary"]), int(sizes["max_length"]))
    save_model(folder / "model", sizes, len(tokenizer))
    sample = text.draw(5_000)
    tokens_per_word = len(tokenizer(sample)["input_ids"]) / 5_000
    for name, rows in (("train", int(sizes["rows"])), ("held-out", int(sizes["held_out"]))):
        lengths = draw_lengths(text.random, rows, sizes["mean_length"], sizes["sigma"], int(sizes["max_length"]))
        lines = [json.dumps(make_row(text, length / tokens_per_word)) for length in lengths]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_lengths(
    random: np.random.Generator, rows: int, mean: float, sigma: float, longest: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log-normal: the mean of exp(m + sigma * normal) is exp(m + sigma^2 / 2)."""
    drawn = random.lognormal(math.log(mean) - sigma**2 / 2, sigma, rows)
    return np.clip(drawn, SHORTEST, 0.95 * longest)  # the tokens per word vary: so, hardly a row is cut


def make_row(text: Text, words: float) -> dict[str, str]:
    completion = max(1, round(words * text.random.uniform(*SUPERVISED)))
    return {"prompt": text.draw(max(1, round(words) - completion)), "completion": " " + text.draw(completion)}


def save_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int, longest: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, without a chat template: a row is prompt, completion, end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, sizes: dict[str, float], vocabulary: int) -> None:
    hidden, heads = int(sizes["hidden"]), int(sizes["heads"])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=int(sizes["layers"]),
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        intermediate_size=hidden * 11 // 4,
        max_position_embeddings=int(sizes["max_length"]) * 8,  # packs may be longer than rows
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(int(sizes["seed"]))
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
