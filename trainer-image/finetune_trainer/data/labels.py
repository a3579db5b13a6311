"""The labels of a classification: a closed set in the order of the class ids, with enough rows of each."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from finetune_api.constants import Reason
from finetune_api.report import BalanceReport

from finetune_trainer.errors import UserError

MAX_LABELS = 512
NAMED_IN_ERRORS = 3

EXTREME_RATIO = 100
"""Commonest label to rarest; about what Google's course calls extreme: less than 1 % of the rows
(https://developers.google.com/machine-learning/crash-course/overfitting/imbalanced-datasets)."""


def label_order(found: Iterable[str]) -> list[str]:
    """Sorted; by number if all are whole numbers, so that class ids of a dataset stay what they were."""
    labels = set(found)
    try:
        return sorted(labels, key=lambda label: (int(label), label))  # "1" and "01" are the same number
    except ValueError:
        return sorted(labels)


def check_label_count(found: Sequence[str]) -> None:
    """Raises UserError if there are so many labels that the column can hold none."""
    if len(found) > MAX_LABELS:
        raise UserError(
            Reason.DATA_INVALID,
            f"dataset.sources: more than {MAX_LABELS} different labels: is this the right column? "
            "Name it in columns.label, or list the labels in dataset.labels",
        )


def resolve_labels(
    rows: Mapping[str, Counter[str]], listed: list[str] | None, resolved: list[str] | None = None
) -> list[str]:
    """The labels in the order of their class ids, from `rows` (split -> label -> rows) or dataset.labels (`listed`);
    `resolved` are those that an earlier look found.

    Raises UserError (DataInvalid) if there are less than two, or one that training never sees. It names only
    labels that the spec lists: others are text of the dataset.
    """
    labels = resolved or listed or label_order(label for counts in rows.values() for label in counts)
    if len(labels) < 2:
        raise UserError(
            Reason.DATA_INVALID, f"dataset.sources: {len(labels)} label found; a classification needs at least 2"
        )
    unseen = [label for label in labels if not rows["train"][label]]
    if unseen and not listed:
        raise UserError(
            Reason.DATA_INVALID,
            f"dataset.sources: no training row has {len(unseen)} of the {len(labels)} labels: add such rows, "
            "or list the labels in dataset.labels",
        )
    if unseen:
        names = ", ".join(f"'{label}'" for label in unseen[:NAMED_IN_ERRORS])
        more = f" and {len(unseen) - NAMED_IN_ERRORS} more" if len(unseen) > NAMED_IN_ERRORS else ""
        raise UserError(
            Reason.DATA_INVALID,
            f"dataset.sources: no training row has the label {names}{more}: add such rows, or correct dataset.labels",
        )
    return labels


def check_minimum(rows: Mapping[str, int], labels: Sequence[str], minimum: int, listed: Sequence[str] | None) -> None:
    """Raises UserError (DataInvalid) if a label has less than `minimum` training rows. `rows`: label -> training rows.

    It names only labels that the spec lists (`listed`): others are text of the dataset.
    """
    scarce = [label for label in labels if rows[label] < minimum]
    if not scarce:
        return
    if listed:
        found = ", ".join(f"'{label}' has {rows[label]}" for label in scarce[:NAMED_IN_ERRORS])
        found += f", and {len(scarce) - NAMED_IN_ERRORS} more have too few" if len(scarce) > NAMED_IN_ERRORS else ""
    else:
        fewest = min(rows[label] for label in scarce)
        found = f"{len(scarce)} of the {len(labels)} labels have less, the rarest {fewest}"
    raise UserError(
        Reason.DATA_INVALID,
        f"dataset.labelling.minimumRows: each label needs {minimum} training rows; {found}: add such rows or lower it",
    )


def balance(rows: Mapping[str, int], labels: Sequence[str]) -> BalanceReport | None:
    """How evenly `labels` share the training rows (`rows`: label -> rows); None if one has no rows at all."""
    counts = [rows[label] for label in labels]
    if not counts or not min(counts):
        return None
    share, ratio = max(counts) / sum(counts), max(counts) / min(counts)
    note = None
    if ratio >= EXTREME_RATIO:
        note = (
            f"extreme: {ratio:.0f} rows of the commonest label for each of the rarest ({min(counts)} rows). Always "
            f"answering the commonest has an accuracy of {share:.3f} on such rows: judge by macroF1"
        )
    return BalanceReport(majority_share=round(share, 4), imbalance_ratio=round(ratio, 2), note=note)
