"""dataset.clean: what is repaired, what is dropped, and what the report may show of it."""

import json
import time
from pathlib import Path

import ftfy
import pytest
from finetune_api.constants import Stage
from finetune_api.dataset import CleanSpec
from finetune_api.report import DataReport
from finetune_api.spec import Task
from finetune_trainer.data import clean
from finetune_trainer.data.clean import Cleaner, CleaningLog, detect_language, redact, repetition
from finetune_trainer.data.convert import Unwanted
from finetune_trainer.data.examples import (
    Conversation,
    LabelledText,
    PlainText,
    Preference,
    PromptCompletion,
    Turn,
    map_texts,
    spoken_texts,
)
from finetune_trainer.errors import UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import save_tiny_bert
from tests.plans import make_plan

ALL_REPAIRS = CleanSpec(
    repair_encoding=True, unicode="NFC", remove_control_characters=True, normalize_whitespace=True, drop_lines=["^Menu"]
)
GERMAN = "Die Aktien des Unternehmens stiegen am Montag deutlich, nachdem es gute Zahlen gemeldet hatte."
ENGLISH = "Shares of the company rose sharply on Monday after it had reported good figures for the year."


def cleaned(text: str, **chosen) -> str | Unwanted:
    cleaner = Cleaner(CleanSpec(**chosen))
    result = cleaner.clean(PlainText(text), CleaningLog(cleaner.names))
    return result.text if isinstance(result, PlainText) else result


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("schÃ¶n", "schön"),
        ("itâ€™s â€œfineâ€\x9d", "it’s “fine”"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚, Ð¼Ð¸Ñ€", "Привет, мир"),
        ("good\nschÃ¶n\nschön", "good\nschön\nschön"),
        ("schön &amp; “gut”", "schön &amp; “gut”"),
        ("naïve façade, 10 €", "naïve façade, 10 €"),
        ("日本語のテキスト", "日本語のテキスト"),
        ("voilÃ le travail", "voilà le travail"),
        ("plain", "plain"),
    ],
)
def test_text_of_a_wrong_encoding_is_repaired_and_other_text_is_not(broken, whole):
    assert cleaned(broken, repair_encoding=True) == whole


def test_characters_get_one_form():
    assert cleaned("Zu\u0308rich ﬁne", unicode="NFC") == "Zürich ﬁne"
    assert cleaned("Zu\u0308rich ﬁne", unicode="NFKC") == "Zürich fine"


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\x00b\x07c\tok\nend", "abc\tok\nend"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("user\u202egnp.exe\u202c \u2066x\u2069\u200f", "usergnp.exe x"),
        ("zero\u200bwidth\ufeff soft\u00adhyphen", "zerowidth softhyphen"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        ("hi\U000e0069\U000e0067!", "hi!"),
        (
            "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        ),
    ],
)
def test_invisible_characters_go_and_those_that_scripts_need_stay(dirty, clean):
    assert cleaned(dirty, remove_control_characters=True) == clean


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a  b\u00a0c \t d", "a b c d"),
        ("def f():\n    return 1\n\tx\ty  \n", "def f():\n    return 1\n\tx\ty"),
        ("a\n\n\n\n\n\nb\n\n\nc", "a\n\n\nb\n\n\nc"),
        ("\n \n  a \n", "a"),
    ],
)
def test_white_space_is_evened_out_and_indentation_stays(dirty, clean):
    assert cleaned(dirty, normalize_whitespace=True) == clean


def test_lines_of_no_use_are_dropped():
    text = "Home | About\nShares rose.\nSubscribe now!\nThey fell."
    assert cleaned(text, drop_lines=[r"^Home \|", "(?i)subscribe"]) == "Shares rose.\nThey fell."
    assert cleaned("Home | About", drop_lines=["^Home"]) == Unwanted("empty once cleaned")
    menu = "Home\n\nShares rose.\n\nHome"
    assert cleaned(menu, drop_lines=["^Home"], normalize_whitespace=True) == "Shares rose."


def test_no_pattern_and_no_text_takes_long():
    chosen = ALL_REPAIRS.model_copy(update={"drop_lines": ["(a+)+$", "(x|x)*y"], "max_repetition": 0.9})
    cleaner = Cleaner(chosen)
    hostile = [
        "a" * 200_000 + "!",
        " " * 200_000 + "x",
        "x" * 200_000,
        "\U000e0041" * 100_000,
        "\x1b[" * 100_000,
        "\n" * 200_000 + "x",
    ]
    start = time.process_time()
    for text in hostile:
        cleaner.clean(PlainText(text + "."), CleaningLog(cleaner.names))
    assert time.process_time() - start < 10


MISREAD = st.text(min_size=1, max_size=4).map(lambda text: text.encode().decode("latin-1"))
PUNCTUATION = st.text(alphabet="Ã€’“”„–…°²³àâäéèßœŒÂâžЂвГ√≈‚Äãì™ aZ.\n", max_size=8)
SPACES = st.text(
    alphabet=" \t\n\r\v\x1c\x85\xa0\u2003\u2028\u200b\u200dab\x00\xad\U000e0041\U0001f3f4\U000e007f", max_size=12
)


@settings(max_examples=300, deadline=None)
@given(st.lists(MISREAD | PUNCTUATION | st.text(max_size=6) | st.just("plain words "), max_size=8).map("".join))
def test_what_spares_texts_a_repair_spares_none_that_needs_one(text):
    lines = text.split("\n")
    assert cleaned("." + text, repair_encoding=True) == "\n".join(
        ftfy.fix_encoding(line, clean.ENCODING) for line in ["." + lines[0], *lines[1:]]
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(SPACES | st.text(max_size=4), max_size=6).map("".join))
def test_what_spares_texts_a_search_spares_none_that_has_something(text):
    assert clean.remove_control_characters(text) == clean.CONTROL.sub(r"\1", text)
    even = clean.UNUSUAL_SPACE.sub(" ", clean.LINE_BREAK.sub("\n", text))
    even = clean.SPACES_AT_END.sub("", clean.SEVERAL_SPACES.sub(" ", even))
    assert clean.normalize_whitespace(text) == clean.EMPTY_LINES.sub("\n\n\n", even).strip()


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    once = cleaned(text, remove_control_characters=True, normalize_whitespace=True, unicode="NFC")
    if isinstance(once, str):
        assert cleaned(once, remove_control_characters=True, normalize_whitespace=True, unicode="NFC") == once
        assert not set(once) & {"\r", "\x00", "\u200b", "\u00a0"}


def test_every_text_of_an_example_is_cleaned_and_nothing_else():
    dirty = "schÃ¶n  so"
    turns = (Turn("system", dirty), Turn("user", dirty), Turn("assistant", dirty))
    neat = tuple(Turn(turn.role, "schön so") for turn in turns)
    cases = [
        (LabelledText(dirty, "schÃ¶n"), LabelledText("schön so", "schÃ¶n")),
        (PromptCompletion(dirty + " \n\n", " " + dirty), PromptCompletion("schön so \n\n", " schön so")),
        (Conversation(turns), Conversation(neat)),
        (
            Preference(Conversation(turns, 2), Conversation((*turns[:2], Turn("assistant", "no")), 2)),
            Preference(Conversation(neat, 2), Conversation((*neat[:2], Turn("assistant", "no")), 2)),
        ),
    ]
    for example, expected in cases:
        log = CleaningLog(Cleaner(ALL_REPAIRS).names)
        assert Cleaner(ALL_REPAIRS).clean(example, log) == expected
        assert log.report().steps["repairEncoding"].rows_changed == 1
        assert map_texts(example, lambda text: text) == example


def test_a_pair_that_cleaning_makes_equal_is_dropped():
    pair = Preference(PromptCompletion("q?", "yes"), PromptCompletion("q?", "yes\u200b"))
    result = Cleaner(ALL_REPAIRS).clean(pair, CleaningLog(Cleaner(ALL_REPAIRS).names))
    assert result.reason == "chosen and rejected are the same once cleaned"
    assert spoken_texts(pair) == ["q?", "yes", "yes\u200b"]


def test_rows_of_the_wrong_length_are_dropped():
    assert cleaned("abc", min_characters=3, max_characters=3) == "abc"
    assert cleaned("ab", min_characters=3).detail == "2 characters, dataset.clean.minCharacters is 3"
    assert cleaned("abcd", max_characters=3).reason == "too long"


def test_repetition_is_a_share():
    assert repetition("") == repetition("one two three four five") == repetition(GERMAN + "\n" + ENGLISH) == 0
    assert repetition("line one\nline two\nline one\n") == pytest.approx(1 / 3)
    assert repetition("no " * 100) == pytest.approx(0.99)  # all but the first word
    assert repetition("a b c d e " + "f g h i j " + "a b c d e") == pytest.approx(1 / 3)
    assert cleaned("Buy now!\n" * 10, max_repetition=0.3).detail == "0.9 of a text, dataset.clean.maxRepetition is 0.3"


def test_rows_in_other_languages_are_dropped_and_those_that_cannot_be_told_are_kept():
    assert (detect_language(GERMAN), detect_language(ENGLISH), detect_language("42 OK")) == ("de", "en", "unknown")
    assert detect_language("\ufffe\x00") == "unknown"
    assert cleaned(GERMAN, languages=["en"]) == Unwanted(
        "other language", "de, which dataset.clean.languages does not list"
    )
    assert cleaned(GERMAN, languages=["en", "de"]) == GERMAN
    assert cleaned("42 OK", languages=["en"]) == "42 OK"
    assert cleaned("שלום עולם, זהו משפט בעברית על מניות ועל כסף", languages=["he"]).startswith("שלום")
    with pytest.raises(UserError, match=r"dataset\.clean\.languages: 'qq' is no language"):
        Cleaner(CleanSpec(languages=["qq"]))


def test_samples_show_the_change_and_not_the_text():
    assert redact("Müller, 42€\n\u200b") == "Xøxxxx, 00<U+20AC>\n<U+200B>"
    shown = clean.sample("Secret " * 20 + "schÃ¶n", "Secret " * 20 + "schön")
    assert shown.before.endswith("xxxØ<U+00B6>x")
    assert shown.after.endswith("xxxøx")
    assert len(shown.before) < 100


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("model") / "bert")


def prepared(
    tmp_path: Path, model: Path, rows: list[dict], held_out: list[dict] | None = None, **settings
) -> DataReport:
    files = {"train": rows, "test": held_out or []}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    place = {name: {"uri": f"file://{name}.jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in files}
    dataset = {
        "sources": [{"location": place["train"], "field": "dataset.sources[0]"}],
        "clean": CleanSpec(**settings) if settings else None,
    }
    if held_out:
        dataset["test"] = {"sources": [{"location": place["test"], "field": "dataset.test.sources[0]"}]}
    plan = make_plan(
        tmp_path / "workspace",
        Stage.PREPARE,
        task=Task.CLASSIFICATION,
        model={"location": {"uri": "file://bert", "path": str(model)}},
        dataset=dataset,
    )
    run(plan, Telemetry(plan.stage, plan.job))
    return DataReport.model_validate_json((tmp_path / "workspace" / "report" / "data.json").read_bytes())


def rows(count: int) -> list[dict]:
    return [{"text": f"profit {n} rises", "label": ("bad", "good")[n % 2]} for n in range(count)]


def test_the_stage_counts_what_it_cleans_and_drops_nothing_as_invalid(tmp_path, model):
    dirty = [{"text": f"schÃ¶n  {n}", "label": "good"} for n in range(8)] + [{"text": "ab", "label": "bad"}]
    report = prepared(
        tmp_path, model, rows(100) + dirty, repair_encoding=True, normalize_whitespace=True, min_characters=4
    )
    steps = report.cleaning.steps
    assert list(steps) == ["repairEncoding", "normalizeWhitespace", "minCharacters"]
    assert [(step.rows_changed, step.rows_dropped) for step in steps.values()] == [(8, 0), (8, 0), (0, 1)]
    assert len(steps["repairEncoding"].samples) == 5
    assert steps["minCharacters"].samples[0].before == "xx"
    assert (report.summary.rows_read, report.summary.rows_kept, report.rejections) == (109, 108, {"too short": 1})


def test_what_is_held_out_is_cleaned_too_and_stays_apart(tmp_path, model):
    held_out = [{"text": f"loss\u200b {n}  falls", "label": ("bad", "good")[n % 2]} for n in range(4)]
    train = rows(60) + [{"text": f"loss {n} falls", "label": "bad"} for n in range(4)]
    report = prepared(tmp_path, model, train, held_out, remove_control_characters=True, normalize_whitespace=True)
    assert report.rejections == {"held-out duplicate": 4}
    assert report.summary.test_rows == 4


def test_the_settings_are_part_of_the_fingerprint(tmp_path, model):
    prints = [
        prepared(tmp_path, model, rows(60), **settings).summary.fingerprint
        for settings in ({}, {}, {"min_characters": 1})
    ]
    assert prints[0] == prints[1] != prints[2]
    assert prepared(tmp_path, model, rows(60)).cleaning is None
