"""How well dataset.review finds wrong labels that are put in: `python benchmarks/suspicion.py [--cleanlab]`.

Labels of the financial-sentiment example's training rows are exchanged at random, and counted as found where they are
suspicious. With --cleanlab, cleanlab is asked too, in build/cleanlab-venv, where it is installed the first time: about
the same probabilities, and with a classifier of its own (logistic regression on tf-idf).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.review.confident import Thresholds, is_suspicious, judge
from finetune_trainer.data.review.cross_validation import Classifiers, Features, fold_of
from finetune_trainer.data.split import input_key

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "financial-sentiment" / "data" / "train.jsonl"
VENV = ROOT / "build" / "cleanlab-venv"
PACKAGES = ["cleanlab==2.9.0", "scikit-learn==1.9.1"]

CLEANLAB = """
import json, sys
import numpy as np
from cleanlab.classification import CleanLearning
from cleanlab.filter import find_label_issues
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

given = np.load(sys.argv[1])
labels, probabilities, texts = given["labels"], given["probabilities"], given["texts"].tolist()
found = {}
for kind in ("confident_learning", "prune_by_noise_rate"):
    found[f"cleanlab, {kind}, our probabilities"] = find_label_issues(
        labels, probabilities, filter_by=kind, return_indices_ranked_by="normalized_margin", n_jobs=1)
learner = CleanLearning(LogisticRegression(max_iter=1000), seed=0, find_label_issues_kwargs={"n_jobs": 1})
issues = learner.find_label_issues(TfidfVectorizer(ngram_range=(1, 2)).fit_transform(texts), labels)
suspects = issues[issues["is_label_issue"]].sort_values("label_quality")
found["cleanlab, CleanLearning, tf-idf and logistic regression"] = suspects.index.to_numpy()
print(json.dumps({name: rows.tolist() for name, rows in found.items()}))
"""


class Score(NamedTuple):
    """`first`: share of wrong labels in the first rows of the ranking, as many as there are wrong ones."""

    suspicious: int
    precision: float
    recall: float
    first: float


def read() -> tuple[list[str], np.ndarray]:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    names = sorted({row["label"] for row in rows})
    return [row["text"] for row in rows], np.array([names.index(row["label"]) for row in rows])


def spoil(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which so many are another one, and which those are."""
    random = np.random.default_rng(seed)
    wrong = np.zeros(len(labels), bool)
    wrong[random.choice(len(labels), round(share * len(labels)), replace=False)] = True
    classes = int(labels.max()) + 1
    return np.where(wrong, (labels + random.integers(1, classes, len(labels))) % classes, labels), wrong


def cross_validate(texts: list[str], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities out of sample [rows, classes], and the rows that are suspicious, ranked."""
    classes = int(labels.max()) + 1
    folds = fold_of(np.array([input_key(LabelledText(text, "")) for text in texts], np.uint64))
    features, classifiers = Features(classes).of(texts), Classifiers(classes)
    classifiers.learn(features, labels, folds, lambda _: None)
    probabilities = classifiers.probabilities(features, folds)
    thresholds = Thresholds(classes)
    thresholds.add(probabilities, labels)
    judged = judge(probabilities, labels, thresholds.values)
    suspicious = np.flatnonzero(is_suspicious(judged, labels))
    return probabilities, suspicious[np.argsort(judged.margin[suspicious], kind="stable")]


def ask_cleanlab(texts: list[str], labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, texts=np.array(texts), labels=labels, probabilities=probabilities)
        file.flush()
        command = [VENV / "bin" / "python", "-W", "ignore", "-c", CLEANLAB, file.name]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: np.array(rows, int) for name, rows in json.loads(answer.splitlines()[-1]).items()}


def score(ranked: np.ndarray, wrong: np.ndarray) -> Score:
    right = int(wrong[ranked].sum())
    first = ranked[: int(wrong.sum())]
    return Score(len(ranked), right / max(1, len(ranked)), right / int(wrong.sum()), float(wrong[first].mean()))


def install() -> None:
    if not VENV.exists():
        venv.create(VENV, with_pip=True)
        subprocess.run([VENV / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cleanlab", action="store_true", help="compare with cleanlab")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="of labels that are made wrong"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how often, each time with other labels")
    options = parser.parse_args()
    if options.cleanlab:
        install()
    texts, true = read()
    print(f"{len(texts)} rows, {options.seeds} draws of wrong labels; means\n")
    print("| wrong | who | suspicious | precision | recall | wrong among the first |\n|---:|---|---:|---:|---:|---:|")
    seconds = []
    for share in options.shares:
        scores: dict[str, list[Score]] = defaultdict(list)
        for seed in range(options.seeds):
            labels, wrong = spoil(true, share, seed)
            started = time.perf_counter()
            probabilities, ranked = cross_validate(texts, labels)
            seconds.append(time.perf_counter() - started)
            found = {"ours": ranked} | (ask_cleanlab(texts, labels, probabilities) if options.cleanlab else {})
            for name, rows in found.items():
                scores[name].append(score(rows, wrong))
        for name, several in scores.items():
            mean = np.mean(several, axis=0)
            print(f"| {share:.0%} | {name} | {mean[0]:.0f} | {mean[1]:.3f} | {mean[2]:.3f} | {mean[3]:.3f} |")
    print(f"\nOurs, classifiers included: {np.median(seconds):.2f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
