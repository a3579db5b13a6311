"""What tokenizing tells of the data: what is cut and learned, how well the tokenizer fits, how rows fill sequences."""

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from finetune_api.report import PackingReport, SplitTokens, TextTokens
from finetune_api.spec import Task

from finetune_trainer.data.examples import Example, spoken_texts
from finetune_trainer.data.split import Split
from finetune_trainer.data.store import SplitManifest

if TYPE_CHECKING:
    from finetune_trainer.data.tokenize import Encoded, Encoder

SAMPLED_ROWS = 1_000
"""Training rows whose texts are measured by themselves, spread evenly over all."""

STEP_ROWS = 32
PACKED_ROWS = 512 * STEP_ROWS
"""Random rows that packing is tried on, in steps of so many."""

UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters."""

WIDE_MARKS = re.compile("[\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]")


def count_words(text: str) -> int:
    """Words by white space; each letter of a script that has none between words is one."""
    if text.isascii():
        return len(text.split())
    spaced = WIDE_MARKS.sub(" ", text)
    unspaced = len(UNSPACED.findall(spaced))
    return len((UNSPACED.sub(" ", spaced) if unspaced else spaced).split()) + unspaced


@dataclass
class _Texts:
    rows: int = 0
    tokens: int = 0
    words: int = 0
    characters: int = 0
    unknown: int = 0


class TokenStatistics:
    """Counts rows as they are encoded. `train_rows`: about how many training rows there will be."""

    def __init__(self, encoder: "Encoder", train_rows: int) -> None:
        self._encoder = encoder
        self._every = max(1, train_rows // SAMPLED_ROWS)
        self._train_rows = 0
        self._random = random.Random(0)
        self._sample: list[tuple[int, ...]] = []  # tokens of the documents of some training rows, each as likely
        self._answers_cut: Counter[Split] = Counter()
        self._unlearned: Counter[Split] = Counter()
        self._texts = _Texts()

    def add(self, split: Split, example: Example, encoded: "Encoded") -> None:
        self._answers_cut[split] += encoded.answer_cut
        self._unlearned[split] += encoded.unlearned
        if split is Split.TRAIN:
            if self._train_rows % self._every == 0:
                self._measure(spoken_texts(example))
            self._train_rows += 1
            self._draw(tuple(len(document.input_ids) for document in encoded.row.documents))

    def _draw(self, row: tuple[int, ...]) -> None:
        """Algorithm R (Vitter 1985): a sample of rows whose number is not known before."""
        if len(self._sample) < PACKED_ROWS:
            self._sample.append(row)
        elif (place := self._random.randrange(self._train_rows)) < PACKED_ROWS:
            self._sample[place] = row

    def _measure(self, texts: list[str]) -> None:
        tokens, unknown = self._encoder.count_tokens(texts)
        self._texts.rows += 1
        self._texts.tokens += tokens
        self._texts.unknown += unknown
        self._texts.words += sum(map(count_words, texts))
        self._texts.characters += sum(map(len, texts))

    def splits(self, manifests: Mapping[str, SplitManifest], task: Task) -> dict[str, SplitTokens]:
        """What is learned and what is cut, by split."""
        generates = task is Task.GENERATION
        return {
            name: SplitTokens(
                rows=split.rows,
                tokens=split.tokens,
                supervised_tokens=split.supervised_tokens if generates else None,
                supervised_share=_share(split.supervised_tokens, split.tokens) if generates else None,
                truncated_rows=split.truncated_rows,
                truncated_share=_share(split.truncated_rows, split.rows),
                answers_cut=self._answers_cut[Split(name)] if generates else None,
                answers_not_learned=self._unlearned[Split(name)] if generates else None,
            )
            for name, split in manifests.items()
        }

    def packing(self, max_length: int, task: Task, paired: bool) -> PackingReport | None:
        """Of the training rows; None if there are none."""
        return measure_packing(np.array(self._sample, np.int32).ravel(), max_length, task, paired)

    def texts(self) -> TextTokens | None:
        """How well the tokenizer fits the texts; None if there are none."""
        found = self._texts
        if not found.tokens or not found.words:
            return None
        return TextTokens(
            sampled_rows=found.rows,
            tokens_per_word=round(found.tokens / found.words, 3),
            characters_per_token=round(found.characters / found.tokens, 3),
            unknown_share=_share(found.unknown, found.tokens) if self._encoder.has_unknown_token else None,
        )


def truncation_policy(max_length: int, task: Task, paired: bool = False) -> str:
    """What becomes of rows that are too long, for people."""
    if task is Task.CLASSIFICATION:
        return (
            f"A text of more than {max_length} tokens loses its end; what the tokenizer puts around a text is kept, "
            "and so is the label."
        )
    what = "Each of the two documents of a pair" if paired else "A row"
    return (
        f"{what} of more than {max_length} tokens loses its end, so the prompt stays whole and the answer is cut, "
        "with its end-of-text token; a row of which no answer would be left is rejected: nothing left to learn."
    )


def measure_packing(
    documents: npt.NDArray[np.int32], max_length: int, task: Task, paired: bool
) -> PackingReport | None:
    """How full sequences of `max_length` tokens are, by the functions that cut the steps of the training; None without
    rows. A pair takes two of them. documents: tokens of each, in the order of the rows.
    """
    from finetune_trainer.train.micro_batches import packs, padded_groups  # torch is here by now

    if not len(documents):
        return None
    per_row = 2 if paired else 1
    size = max_length * per_row
    rows = documents.reshape(-1, per_row)
    sample = np.random.default_rng(0).permutation(rows)[:PACKED_ROWS]
    lengths, padded_lengths = sample.sum(axis=1, dtype=np.int32), sample.max(axis=1) * np.int32(per_row)
    packed = padded = 0
    for start in range(0, len(sample), STEP_ROWS):
        step = np.arange(start, min(start + STEP_ROWS, len(sample)))
        packed += size * len(packs(step, lengths, size))
        groups = padded_groups(step, padded_lengths, size)
        padded += sum(len(group) * int(padded_lengths[group].max()) for group in groups)
    real = int(lengths.sum())
    return PackingReport(
        sampled_rows=len(sample),
        packed=_share(real, packed) if task is Task.GENERATION else None,
        padded=_share(real, padded),
        fixed=_share(real, size * len(sample)),
    )


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
