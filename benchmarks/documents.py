"""Documents as a crawl or an archive has them: `python benchmarks/documents.py FILE [--documents N] [--megabytes M]`.

Words and their order come from the example's headlines, the project's documentation and the sentences by hand (Markov
chains); lengths are log-normal. Some are damaged, in another language, too short, full of repetitions, or have
personal data; some have been there before, wholly or nearly. The same seed gives the same documents.
"""

import argparse
import json
import math
import random
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from bench import ROOT
from finetune_api.dataset import PersonalDataKind as Kind
from personal_data import MARKED, SENTENCES, SENTENCES_BY_HAND, labelled, value

LANGUAGES = {"en": 70, "de": 10, "fr": 8, "es": 7, "nl": 5}
SENTENCE_CHARACTERS = 90
PERSONAL = (Kind.EMAIL, Kind.PHONE, Kind.CREDIT_CARD, Kind.IP_ADDRESS, Kind.SECRET)

TYPOGRAPHIC = 0.4
MOJIBAKE = 0.06
ODD_SPACES = 0.15
CONTROL_CHARACTERS = 0.03
PERSONAL_DATA = 0.2
REPETITIVE = 0.02
TOO_SHORT = 0.02
EXACT_DUPLICATE = 0.05
NEAR_DUPLICATE = 0.05
"""Shares of the documents."""

Chain = dict[tuple[str, ...], list[str]]


def corpus() -> dict[str, list[str]]:
    """Sentences by language."""
    found = defaultdict(list)
    for file in sorted((ROOT / "examples" / "financial-sentiment" / "data").glob("*.jsonl")):
        found["en"] += [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        prose = " ".join(line for line in file.read_text(encoding="utf-8").splitlines() if re.match(r"[A-Z]\w+ ", line))
        found["en"] += re.split(r"(?<=[.:]) (?=[A-Z])", prose.replace("`", "").replace("*", ""))
    for line in SENTENCES_BY_HAND.read_text(encoding="utf-8").splitlines():
        language, _, sentence = line.partition("\t")
        if sentence:
            found[language].append(MARKED.sub("", sentence))
    return dict(found)


def chain(sentences: list[str], order: int) -> Chain:
    """What follows so many words; nothing stands before a sentence and behind it."""
    followers = defaultdict(list)
    for sentence in sentences:
        words = [""] * order + sentence.split() + [""]
        for place in range(len(words) - order):
            followers[tuple(words[place : place + order])].append(words[place + order])
    return dict(followers)


def sentence(followers: Chain, pick: random.Random) -> str:
    order = len(next(iter(followers)))
    words = [""] * order
    while len(words) < 40:
        word = pick.choice(followers[tuple(words[-order:])])
        if not word:
            break
        words.append(word)
    text = " ".join(words[order:])
    return text if text[-1:] in ".!?" else text + "."


class Writer:
    """Writes documents of `mean` characters, or rather half of them shorter than that by `sigma`."""

    def __init__(self, seed: int, sentences: int, median: int, sigma: float) -> None:
        self._pick = pick = random.Random(seed)
        self._median, self._sigma = math.log(median), sigma
        self._sentences = {
            language: [sentence(followers, pick) for _ in range(sentences * LANGUAGES[language] // 100)]
            for language, followers in (
                (language, chain(some, 2 if language == "en" else 1)) for language, some in corpus().items()
            )
        }
        self._values = [labelled(value(pick, kind)).text for kind in PERSONAL for _ in range(300)]

    def documents(self) -> Iterator[str]:
        pick = self._pick
        before: deque[str] = deque(maxlen=1_000)
        while True:
            chance = pick.random()
            if before and chance < EXACT_DUPLICATE:
                yield pick.choice(before)
            elif before and chance < EXACT_DUPLICATE + NEAR_DUPLICATE:
                yield self._nearly(pick.choice(before))
            else:
                before.append(self._document())
                yield before[-1]

    def _document(self) -> str:
        pick = self._pick
        language = pick.choices([*LANGUAGES], [*LANGUAGES.values()])[0]
        length = min(20_000, pick.lognormvariate(self._median, self._sigma))
        parts = pick.choices(self._sentences[language], k=max(2, int(length / SENTENCE_CHARACTERS)))
        if pick.random() < PERSONAL_DATA:
            for _ in range(pick.randint(1, 3)):
                told = pick.choice(SENTENCES).format(pick.choice(self._values))
                parts[pick.randrange(len(parts))] = told
        if pick.random() < REPETITIVE:
            parts = parts[:2] * (4 + len(parts) // 2)
        if pick.random() < TOO_SHORT:
            return parts[0][:15]
        return self._damaged("".join(part + pick.choice(("\n\n", " ", " ", " ", " ")) for part in parts).strip())

    def _damaged(self, text: str) -> str:
        pick = self._pick
        if pick.random() < TYPOGRAPHIC:
            text = text.replace("'", "’").replace(" - ", " – ")
        if pick.random() < ODD_SPACES:
            text = text.replace(" ", pick.choice(("\u00a0", "  ", "\t", "\u2003")), pick.randint(1, 9)) + "  "
        if pick.random() < CONTROL_CHARACTERS:
            place = pick.randrange(len(text))
            text = text[:place] + pick.choice("\u200b\x07\u202e\xad\ufeff") + text[place:]
        if pick.random() < MOJIBAKE:
            text = text.encode().decode("latin-1")
        return text

    def _nearly(self, text: str) -> str:
        """One word in fifty is another one."""
        words = text.split(" ")
        for _ in range(max(1, len(words) // 50)):
            words[self._pick.randrange(len(words))] = self._pick.choice(("however", "2024", "never", "today", "also"))
        return " ".join(words)


def write(file: Path, *, documents: int = 0, megabytes: int = 0, median: int, sigma: float, seed: int) -> None:
    """One JSON object per line, until there are so many documents or MB."""
    writer = Writer(seed, min(200_000, documents or megabytes * 1_000), median, sigma)
    size = 0
    with file.open("w", encoding="utf-8") as out:
        for number, text in enumerate(writer.documents(), start=1):
            size += out.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")
            if number == documents or (megabytes and size >= megabytes * 1_000_000):
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--median", type=int, default=600, help="characters (600)")
    parser.add_argument("--sigma", type=float, default=1.1, help="of the logarithm of their lengths (1.1)")
    parser.add_argument("--seed", type=int, default=7)
    options = vars(parser.parse_args())
    write(options.pop("file"), **options)


if __name__ == "__main__":
    main()
