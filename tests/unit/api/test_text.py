import pytest
from finetune_api.text import visible, visible_lines
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 日本語 🙂 [red] <b> $(id)", "naïve 日本語 🙂 [red] <b> $(id)"),
        ("\x1b[2J\x9b31m", "⟨U+001B⟩[2J⟨U+009B⟩31m"),
        ("a\nb\t", "a⟨U+000A⟩b⟨U+0009⟩"),
        ("\u202eb\u2028\ufeff\x00", "⟨U+202E⟩b⟨U+2028⟩⟨U+FEFF⟩⟨U+0000⟩"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_lines_stay() -> None:
    assert visible_lines("a\x1b\n\nb\r\n") == "a⟨U+001B⟩\n\nb⟨U+000D⟩\n"


@given(st.text())
def test_of_any_text_there_is_nothing_left_that_cannot_be_seen(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)
