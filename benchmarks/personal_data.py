"""Precision, recall and speed of dataset.personalData on labelled texts: `python benchmarks/personal_data.py`.

300 sentences are written by hand, see personal_data_sentences.txt. The others are made from a seed: values of every
kind, with right check digits, in sentences between hard negatives. A value counts as found if kind and both ends are
right.
"""

import argparse
import random
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import phonenumbers
import stdnum.iban
import stdnum.luhn
from finetune_api.dataset import PersonalDataKind as Kind
from finetune_api.dataset import PersonalDataSpec
from finetune_trainer.data.personal_data.find import Finder
from finetune_trainer.data.personal_data.numbers import NATIONAL_IDS
from finetune_trainer.data.personal_data.protect import detectors

SENTENCES_BY_HAND = Path(__file__).with_name("personal_data_sentences.txt")
MARKED = re.compile(r"«([^»|]*)\|(\w+)»")
KINDS = [kind for kind in Kind if kind is not Kind.PERSON_NAME]  # it needs a model
COUNTRIES = ["US", "GB", "DE", "FR", "ES", "IT", "NL", "PL"]
Value = tuple[int, int, str]


class Labelled(NamedTuple):
    text: str
    values: set[Value]


class Score(NamedTuple):
    right: int
    found: int
    there: int

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.there if self.there else 1.0


def finder() -> Finder:
    return Finder([*detectors(PersonalDataSpec(action="Keep", countries=COUNTRIES))])


def labelled(marked: str) -> Labelled:
    """A text without its marks, and what they mark."""
    text, values, end = "", set(), 0
    for mark in MARKED.finditer(marked):
        text += marked[end : mark.start()]
        values.add((len(text), len(text) + len(mark[1]), mark[2]))
        text += mark[1]
        end = mark.end()
    return Labelled(text + marked[end:], values)


def score(texts: list[Labelled], finder: Finder) -> dict[str, Score]:
    """By kind."""
    right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for text in texts:
        values = {(match.start, match.end, str(match.kind)) for match in finder.find(text.text)}
        for counter, some in ((right, values & text.values), (found, values), (there, text.values)):
            counter.update(kind for _, _, kind in some)
    return {kind.value: Score(right[kind], found[kind], there[kind]) for kind in KINDS}


def written_by_hand() -> list[Labelled]:
    lines = SENTENCES_BY_HAND.read_text(encoding="utf-8").replace("¦", "").splitlines()
    return [labelled(line.partition("\t")[2]) for line in lines if not line.startswith("#")]


# ---- texts from a seed

FIRST = ["anna", "jan", "maria", "li", "omar", "søren", "lucía", "john", "fatima", "piotr", "giulia", "marc"]
LAST = ["schmidt", "kowalski", "rossi", "dupont", "garcía", "smith", "o'brien", "de-vries", "novak", "müller", "jones"]
HOSTS = [
    "mail.example.com",
    "firma-beispiel.de",
    "example.co.uk",
    "uni.example.fr",
    "correo.example.es",
    "web.example.pl",
]
HEX, WORD = "0123456789abcdef", string.ascii_letters + string.digits


def some(pick: random.Random, letters: str, count: int) -> str:
    return "".join(pick.choices(letters, k=count))


def until(make: Callable[[], str], is_valid: Callable[[str], bool]) -> str:
    return next(value for value in iter(make, None) if is_valid(value))


def phone(pick: random.Random) -> str:
    country = pick.choice(COUNTRIES)
    kind = pick.choice([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE])
    number = phonenumbers.example_number_for_type(country, kind)
    digits = str(number.national_number)

    def make() -> phonenumbers.PhoneNumber:
        changed = phonenumbers.PhoneNumber()
        changed.merge_from(number)
        changed.national_number = int(digits[:-4] + some(pick, string.digits, 4))
        return changed

    valid = next(one for one in iter(make, None) if phonenumbers.is_valid_number_for_region(one, country))
    form = phonenumbers.PhoneNumberFormat
    style = pick.choice([form.E164, form.INTERNATIONAL, form.INTERNATIONAL, form.NATIONAL])
    written: str = phonenumbers.format_number(valid, style)
    return written


def iban(pick: random.Random) -> str:
    country, shape = pick.choice(
        [("DE", "d" * 18), ("GB", "LLLL" + "d" * 14), ("NL", "LLLL" + "d" * 10), ("PL", "d" * 24), ("NO", "d" * 11)]
    )

    def make() -> str:
        inner = "".join(some(pick, string.ascii_uppercase if c == "L" else string.digits, 1) for c in shape)
        return country + stdnum.iban.calc_check_digits(country + "00" + inner) + inner

    value = until(make, lambda value: stdnum.iban.is_valid(value, check_country=False))
    return value if pick.random() < 0.5 else stdnum.iban.format(value)


def card(pick: random.Random) -> str:
    start, length = pick.choice([("4", 16), ("5" + pick.choice("12345"), 16), ("37", 15), ("6011", 16), ("3530", 16)])
    digits = start + some(pick, string.digits, length - len(start) - 1)
    value = digits + stdnum.luhn.calc_check_digit(digits)
    cuts = (4, 10, 15) if length == 15 else (4, 8, 12, 16)
    return pick.choice(["", " ", "-"]).join(value[a:b] for a, b in zip((0, *cuts), cuts, strict=False))


ID_SHAPES = {
    "US": "ddd-dd-dddd",
    "DE": "dd ddd ddd ddd",
    "ES": "ddddddddL",
    "IT": "LLLLLLddLddLdddL",
    "FR": "1 dd 0d dd ddd ddd dd",
    "GB": "LL dd dd dd A",
    "NL": "ddddddddd",
    "PL": "ddddddddddd",
}
ID_NAMES = {"NL": "BSN ", "PL": "PESEL "}


def national_id(pick: random.Random) -> tuple[str, str]:
    """The word before it, if it needs one, and the number."""
    country = pick.choice([*ID_SHAPES])
    wanted = next(one for one in NATIONAL_IDS if one.country == country)
    letters = {
        "d": string.digits,
        "L": "ABCEGHJKLMNPRSTXYZ" if country != "IT" else "ABCDEHLMPRST" + string.ascii_uppercase,
    }
    shape = re.compile(wanted.shape)

    def make() -> str:
        return "".join(some(pick, letters[c], 1) if c in letters else c for c in ID_SHAPES[country])

    return ID_NAMES.get(country, ""), until(make, lambda value: bool(shape.fullmatch(value)) and wanted.is_valid(value))


def ip(pick: random.Random) -> str:
    if pick.random() < 0.3:
        return ":".join(["2001", *(some(pick, HEX, 4) for _ in range(7))])
    return ".".join(str(pick.randrange(low, 224)) for low in (11, 0, 0, 1))


def secret(pick: random.Random) -> tuple[str, str]:
    return pick.choice(
        [
            ("", "AKIA" + some(pick, string.ascii_uppercase + "234567", 16)),
            ("", "ghp_" + some(pick, WORD, 36)),
            ("", "glpat-" + some(pick, WORD, 20)),
            ("", "AIza" + some(pick, WORD, 35)),
            ("", "sk_live_" + some(pick, WORD, 24)),
            ("", f"xoxb-{some(pick, string.digits, 12)}-{some(pick, WORD, 24)}"),
            ("password: ", some(pick, WORD, 10) + "7x"),
            ("API_KEY=", some(pick, HEX, 30) + "a1"),
            ("Passwort: ", some(pick, WORD, 8) + "!4q"),
        ]
    )


def value(pick: random.Random, kind: Kind) -> str:
    """A marked value, with what must stand beside it."""
    before = after = ""
    match kind:
        case Kind.EMAIL:
            made = f"{pick.choice(FIRST)}{pick.choice(['.', '_', ''])}{pick.choice(LAST)}@{pick.choice(HOSTS)}"
        case Kind.PHONE:
            made = phone(pick)
        case Kind.IBAN:
            made = iban(pick)
        case Kind.CREDIT_CARD:
            made = card(pick)
        case Kind.NATIONAL_ID:
            before, made = national_id(pick)
        case Kind.IP_ADDRESS:
            made = ip(pick)
        case Kind.URL_CREDENTIALS:
            before, after = "https://", "/path"
            made = f"{pick.choice(FIRST)}:{some(pick, WORD, 9)}@{pick.choice(HOSTS)}"
        case Kind.SECRET:
            before, made = secret(pick)
    return f"{before}«{made}|{kind.value}»{after}"


def negative(pick: random.Random) -> str:
    """What looks like personal data and is none."""
    digits = partial(some, pick, string.digits)
    return pick.choice(
        [
            f"order {digits(9)}",
            f"order number {digits(3)}-{digits(7)}-{digits(7)}",
            f"Rechnung {digits(10)}",
            f"version {digits(1)}.{digits(2)}.{digits(1)}.{digits(1)}",
            f"ISBN 978-{digits(1)}-{digits(2)}-{digits(6)}-{digits(1)}",
            f"20{digits(2)}-1{pick.randrange(3)}-0{pick.randrange(1, 10)}",
            f"1{pick.randrange(10)}:0{digits(1)}:{pick.randrange(10, 60)}",
            some(pick, HEX, 40),
            "-".join(some(pick, HEX, n) for n in (8, 4, 4, 4, 12)),
            f"€{pick.randrange(1, 999)},{digits(3)}.{digits(2)}",
            f"{digits(3)}.{digits(6)}",
            f"pages {digits(3)}-{digits(3)}",
            f"tracking 1Z{some(pick, string.ascii_uppercase + string.digits, 16)}",
            f"EAN 40{digits(11)}",
            f"#{digits(8)}",
            f"@{pick.choice(FIRST)}",
            f"serial SN{digits(10)}",
            f"git@host.example:team/{pick.choice(LAST)}",
            f"img{digits(2)}@2x.png",
            "password: ${PASSWORD}",
            "the token is expired",
            "std::map::iterator",
        ]
    )


SENTENCES = [
    "Please note {}.",
    "Bitte beachten Sie {} bis Montag.",
    "Voir {}, merci.",
    "Ver {} antes del viernes.",
    "Zie ook {} hieronder.",
    "({})",
    "- {}",
    '"{}"',
    "{}",
    "Vedi {}; grazie.",
    "The report mentions {} and nothing else.",
    "Proszę zobaczyć {}.",
]
FILLER = "The committee met again and agreed that the figures for the quarter were better than most had expected. "


def seeded(count: int, seed: int = 7) -> Iterator[Labelled]:
    """Texts of some sentences: one in three has a value, one in three a hard negative."""
    pick = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(pick.randrange(3, 9)):
            filled = pick.choice([lambda: value(pick, pick.choice(KINDS)), lambda: negative(pick), lambda: ""])()
            parts.append(pick.choice(SENTENCES).format(filled) if filled else FILLER.strip())
        yield labelled("\n".join(parts))


def table(scores: dict[str, Score]) -> str:
    rows = [f"| {kind} | {s.there} | {s.precision:.4f} | {s.recall:.4f} |" for kind, s in scores.items()]
    return "\n".join(["| kind | values | precision | recall |", "|---|---:|---:|---:|", *rows])


def speed(finder: Finder, texts: list[str]) -> tuple[float, float]:
    """(Texts, MB) per CPU second."""
    start = time.process_time()
    for text in texts:
        finder.find(text)
    seconds = time.process_time() - start
    return len(texts) / seconds, sum(len(text.encode()) for text in texts) / seconds / 1e6


def errors(texts: list[Labelled], finder: Finder) -> Iterator[str]:
    for text, values in texts:
        found = {(match.start, match.end, str(match.kind)) for match in finder.find(text)}
        for wrong in sorted(found ^ values):
            start, end, kind = wrong
            yield f"{'missed' if wrong in values else 'wrong'} {kind} '{text[start:end]}' in: {text[:200]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--errors", type=int, default=0, help="show so many errors")
    options = parser.parse_args()
    this = finder()
    texts = list(seeded(options.texts))
    for name, some_texts in (("sentences written by hand", written_by_hand()), ("texts from a seed", texts)):
        print(f"{len(some_texts)} {name}:\n\n{table(score(some_texts, this))}\n")
        for error in islice(errors(some_texts, this), options.errors):
            print("   ", error)
    dense = [text.text for text in texts]
    for name, some_texts in (("values in most texts", dense), ("no values", [FILLER * 10] * 5_000)):
        rate, megabytes = speed(this, some_texts)
        size = sum(map(len, some_texts)) / len(some_texts)
        print(f"{name}: {rate:,.0f} texts of {size:.0f} characters per second on one core, {megabytes:.1f} MB/s")


if __name__ == "__main__":
    main()
