"""What data.json says of tokenizing: words, what is cut and learned, and how full sequences are."""

import json
import shutil

import numpy as np
import pytest
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.report import DataReport, LengthHistogram, Remark
from finetune_api.spec import Task
from finetune_trainer.data.examples import PlainText
from finetune_trainer.data.report import Lengths
from finetune_trainer.data.split import Split
from finetune_trainer.data.statistics import TokenStatistics, count_words, measure_packing
from finetune_trainer.data.store import TokenizedRow
from finetune_trainer.data.tokenize import Encoded
from finetune_trainer.errors import UserError
from finetune_trainer.prepare import run
from finetune_trainer.telemetry import Telemetry
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.models import save_tiny_bert, save_tiny_llama
from tests.plans import make_plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" \n", 0),
        ("profit rises, by 3.5 %", 5),
        ("größere Erträge – ja", 4),
        ("会社の売上高", 6),
        ("会社、売上。", 4),
        ("iPhone 15を買う", 5),
        ("สวัสดี", 6),
        ("회사의 매출은", 2),
        ("выручка выросла", 2),
    ],
)
def test_words_are_parted_by_spaces_or_are_letters(text, words):
    assert count_words(text) == words


def lengths(*tokens: int) -> Lengths:
    found = Lengths()
    for count in tokens:
        found.add(count)
    return found


def test_buckets_double_every_second_time_and_begin_and_end_with_rows():
    assert lengths(3, 16, 17, 22, 23, 31, 32).histogram() == LengthHistogram(
        edges=[2, 4, 5, 8, 11, 16, 22, 32, 45], rows=[1, 0, 0, 0, 0, 2, 3, 1]
    )
    assert lengths(1).histogram() == LengthHistogram(edges=[1, 2], rows=[1])
    assert lengths().histogram() is None


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=50))
def test_every_row_is_in_its_bucket(tokens):
    found = lengths(*tokens).histogram()
    assert found.edges == sorted(set(found.edges))
    for low, high, rows in zip(found.edges[:-1], found.edges[1:], found.rows, strict=True):
        assert rows == sum(low <= count < high for count in tokens)
    assert sum(found.rows) == len(tokens)
    assert found.rows[0] and found.rows[-1]


def documents(*tokens: int):
    return np.array(tokens, np.int32)


def test_the_share_of_real_tokens_is_that_of_the_cut():
    rows = documents(*[60, 40] * 16)
    found = measure_packing(rows, 100, Task.GENERATION, paired=False)
    assert (found.sampled_rows, found.packed, found.padded, found.fixed) == (32, 1.0, 1.0, 0.5)
    assert measure_packing(rows, 200, Task.GENERATION, paired=False).fixed == 0.25
    uneven = measure_packing(documents(*[10, 30] * 16), 40, Task.GENERATION, paired=False)
    assert uneven.packed > uneven.fixed == 0.5
    assert measure_packing(documents(), 40, Task.GENERATION, paired=False) is None


def test_a_pair_takes_two_sequences():
    found = measure_packing(documents(*[20, 40] * 8), 40, Task.GENERATION, paired=True)
    assert (found.fixed, found.padded) == (0.75, 0.75)


def test_as_many_rows_are_tried_as_take_no_time():
    rows = documents(*np.random.default_rng(1).integers(5, 50, 20_000).tolist())
    found = measure_packing(rows, 64, Task.GENERATION, paired=False)
    assert found.sampled_rows == 512 * 32
    assert found == measure_packing(rows, 64, Task.GENERATION, paired=False)


class ByCharacters:
    """An encoder of one token a character."""

    has_unknown_token = False

    def count_tokens(self, texts):
        return sum(map(len, texts)), 0


def test_packing_is_tried_on_rows_from_all_over_the_data():
    """Files are often sorted; the rows at their end must not be forgotten because there are too many."""
    statistics = TokenStatistics(ByCharacters(), train_rows=60_000)
    for number in range(60_000):
        row = TokenizedRow([1] * (10 if number < 40_000 else 40))
        statistics.add(Split.TRAIN, PlainText("x"), Encoded(row, len(row.input_ids)))
    found = statistics.packing(40, Task.GENERATION, paired=False)
    assert found.sampled_rows == 512 * 32
    assert found.fixed == pytest.approx((2 / 3 * 10 + 1 / 3 * 40) / 40, abs=0.01)


# --- the stage


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {Task.CLASSIFICATION: save_tiny_bert(root / "bert"), Task.GENERATION: save_tiny_llama(root / "llama")}


@pytest.fixture
def prepare(tmp_path, models):
    def prepare(task: Task, rows: list, **changes) -> tuple[Plan, DataReport]:
        file = tmp_path / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"location": {"uri": "file://train.jsonl", "path": str(file)}, "field": "dataset.sources[0]"}
        plan = make_plan(
            tmp_path / "workspace",
            Stage.PREPARE,
            task=task,
            dataset={"sources": [source]},
            **{"model": {"location": {"uri": "file://model", "path": str(models[task])}}, **changes},
        )
        run(plan, Telemetry(plan.stage, plan.job))
        return plan, DataReport.model_validate_json((tmp_path / "workspace/report/data.json").read_bytes())

    return prepare


def test_what_a_classification_tells(prepare, models):
    rows = [{"text": f"profit rises {'as sales grow ' * (n % 20)}ツ", "label": "ab"[n % 2]} for n in range(80)]
    _, found = prepare(Task.CLASSIFICATION, rows, training={"max_length": 32})
    told = found.tokenization
    assert told.truncation.startswith("A text of more than 32 tokens loses its end;")
    train = told.splits["train"]
    assert (train.rows, train.truncated_rows) == (found.summary.train_rows, found.summary.truncated_rows)
    assert train.truncated_share == pytest.approx(train.truncated_rows / train.rows, abs=1e-4) != 0
    assert (train.supervised_tokens, train.supervised_share, train.answers_cut) == (None, None, None)
    assert told.splits["validation"].rows == found.summary.validation_rows
    assert sum(told.histogram.rows) == train.rows
    assert told.histogram.edges[-2] <= found.lengths.longest < told.histogram.edges[-1]
    assert (told.texts.sampled_rows, told.packing.packed) == (train.rows, None)
    assert 0 < told.packing.fixed < told.packing.padded <= 1
    assert 0 < told.texts.unknown_share < 0.2  # the one letter that the tokenizer does not have


def test_what_a_generation_tells(prepare, models):
    rows = [{"prompt": f"question {n}", "completion": "sales grow " * (1 + 2 * (n % 5) ** 2)} for n in range(80)]
    _, found = prepare(Task.GENERATION, rows, training={"max_length": 128})
    told, train = found.tokenization, found.tokenization.splits["train"]
    assert "the answer is cut" in told.truncation
    assert train.answers_cut == train.truncated_rows == found.summary.truncated_rows > 0
    assert train.supervised_tokens == found.summary.supervised_tokens
    assert train.supervised_share == pytest.approx(train.supervised_tokens / train.tokens, abs=1e-4)
    assert train.answers_not_learned == 0
    assert told.packing.fixed < told.packing.packed <= 1
    assert told.texts.unknown_share is None
    tokenizer = AutoTokenizer.from_pretrained(models[Task.GENERATION])
    texts = [row["prompt"] for row in rows] + [row["completion"].strip() for row in rows]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert told.texts.tokens_per_word == pytest.approx(tokens / words, rel=0.1)
    assert told.texts.characters_per_token == pytest.approx(sum(map(len, texts)) / tokens, rel=0.1)


def test_answers_that_the_template_rewrites_are_warned_of(prepare, models, tmp_path):
    """A template that drops thoughts once the conversation goes on."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('=')[-1] if not loop.last else m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    folder = tmp_path / "thinking"
    shutil.copytree(models[Task.GENERATION], folder)
    (folder / "chat_template.jinja").write_text(template)
    turns = [("user", "q"), ("assistant", "so=a"), ("user", "r"), ("assistant", "hm=b")]
    rows = [
        {"messages": [{"role": role, "content": f"{n} {text}" if role == "user" else text} for role, text in turns]}
        for n in range(60)
    ]
    _, found = prepare(Task.GENERATION, rows, model={"location": {"uri": "file://model", "path": str(folder)}})
    train = found.tokenization.splits["train"]
    assert train.answers_not_learned == train.rows
    (warning,) = [w for w in found.findings if w.reason is Remark.ANSWERS_NOT_LEARNED]
    assert warning.message.startswith(f"{train.rows} answers are not learned")


def test_the_report_says_which_column_is_which_field(prepare):
    rows = [{"question": f"q {n}", "answers": {"text": ["a"], "answer_start": [0]}, "id": n} for n in range(60)]
    _, found = prepare(Task.GENERATION, rows)
    assert (found.sources[0].format, found.sources[0].columns) == (
        "QuestionContextAnswer",
        {"question": "question", "answer": "answers"},
    )


def test_refused_data_has_no_statistics(prepare, tmp_path):
    with pytest.raises(UserError):
        prepare(Task.GENERATION, [{"prompt": "a", "completion": ""}])
    assert "tokenization" not in json.loads((tmp_path / "workspace/report/data.json").read_bytes())
