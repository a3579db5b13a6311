"""How fast similar rows are found, and which: `python benchmarks/duplicates.py [--rows 100000]`.

Texts of 150 words from a seed; a fifth are copies of others in which up to a quarter of the words was changed. What
is found is compared with the exact Jaccard similarity of each copy and its original.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np
from finetune_trainer.data.duplicates.search import SignatureFiles, find_similar
from finetune_trainer.data.duplicates.signatures import shingles, sign
from finetune_trainer.data.examples import PlainText

WORDS = [f"word{number}" for number in range(20_000)]
LENGTH, BATCH = 150, 1000


def make_texts(rows: int, rng: random.Random) -> tuple[list[PlainText], dict[int, int]]:
    """Texts, and of each copy the number of its original."""
    texts: list[PlainText] = []
    originals: dict[int, int] = {}
    for number in range(rows):
        words = rng.choices(WORDS, k=LENGTH)
        if number and rng.random() < 0.2:
            original = rng.randrange(number)
            original = originals.get(original, original)
            words = texts[original].text.split()
            for place in rng.sample(range(LENGTH), rng.randint(0, LENGTH // 12)):
                words[place] = rng.choice(WORDS)
            originals[number] = original
        texts.append(PlainText(" ".join(words)))
    return texts, originals


def similarity(one: PlainText, other: PlainText) -> float:
    first, second = set(shingles(one)), set(shingles(other))
    return len(first & second) / len(first | second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--similarity", type=float, default=0.8)
    options = parser.parse_args()
    texts, originals = make_texts(options.rows, random.Random(0))
    with tempfile.TemporaryDirectory() as folder, SignatureFiles(Path(folder), options.similarity) as files:
        start = time.perf_counter()
        for first in range(0, len(texts), BATCH):
            files.add(sign(texts[first : first + BATCH], options.similarity))
        signed = time.perf_counter()
        found = find_similar(files, np.full(len(texts), -1, np.int16), np.arange(len(texts), dtype=np.int32))
        done = time.perf_counter()
    print(f"{options.rows} rows of {LENGTH} words, similarity {options.similarity}, one process")
    speeds = options.rows / (signed - start), options.rows / (done - signed)
    print("signatures: {:,.0f} rows/s; search: {:,.0f} rows/s".format(*speeds))
    shares = {copy: similarity(texts[copy], texts[original]) for copy, original in originals.items()}
    for low in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        rows = [copy for copy, share in shares.items() if low <= share < low + (0.1 if low < 0.7 else 0.05)]
        if rows:
            hits = sum(bool(found.repeats[row]) for row in rows)
            print(f"true similarity from {low:.2f}: {hits / len(rows):6.1%} of {len(rows)} found")
    others = np.setdiff1d(np.arange(len(texts)), list(originals))
    print(f"texts that are no copies: {int(found.repeats[others].sum())} of {len(others)} found")


if __name__ == "__main__":
    main()
