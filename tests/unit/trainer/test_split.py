"""A row's split is decided by what it says, and held-out rows stay unseen."""

from collections import Counter

import pytest
from finetune_api.plan import PlanDataset
from finetune_trainer.data.examples import Conversation, LabelledText, PlainText, Preference, PromptCompletion, Turn
from finetune_trainer.data.labels import check_label_count, label_order, resolve_labels
from finetune_trainer.data.split import Split, Splitter, check_splits, content_key
from finetune_trainer.errors import UserError
from hypothesis import given
from hypothesis import strategies as st


def dataset(validation=0.1, test=0.1) -> PlanDataset:
    return PlanDataset.model_validate(
        {
            "sources": [],
            "validation": {"fraction": validation},
            "test": None if test is None else {"fraction": test},
        }
    )


def texts(count: int) -> list[bytes]:
    return [content_key(PlainText(f"row {number}")) for number in range(count)]


def test_the_fractions_are_met():
    splitter = Splitter(dataset(validation=0.1, test=0.2))
    counts = Counter(splitter.place(Split.TRAIN, key) for key in texts(20_000))
    assert counts[Split.TEST] == pytest.approx(4000, rel=0.1)
    assert counts[Split.VALIDATION] == pytest.approx(2000, rel=0.1)


def test_a_row_keeps_its_split_whatever_is_around_it():
    alone = Splitter(dataset())
    first = {key: alone.place(Split.TRAIN, key) for key in texts(500)}
    more = Splitter(dataset())
    later = {key: more.place(Split.TRAIN, key) for key in reversed(texts(2000))}
    assert all(later[key] is split for key, split in first.items())


def test_the_same_text_has_the_same_key_whatever_its_label_and_white_space():
    key = content_key(LabelledText("profit  rises\n", "good"))
    assert key == content_key(LabelledText("profit rises", "bad"))
    assert key != content_key(LabelledText("profit rises!", "good"))


WORDS = st.text(alphabet="ab\x1f ", max_size=4)


def conversation(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts)))


@given(WORDS, WORDS, WORDS, WORDS)
def test_different_inputs_have_different_keys(first, second, other_first, other_second):
    same = (first.split(), second.split()) == (other_first.split(), other_second.split())
    one, two = conversation(first, second, "answer"), conversation(other_first, other_second, "answer")
    assert (content_key(one) == content_key(two)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PromptCompletion("Name a  fish", "cod"), PromptCompletion("Name a fish", "trout")),
        (conversation("Name a fish", "cod"), conversation("Name a fish", "trout")),
        (conversation("hello", "hi", "a fish?", "cod"), conversation("hello", "hi", "a fish?", "trout")),
        (
            Preference(PromptCompletion("a fish?", "cod"), PromptCompletion("a fish?", "dog")),
            Preference(PromptCompletion("a fish?", "cat"), PromptCompletion("a  fish?", "cod")),
        ),
        (
            Preference(conversation("a fish?", "cod"), conversation("a fish?", "dog")),
            Preference(conversation("a fish?", "dog"), conversation("a fish?", "cat")),
        ),
    ],
)
def test_the_same_question_is_in_one_split_whatever_its_answer(one, other):
    assert content_key(one) == content_key(other)
    splitter = Splitter(dataset(validation=0.0, test=None))
    assert splitter.place(Split.TEST, content_key(one)) is Split.TEST
    assert splitter.place(Split.TRAIN, content_key(other)) is None


def test_earlier_turns_are_part_of_what_is_given():
    assert content_key(conversation("hello", "hi", "a fish?", "cod")) != content_key(
        conversation("hello", "go away", "a fish?", "cod")
    )


def test_an_answer_without_a_question_is_all_there_is():
    one, other = (Conversation((Turn("assistant", text),)) for text in ("cod", "trout"))
    assert content_key(one) != content_key(other)


def test_roles_are_part_of_a_conversation():
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    swapped = [Turn("assistant", "a"), Turn("user", "b")]
    assert content_key(Conversation(tuple(turns))) != content_key(Conversation(tuple(swapped)))


def test_rows_of_held_out_sources_are_not_learned():
    splitter = Splitter(dataset(validation=0.0, test=None))
    tested, judged, free = texts(3)
    assert splitter.place(Split.TEST, tested) is Split.TEST
    assert splitter.place(Split.VALIDATION, tested) is None
    assert splitter.place(Split.VALIDATION, judged) is Split.VALIDATION
    assert splitter.place(Split.VALIDATION, judged) is Split.VALIDATION
    assert [splitter.place(Split.TRAIN, key) for key in (tested, judged, free)] == [None, None, Split.TRAIN]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"train": 5, "test": 1}, "dataset.validation.fraction: 0.1 of 6 rows gave none"),
        ({"train": 5, "validation": 1}, "dataset.test.fraction"),
        ({"validation": 1, "test": 1}, "the split train has no rows"),
    ],
)
def test_a_split_without_rows_is_named(rows, words):
    with pytest.raises(UserError, match=words):
        check_splits(rows, dataset())


def test_no_test_split_is_needed_if_none_was_asked_for():
    check_splits({"train": 1, "validation": 1}, dataset(test=None))


def test_labels_are_sorted_and_numbers_by_their_value():
    assert label_order(["b", "a", "10"]) == ["10", "a", "b"]
    assert label_order(["10", "9", "-1"]) == ["-1", "9", "10"]


@given(st.permutations(["1", "01", "001", "+1", "0"]))
def test_numbers_that_are_written_in_two_ways_have_one_order(found):
    assert label_order(dict.fromkeys(found)) == ["0", "+1", "001", "01", "1"]


def test_a_closed_set_keeps_its_order():
    rows = {"train": Counter(low=1, high=2), "validation": Counter(low=1)}
    assert resolve_labels(rows, ["low", "high"]) == ["low", "high"]
    assert resolve_labels(rows, None) == ["high", "low"]


@pytest.mark.parametrize(
    ("rows", "closed", "words"),
    [
        ({"train": Counter(a=9)}, None, "1 label found"),
        ({"train": Counter(a=9), "test": Counter(b=1)}, None, "no training row has 1 of the 2 labels"),
        ({"train": Counter(a=9)}, ["a", "b"], "no training row has the label 'b'"),
        ({"train": Counter(a=9)}, ["a", "b", "c", "d", "e"], "'b', 'c', 'd' and 1 more"),
    ],
)
def test_labels_that_cannot_be_learned_are_named(rows, closed, words):
    with pytest.raises(UserError, match=words):
        resolve_labels(rows, closed)


def test_labels_that_the_spec_does_not_list_are_never_named():
    """They are text of the dataset, also where an earlier look has found them."""
    rows = {"train": Counter(a=9), "test": Counter(secret=1)}
    for resolved in (None, ["a", "secret"]):
        with pytest.raises(UserError, match=r"dataset\.labels") as caught:
            resolve_labels(rows, None, resolved)
        assert "secret" not in caught.value.message


def test_a_column_of_texts_is_no_column_of_labels():
    check_label_count(dict.fromkeys(map(str, range(512)), 1))
    with pytest.raises(UserError, match="more than 512"):
        check_label_count(dict.fromkeys(map(str, range(513)), 1))
