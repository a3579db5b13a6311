"""What can only be said of a row when all are known: whether it is left out, and its split. It takes no texts."""

from finetune_api.dataset import ConflictAction, DuplicateAction
from finetune_api.plan import PlanDataset
from finetune_api.report import ConflictReport, DuplicateReport

from finetune_trainer.data.duplicates.judge import Duplicates, find_duplicates
from finetune_trainer.data.groups import Groups, group_rows
from finetune_trainer.data.label_conflicts import find_conflicts
from finetune_trainer.data.ledger import Ledger, Verdict
from finetune_trainer.data.pipeline import Rows, Survey
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.split import TRAIN, leave_out_held_out, place_rows


def decide(rows: Rows, dataset: PlanDataset, quarantine: Quarantine, survey: Survey) -> Groups:
    """Sets verdicts and splits in the ledger; rows that are left out go into `quarantine`, counts into `survey`.

    Returns the groups: for each row the number of one that stands for all with the same input, or a similar one.
    """
    ledger = rows.ledger
    inputs = group_rows(ledger.input_keys)
    duplicates = find_duplicates(ledger, inputs, rows.signatures) if dataset.duplicates else None
    groups = duplicates.groups if duplicates else inputs
    keeps = dataset.duplicates is None or dataset.duplicates.action is DuplicateAction.KEEP
    ledger.verdicts[leave_out_held_out(ledger, inputs if keeps else groups)] = Verdict.HELD_OUT_DUPLICATE
    ledger.splits = place_rows(ledger, groups, dataset)
    if ledger.label_names:
        survey.conflicts = _leave_out_conflicts(ledger, groups, dataset)
    if duplicates:
        survey.duplicates = _leave_out_duplicates(ledger, duplicates, dataset)
    for file, rejection in rows.left_out():
        quarantine.add(file, rejection, invalid=False)
    survey.count(ledger)
    return groups


def _leave_out_duplicates(ledger: Ledger, duplicates: Duplicates, dataset: PlanDataset) -> DuplicateReport:
    """Rows of held-out sources stay: a score on them should be what it is elsewhere."""
    held_out = int((ledger.verdicts == Verdict.HELD_OUT_DUPLICATE).sum())
    divided = ledger.kept & (ledger.origins == TRAIN)
    settings, dropped = dataset.duplicates, 0
    if settings and settings.action is DuplicateAction.DROP:
        ledger.verdicts[divided & duplicates.near] = Verdict.NEAR_DUPLICATE
        ledger.verdicts[divided & duplicates.exact] = Verdict.DUPLICATE
        dropped = int((divided & (duplicates.near | duplicates.exact)).sum())
    return duplicates.report(settings.similarity if settings else None, dropped, held_out)


def _leave_out_conflicts(ledger: Ledger, groups: Groups, dataset: PlanDataset) -> ConflictReport:
    """After the splits are known: rows of validation and test stay."""
    action = dataset.labelling.conflicts if dataset.labelling else ConflictAction.KEEP
    conflicts = find_conflicts(groups, ledger.labels)
    trained = ledger.kept & (ledger.splits == TRAIN)
    unwanted = conflicts.unwanted(action, trained)
    ledger.verdicts[unwanted] = Verdict.CONFLICTING_LABELS
    return conflicts.report(ledger.kept & (ledger.splits != TRAIN), int(unwanted.sum()))
