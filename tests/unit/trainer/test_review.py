"""Confident learning as it stands in the paper, judges that have not seen a row, and memory that does not grow."""

import numpy as np
import pytest
from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanSource
from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.groups import group_rows
from finetune_trainer.data.ledger import Ledger
from finetune_trainer.data.read import RawRow
from finetune_trainer.data.review import suspicion
from finetune_trainer.data.review.confident import ConfidentJoint, Thresholds, is_suspicious, judge
from finetune_trainer.data.review.cross_validation import FOLDS, Classifiers, Features, fold_of
from finetune_trainer.data.review.suspicion import Facts, find_suspicious
from finetune_trainer.data.split import TRAIN, Split, input_key
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.work import Batch, BatchWorker
from hypothesis import given
from hypothesis import strategies as st

from tests.plans import make_plan


def by_the_book(probabilities: np.ndarray, labels: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """Equations 1 and 2 of the paper, row by row: the confident joint, and the rows beside its diagonal."""
    classes = probabilities.shape[1]
    thresholds = [
        float(np.mean([p[k] for p, label in zip(probabilities, labels, strict=True) if label == k] or [np.inf]))
        for k in range(classes)
    ]
    joint, beside = [[0] * classes for _ in range(classes)], []
    for row, (p, label) in enumerate(zip(probabilities, labels, strict=True)):
        counting = [k for k in range(classes) if p[k] >= np.float32(thresholds[k])]
        if counting:
            likeliest = max(counting, key=lambda k: p[k])
            joint[label][likeliest] += 1
            if likeliest != label:
                beside.append(row)
    return joint, beside


@st.composite
def judged_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    classes, rows = draw(st.integers(2, 5)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    labels = random.integers(classes, size=rows)
    probabilities = random.dirichlet(np.ones(classes), rows).astype(np.float32)
    return probabilities, labels


@given(judged_rows(), st.integers(1, 10))
def test_suspicion_is_that_of_the_paper_whatever_the_parts(rows: tuple[np.ndarray, np.ndarray], size: int) -> None:
    probabilities, labels = rows
    classes = probabilities.shape[1]
    thresholds, joint = Thresholds(classes), ConfidentJoint(classes)
    parts = [slice(start, start + size) for start in range(0, len(labels), size)]
    for part in parts:
        thresholds.add(probabilities[part], labels[part])
    found = []
    for part in parts:
        judged = judge(probabilities[part], labels[part], thresholds.values)
        joint.add(labels[part], judged)
        found += (part.start + np.flatnonzero(is_suspicious(judged, labels[part]))).tolist()
        others = [
            max(p[k] for k in range(classes) if k != y) for p, y in zip(probabilities[part], labels[part], strict=True)
        ]
        own = probabilities[part][np.arange(len(others)), labels[part]]
        np.testing.assert_allclose(judged.margin, own - np.array(others), atol=1e-6)
    expected, beside = by_the_book(probabilities, labels)
    assert joint.counts.tolist() == expected
    assert found == [row for row in beside if probabilities[row].argmax() != labels[row]]


def test_the_share_of_wrong_labels_is_that_of_the_calibrated_joint() -> None:
    """10 rows of class 0, of which 4 count: 3 right; 10 of class 1, of which 5 count: 4 right."""
    joint = ConfidentJoint(2)
    sure, unsure = [0.9, 0.1], [0.5, 0.5]
    rows = (
        [(sure, 0)] * 3
        + [(sure[::-1], 0)]
        + [(unsure, 0)] * 6
        + [(sure[::-1], 1)] * 4
        + [(sure, 1)]
        + [(unsure, 1)] * 5
    )
    probabilities, labels = np.array([p for p, _ in rows], np.float32), np.array([y for _, y in rows])
    joint.add(labels, judge(probabilities, labels, np.array([0.8, 0.8], np.float32)))
    assert joint.counts.tolist() == [[3, 1], [1, 4]]
    assert joint.error_share() == pytest.approx((10 * 1 / 4 + 10 * 1 / 5) / 20)


def test_a_class_that_nobody_is_sure_of_is_not_held_to_the_standard_of_an_easy_one() -> None:
    probabilities = np.array([[0.95, 0.05], [0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.55, 0.45]], np.float32)
    labels = np.array([0, 0, 1, 1, 0])
    thresholds = Thresholds(2)
    thresholds.add(probabilities, labels)
    judged = judge(probabilities, labels, thresholds.values)
    assert thresholds.values.tolist() == pytest.approx([0.8, 0.375])
    assert judged.suggested.tolist() == [0, 0, 1, 1, 1], "0.65 is likelier than 0.35, but no reason to doubt"
    assert is_suspicious(judged, labels).tolist() == [False] * 5


@pytest.mark.parametrize("classes", [2, 3])
def test_no_row_is_judged_by_what_has_seen_it(classes: int) -> None:
    """Of random labels nothing can be learned; who has seen them knows them by heart."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice([f"w{n}" for n in range(500)], 12)) for _ in range(300)] * 2
    labels = np.tile(random.integers(classes, size=300), 2)
    folds = fold_of(np.array([input_key(LabelledText(text, "")) for text in texts], np.uint64))
    assert folds[:300].tolist() == folds[300:].tolist() and set(folds) == set(range(FOLDS))
    features, classifiers = Features(classes), Classifiers(classes)
    vectors = features.of(texts)
    classifiers.learn(vectors, labels, folds, lambda _: None)
    probabilities = classifiers.probabilities(vectors, folds)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == labels).mean() < 1 / classes + 0.1
    seen = classifiers.probabilities(vectors, (folds + 1) % FOLDS)
    assert (seen.argmax(axis=1) == labels).mean() > 0.95
    assert classifiers.seen.sum() == (FOLDS - 1) * len(labels)


def test_many_labels_have_few_features_and_bounded_weights() -> None:
    for classes in (2, 3, 20, 100, 512):
        size = Features(classes).size
        assert FOLDS * classes * size * 4 <= 120 << 20
        assert size >= 1 << 13


def find(folder, rows: list[tuple[str, str]], chunk: int = 50) -> tuple[suspicion.Judgement, Ledger]:
    dataset = make_plan(folder).dataset
    worker, ledger = BatchWorker(dataset), Ledger()
    source = PlanSource(location={"uri": "file://a"}, field="dataset.sources[0]")
    with Spool(folder / "rows") as spool:
        for start in range(0, len(rows), chunk):
            raw = [
                RawRow(start + n + 1, {"text": text, "label": label})
                for n, (text, label) in enumerate(rows[start : start + chunk])
            ]
            done = worker.work(Batch(0, source, DataFormat.LABELLED_TEXT, raw))
            ledger.add(Split.TRAIN, done)
            spool.write(0, done.lines, done.examples)
        ledger.close()
        ledger.splits[:] = TRAIN
        nothing = np.zeros(len(rows), np.bool_)
        return find_suspicious(
            spool, ledger, Facts(group_rows(ledger.input_keys), nothing, nothing), lambda _: None
        ), ledger


def rows_of(count: int) -> list[tuple[str, str]]:
    """Sorted by label, as files often are; every 20th label is wrong."""
    random = np.random.default_rng(1)
    words = {"a": [f"a{n}" for n in range(30)], "b": [f"b{n}" for n in range(30)]}
    rows = [(f"{' '.join(random.choice(words[label], 5))} {n}", label) for label in words for n in range(count // 2)]
    return [(text, label if n % 20 else "ab".replace(label, "")) for n, (text, label) in enumerate(rows)]


def test_more_rows_than_are_learned_from_are_judged_by_what_these_teach(tmp_path, monkeypatch) -> None:
    rows = rows_of(2000)
    whole, _ = find(tmp_path / "whole", rows)
    learned = []
    learn = Classifiers.learn
    monkeypatch.setattr(Classifiers, "learn", lambda self, x, *rest: learned.append(x) or learn(self, x, *rest))
    monkeypatch.setattr(suspicion, "MOST_VALUES", 8_000)
    part, _ = find(tmp_path / "part", rows)
    assert learned[0].nnz <= 8_000 and 100 < learned[0].shape[0] < 400
    monkeypatch.setattr(suspicion, "MOST_VALUES", 1 << 24)
    monkeypatch.setattr(suspicion, "MOST_ROWS", 300)
    find(tmp_path / "few", rows)
    assert 200 < learned[1].shape[0] < 400
    for judgement in (whole, part):
        assert judgement.rows == 2000
        found = set(judgement.seen["number"][judgement.seen["wrong"]].tolist())
        assert len(found & {*range(0, 2000, 20)}) >= 80
        assert len(found) <= 120


def test_the_outcome_does_not_depend_on_how_rows_are_cut_into_chunks(tmp_path) -> None:
    rows = rows_of(400)
    one, _ = find(tmp_path / "one", rows, chunk=1000)
    many, _ = find(tmp_path / "many", rows, chunk=7)
    assert one.seen["number"].tolist() == many.seen["number"].tolist()
    np.testing.assert_allclose(one.seen["margin"], many.seen["margin"], atol=1e-6)
    assert (one.rows, one.right, one.pairs) == (many.rows, many.right, many.pairs)
