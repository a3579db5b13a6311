"""A row's split is decided by what it says, and held-out rows stay unseen."""

from array import array
from collections import Counter
from collections.abc import Iterable

import pytest
from finetune_api.plan import PlanDataset
from finetune_trainer.data.examples import (
    Conversation,
    Example,
    LabelledText,
    PlainText,
    Preference,
    PromptCompletion,
    Turn,
)
from finetune_trainer.data.groups import group_rows
from finetune_trainer.data.labels import check_label_count, label_order, resolve_labels
from finetune_trainer.data.ledger import Ledger
from finetune_trainer.data.split import (
    SPLITS,
    Split,
    check_splits,
    input_key,
    leave_out_held_out,
    place_rows,
    whole_key,
)
from finetune_trainer.data.work import Log, Packed, WorkedBatch
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


def ledger_of(*rows: tuple[Split, Example]) -> Ledger:
    ledger = Ledger()
    for origin, example in rows:
        label = [example.label] if isinstance(example, LabelledText) else None
        numbers = (array("Q", [number]) for number in (1, input_key(example), whole_key(example)))
        ledger.add(origin, WorkedBatch(0, [], *numbers, label, Packed.pack([]), Log()))
    ledger.close()
    return ledger


def placed(rows: list[tuple[Split, Example]], plan: PlanDataset) -> list[Split | None]:
    """The split of each row; None: it is left out."""
    ledger = ledger_of(*rows)
    groups = group_rows(ledger.input_keys)
    out = leave_out_held_out(ledger, groups)
    splits = place_rows(ledger, groups, plan)
    return [None if gone else SPLITS[split] for gone, split in zip(out, splits, strict=True)]


def train(examples: Iterable[Example]) -> list[tuple[Split, Example]]:
    return [(Split.TRAIN, example) for example in examples]


def texts(count: int) -> list[Example]:
    return [PlainText(f"row {number}") for number in range(count)]


def test_the_fractions_are_met():
    counts = Counter(placed(train(texts(20_000)), dataset(validation=0.1, test=0.2)))
    assert counts[Split.TEST] == pytest.approx(4000, rel=0.1)
    assert counts[Split.VALIDATION] == pytest.approx(2000, rel=0.1)


def test_a_row_keeps_its_split_whatever_is_around_it():
    first = placed(train(texts(500)), dataset())
    later = placed(train(reversed(texts(2000))), dataset())
    assert later[::-1][:500] == first


def test_every_split_has_every_label_that_it_would_have_on_average():
    """Ten rows of a rare label have none in a tenth now and then; training is served first."""
    for number in range(40):
        rare = [LabelledText(f"rare {number} {row}", "rare") for row in range(10)]
        common = [LabelledText(f"common {row}", "common") for row in range(200)]
        splits = Counter(placed(train([*rare, *common]), dataset())[:10])
        assert splits[Split.TEST] and splits[Split.VALIDATION] and splits[Split.TRAIN] >= 2
        single = LabelledText(f"single {number}", "single")
        assert placed(train([*common, single]), dataset())[-1] is Split.TRAIN


def test_labels_move_as_few_rows_as_they_must():
    rows = [LabelledText(f"row {number}", str(number % 3)) for number in range(3000)]
    plain = placed(train(PlainText(row.text) for row in rows), dataset())
    assert placed(train(rows), dataset()) == plain


def test_a_row_and_its_copies_move_together():
    copies = [LabelledText(f"copy {number // 3}", "rare") for number in range(90)]
    splits = placed(train(copies), dataset())
    assert all(len({*splits[start : start + 3]}) == 1 for start in range(0, 90, 3))


def test_the_same_text_has_the_same_key_whatever_its_label_and_white_space():
    key = input_key(LabelledText("profit  rises\n", "good"))
    assert key == input_key(LabelledText("profit rises", "bad"))
    assert key != input_key(LabelledText("profit rises!", "good"))


HELD_OUT = dataset(validation=0.0, test=None)
"""Held out are the rows of sources alone."""

WORDS = st.text(alphabet="ab\x1f ", max_size=4)


def conversation(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts)))


@given(WORDS, WORDS, WORDS, WORDS)
def test_different_inputs_have_different_keys(first, second, other_first, other_second):
    same = (first.split(), second.split()) == (other_first.split(), other_second.split())
    one, two = conversation(first, second, "answer"), conversation(other_first, other_second, "answer")
    assert (input_key(one) == input_key(two)) == same


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
    assert input_key(one) == input_key(other)
    assert placed([(Split.TEST, one), (Split.TRAIN, other)], HELD_OUT) == [Split.TEST, None]


def test_earlier_turns_are_part_of_what_is_given():
    assert input_key(conversation("hello", "hi", "a fish?", "cod")) != input_key(
        conversation("hello", "go away", "a fish?", "cod")
    )


def test_an_answer_without_a_question_is_all_there_is():
    one, other = (Conversation((Turn("assistant", text),)) for text in ("cod", "trout"))
    assert input_key(one) != input_key(other)


def test_roles_are_part_of_a_conversation():
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    swapped = [Turn("assistant", "a"), Turn("user", "b")]
    assert input_key(Conversation(tuple(turns))) != input_key(Conversation(tuple(swapped)))


def test_rows_of_held_out_sources_are_not_learned():
    tested, judged, free = texts(3)
    validation = [(Split.VALIDATION, row) for row in (tested, judged, judged)]
    splits = placed([(Split.TEST, tested), *validation, *train([tested, judged, free])], HELD_OUT)
    assert splits == [Split.TEST, None, Split.VALIDATION, Split.VALIDATION, None, None, Split.TRAIN]


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
