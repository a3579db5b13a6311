"""MinHash signatures: how much of two texts is the same, told from a few numbers of each.

Compared are sets of three words in a row, without case and punctuation (but see SIGNS). The share of equal numbers of
two signatures estimates the Jaccard similarity of the sets (Broder 1997), with a standard deviation of at most 0.045.
Those that agree in all numbers of a band are candidates (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
chapter 3).
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from finetune_trainer.data.examples import Conversation, Example, Preference, spoken_texts

NUMBERS = 128
"""Of a signature. 16 bits of each are kept: chance makes one in 65,536 equal."""

SEED = 20261125
WORDS = 3
"""In a row. In a headline of ten words one other word leaves a similarity of 0.45."""

UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts that write no spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese): each character counts as a word."""

MARKS = "".join(mark for mark in map(chr, range(0x300, 0x10000)) if unicodedata.category(mark) in ("Mn", "Mc"))
"""Vowel signs and accents. Python's \\w has none of them, though without them other words of Hindi look the same.
None beyond the basic plane: the pattern would take four times as long."""

LETTERS = rf"[^\W{UNSPACED}]+(?:[{MARKS}]+[^\W{UNSPACED}]*)*"
SIGNS = r"[+<=>±×÷≤≥≠$€£¥%]|#(?<=\w#)|[-−](?<!\w[-−])(?=\d)|[*/](?<=\w [*/])(?= \w)"
"""They count as words: x + y is not x - y, C++ not C#, and -5 % not 5 %."""

WORD = re.compile(rf"{LETTERS}|[{UNSPACED}]|{SIGNS}")
ASCII_WORD = re.compile(rf"\w+|{SIGNS}", re.ASCII)
"""The same, faster, where all is ASCII."""

FOUND = 0.99
"""Least probability that a pair whose estimate is at the threshold becomes a candidate."""


class Signed(NamedTuple):
    """Of a batch of rows: `bands` uint64 [bands, rows], `signatures` uint16 [rows, NUMBERS]."""

    bands: npt.NDArray[np.uint64]
    signatures: npt.NDArray[np.uint16]


def rows_per_band(similarity: float) -> int:
    """The most numbers in a band with which pairs at the threshold are still found."""
    return max(rows for rows in range(1, 33) if 1 - (1 - similarity**rows) ** (NUMBERS // rows) >= FOUND)


def band_count(similarity: float) -> int:
    return NUMBERS // rows_per_band(similarity)


def sign(examples: Sequence[Example], similarity: float) -> Signed:
    """Signatures of all examples, for a search at this similarity (0.5 to 1)."""
    digests = RMinHash.digests_from_token_sets([shingles(example) for example in examples], NUMBERS, SEED)
    numbers = np.array(digests, np.uint32).reshape(-1, NUMBERS).astype(np.uint16)
    rows, bands = rows_per_band(similarity), band_count(similarity)
    parts = numbers[:, : rows * bands].reshape(-1, bands, rows)
    keys = np.zeros(parts.shape[:2], np.uint64)
    for place in range(rows):
        keys = _mix(keys ^ parts[:, :, place])
    return Signed(np.ascontiguousarray(keys.T), numbers)


def shingles(example: Example) -> list[str]:
    """What is compared of an example: all its texts but those of the system, which many rows share."""
    if isinstance(example, Conversation):
        example = Conversation(tuple(turn for turn in example.turns if turn.role != "system"))
    elif isinstance(example, Preference):
        return shingles(example.chosen) + shingles(example.rejected)
    text = "\n".join(spoken_texts(example))
    words = (ASCII_WORD if text.isascii() else WORD).findall(text.casefold())
    if len(words) < WORDS:
        return [" ".join(words) or text.strip()]
    return [" ".join(some) for some in zip(*(words[place:] for place in range(WORDS)), strict=False)]


def _mix(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spreads what differs over all 64 bits (the finalizer of SplitMix64, Steele et al. 2014)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = keys ^ (keys >> np.uint64(31))
    return mixed
