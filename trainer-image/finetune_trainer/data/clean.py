"""dataset.clean: repairs the texts of an example and drops examples that are not wanted.

`Cleaner.clean` is a pure function of the example; `CleaningLog` counts what it did and keeps a few redacted samples.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

import ftfy
import pycld2
import re2
from finetune_api.constants import Reason
from finetune_api.dataset import CleanSpec
from finetune_api.report import CleaningReport, CleaningSample, CleaningStep
from ftfy.badness import is_bad

from finetune_trainer.data.convert import Unwanted
from finetune_trainer.data.examples import Example, Preference, example_texts, lacks_text, map_texts, spoken_texts
from finetune_trainer.errors import UserError

TextStep = Callable[[str], str]

CONTROL = re.compile(
    r"(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)"  # a flag: kept
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # terminal escapes (ECMA-48)
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad]"
    r"|[\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
    r"|[\U000e0000-\U000e007f]"  # tags
)
"""Every control and format character of Unicode's general category that says nothing to a reader, see
`removeControlCharacters` in the spec; not the joiners U+200C and U+200D, tab, and what `LINE_BREAK` knows."""

LINE_BREAK = re.compile(r"\r\n?|[\x85\u2028\u2029]")
UNUSUAL_SPACE = re.compile(r"[^\S\n\t ]")
SEVERAL_SPACES = re.compile(r"(?<=\S)[ \t]{2,}(?=\S)")
SPACES_AT_END = re.compile(r"(?<![ \t])[ \t]++(?=\n)")
EMPTY_LINES = re.compile(r"\n{4,}")

ENCODING = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)

NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
BADNESS_CHARACTERS = 4
"""ftfy knows mojibake by at most five characters in a row, of which one is not ASCII."""

NGRAM_WORDS = 5
DETECTED_CHARACTERS = 20_000
UNKNOWN = "unknown"
LANGUAGE_ALIASES = {"he": "iw", "jv": "jw", "nb": "no", "fil": "tl"}
"""CLD2 keeps old codes."""

SAMPLES = 5
SAMPLE_CHARACTERS = 40
"""On either side of the first change."""


def repair_encoding(text: str) -> str:
    """Line by line, for one may be broken and the next one not."""
    if text.isascii() or not _may_be_mojibake(text):
        return text
    return "\n".join(line if line.isascii() else ftfy.fix_encoding(line, ENCODING) for line in text.split("\n"))


def _may_be_mojibake(text: str) -> bool:
    """False only if ftfy would leave every line as it is, which takes it several times as long to say."""
    near = BADNESS_CHARACTERS
    return is_bad("\n".join([text[max(0, m.start() - near) : m.end() + near] for m in NOT_ASCII.finditer(text)]))


def normalize_unicode(text: str, form: str) -> str:
    return text if text.isascii() else unicodedata.normalize(form, text)  # type: ignore[arg-type]


def is_plain(text: str) -> bool:
    """Whether it has only what is printed, spaces and \\n, which is faster than to look for what else there may be."""
    return text.replace("\n", "").isprintable()


def remove_control_characters(text: str) -> str:
    return text if is_plain(text) else CONTROL.sub(r"\1", text)


def normalize_whitespace(text: str) -> str:
    """See the setting in the spec."""
    if not is_plain(text):
        text = UNUSUAL_SPACE.sub(" ", LINE_BREAK.sub("\n", text))
    if "  " in text or "\t" in text:
        text = SEVERAL_SPACES.sub(" ", text)
    if " \n" in text or "\t\n" in text:
        text = SPACES_AT_END.sub("", text)
    if "\n\n\n\n" in text:
        text = EMPTY_LINES.sub("\n\n\n", text)
    return text.strip()


def drop_lines(text: str, patterns: Sequence[Callable[[str], object]], tidy: Callable[[str], str]) -> str:
    """`tidy` is done to what is left, if something was dropped."""
    lines = text.split("\n")
    kept = [line for line in lines if not any(found(line) for found in patterns)]
    return text if len(kept) == len(lines) else tidy("\n".join(kept))


def repetition(text: str) -> float:
    """How much of a text stands in it before, from 0 to 1: the larger of the share of characters in repeated lines and
    of words in repeated sequences of five (Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1, who count
    the characters of those words).
    """
    return max(_repeated_lines(text), _repeated_words(text.split()))


def _repeated_lines(text: str) -> float:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    total = sum(map(len, lines))
    return 1 - sum(map(len, set(lines))) / total if total else 0.0


def _repeated_words(words: list[str]) -> float:
    grams = list(zip(*(words[n:] for n in range(NGRAM_WORDS)), strict=False))
    if len(set(grams)) == len(grams):
        return 0.0
    seen: set[Hashable] = set()
    repeated, covered = 0, 0  # words before `covered` are counted
    for start, gram in enumerate(grams):
        if gram in seen:
            repeated += start + NGRAM_WORDS - max(covered, start)
            covered = start + NGRAM_WORDS
        else:
            seen.add(gram)
    return repeated / len(words)


def detect_language(text: str) -> str:
    """CLD2's code of the language of a text; 'unknown' if it is not sure."""
    try:
        sure, _, languages = pycld2.detect(remove_control_characters(text[:DETECTED_CHARACTERS]), isPlainText=True)
    except pycld2.error:  # characters that are none, such as U+FFFE
        return UNKNOWN
    code: str = languages[0][1]
    return code if sure and code != "un" else UNKNOWN


class CleaningLog:
    """Counts by setting, and its first samples."""

    def __init__(self, steps: Iterable[str] = ()) -> None:
        self._changed = Counter(dict.fromkeys(steps, 0))
        self._dropped: Counter[str] = Counter()
        self._samples: dict[str, list[CleaningSample]] = {step: [] for step in self._changed}
        self.languages: Counter[str] = Counter()

    def change(self, step: str, before: str, after: str) -> None:
        self._changed[step] += 1
        if len(self._samples[step]) < SAMPLES:
            self._samples[step].append(sample(before, after))

    def drop(self, step: str, text: str) -> None:
        self._dropped[step] += 1
        if len(self._samples[step]) < SAMPLES:
            self._samples[step].append(CleaningSample(before=redact(text[: 2 * SAMPLE_CHARACTERS])))

    def merge(self, later: "CleaningLog") -> None:
        """Adds what was done to rows that come after those of this log."""
        self._changed.update(later._changed)
        self._dropped.update(later._dropped)
        self.languages.update(later.languages)
        for step, samples in later._samples.items():
            known = self._samples.setdefault(step, [])
            known.extend(samples[: SAMPLES - len(known)])

    def report(self) -> CleaningReport | None:
        """None if there was nothing to do."""
        if not self._changed:
            return None
        steps = {
            name: CleaningStep(rows_changed=count, rows_dropped=self._dropped[name], samples=self._samples[name])
            for name, count in self._changed.items()
        }
        return CleaningReport(steps=steps, languages=dict(self.languages.most_common()) or None)


class Cleaner:
    """dataset.clean at work. Raises UserError (DataInvalid) for a language that cannot be recognised."""

    def __init__(self, settings: CleanSpec) -> None:
        self._settings = settings
        self._steps: dict[str, TextStep] = dict(_text_steps(settings))
        self._languages = {_language_code(code) for code in settings.languages or ()}
        filters = ("minCharacters", "maxCharacters", "maxRepetition", "languages")
        chosen = settings.to_dict()
        self.names = [*self._steps, *(name for name in filters if name in chosen)]

    def clean(self, example: Example, log: CleaningLog) -> Example | Unwanted:
        """The cleaned example, or why it is dropped."""
        cleaned, step = self._repair(example, log)
        texts = spoken_texts(cleaned)
        unwanted = _emptied(cleaned) if step else None
        if unwanted is None:
            step, unwanted = self._filter(texts, log)
        if step and unwanted:
            log.drop(step, max(spoken_texts(example), key=len))
            return unwanted
        return cleaned

    def _repair(self, example: Example, log: CleaningLog) -> tuple[Example, str | None]:
        """The example after every step, and the last step that changed it."""
        changed: dict[str, tuple[str, str]] = {}

        def repair(text: str) -> str:
            for name, step in self._steps.items():
                after = step(text)
                if after != text:
                    changed.setdefault(name, (text, after))
                    text = after
            return text

        cleaned = map_texts(example, repair)
        for name in self._steps:
            if name in changed:
                log.change(name, *changed[name])
        return cleaned, max(changed, key=list(self._steps).index, default=None)

    def _filter(self, texts: list[str], log: CleaningLog) -> tuple[str | None, Unwanted | None]:
        """The setting that the texts do not meet, and why."""
        wanted = self._settings
        length = sum(map(len, texts))
        if wanted.min_characters is not None and length < wanted.min_characters:
            detail = f"{length} characters, dataset.clean.minCharacters is {wanted.min_characters}"
            return "minCharacters", Unwanted("too short", detail)
        if wanted.max_characters is not None and length > wanted.max_characters:
            detail = f"{length} characters, dataset.clean.maxCharacters is {wanted.max_characters}"
            return "maxCharacters", Unwanted("too long", detail)
        if wanted.max_repetition is not None:
            share = max(map(repetition, texts))
            if share > wanted.max_repetition:
                detail = f"{share:.3g} of a text, dataset.clean.maxRepetition is {wanted.max_repetition:g}"
                return "maxRepetition", Unwanted("repeats itself", detail)
        if self._languages:
            language = detect_language("\n".join(texts))
            log.languages[language] += 1
            if language not in (UNKNOWN, *self._languages):
                return "languages", Unwanted(
                    "other language", f"{language}, which dataset.clean.languages does not list"
                )
        return None, None


def _text_steps(settings: CleanSpec) -> Iterable[tuple[str, TextStep]]:
    if settings.repair_encoding:
        yield "repairEncoding", repair_encoding
    if settings.unicode:
        yield "unicode", partial(normalize_unicode, form=settings.unicode.value)
    if settings.remove_control_characters:
        yield "removeControlCharacters", remove_control_characters
    if settings.normalize_whitespace:
        yield "normalizeWhitespace", normalize_whitespace
    if settings.drop_lines:
        patterns = [re2.compile(pattern).search for pattern in settings.drop_lines]
        tidy = normalize_whitespace if settings.normalize_whitespace else str  # there may be empty lines around it
        yield "dropLines", partial(drop_lines, patterns=patterns, tidy=tidy)


def _language_code(code: str) -> str:
    known = {code for _, code in pycld2.LANGUAGES}
    if LANGUAGE_ALIASES.get(code, code) not in known:
        raise UserError(
            Reason.DATA_INVALID,
            f"dataset.clean.languages: '{code}' is no language that can be recognised; write ISO 639-1 codes, like en",
        )
    return LANGUAGE_ALIASES.get(code, code)


def _emptied(example: Example) -> Unwanted | None:
    """A drop if cleaning took away what there was to learn."""
    if lacks_text(example):
        return Unwanted("empty once cleaned")
    if isinstance(example, Preference) and example_texts(example.chosen) == example_texts(example.rejected):
        return Unwanted("chosen and rejected are the same once cleaned")
    return None


def sample(before: str, after: str) -> CleaningSample:
    """Both texts around the first place where they differ."""
    first = next((place for place, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    start = max(0, first - SAMPLE_CHARACTERS)
    end = start + 2 * SAMPLE_CHARACTERS
    return CleaningSample(before=redact(before[start:end]), after=redact(after[start:end]))


def redact(text: str) -> str:
    """The shape of a text without its content, see CleaningSample."""
    return "".join(map(_shape, text))


def _shape(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] in "LM":
        upper = kind == "Lu"
        return ("X" if upper else "x") if character.isascii() else ("Ø" if upper else "ø")
    if kind[0] == "N":
        return "0"
    return (
        character
        if character.isascii() and (character.isprintable() or character in "\n\t\r")
        else f"<U+{ord(character):04X}>"
    )
