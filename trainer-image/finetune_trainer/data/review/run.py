"""The review of one run: what is suspicious is found, shown and counted."""

from collections.abc import Callable
from pathlib import Path

from finetune_api.plan import PlanReview
from finetune_api.report import DecisionReport, ReviewReport

from finetune_trainer.data.groups import Groups
from finetune_trainer.data.label_conflicts import find_conflicts
from finetune_trainer.data.pipeline import Rows
from finetune_trainer.data.review.decisions import Decided, ReviewLog
from finetune_trainer.data.review.queue import Queue
from finetune_trainer.data.review.suspicion import Facts, find_suspicious
from finetune_trainer.data.split import TRAIN
from finetune_trainer.fetch import SourceFile


def find_facts(rows: Rows, groups: Groups, decided: Decided) -> Facts:
    """groups: see `Facts`."""
    ledger = rows.ledger
    return Facts(
        groups=groups,
        decided=decided.covers(ledger.input_keys),
        conflicting=find_conflicts(groups, ledger.labels).rows,
    )


def review(
    rows: Rows, facts: Facts, settings: PlanReview, path: Path, advance: Callable[[float], None]
) -> ReviewReport:
    """Marks the suspicious rows in the ledger, and writes review.jsonl to `path`. The report is without decisions.

    `advance` is called often with the share of the work that is done, and may raise to stop.
    """
    ledger = rows.ledger
    judgement = find_suspicious(rows.spool, ledger, facts, advance)
    suspicious = judgement.seen["number"][judgement.seen["wrong"]]
    ledger.suspicious[suspicious] = True
    exported = Queue(rows, judgement.seen, facts.conflicting).write(path, settings.max_rows, lambda: advance(1.0))
    return ReviewReport(
        judged_rows=judgement.rows,
        accuracy=judgement.accuracy,
        suspicious_rows=len(suspicious),
        estimated_error_share=judgement.error_share,
        pairs=judgement.label_pairs(ledger.label_names),
        exported_rows=exported,
        suspect_weight=settings.suspect_weight,
    )


def report_decisions(rows: Rows, decided: Decided, log: ReviewLog, hashes: dict[SourceFile, str]) -> DecisionReport:
    """hashes: of the files with decisions."""
    ledger = rows.ledger
    held_out = ledger.kept & (ledger.splits != TRAIN) & decided.covers(ledger.input_keys)
    return DecisionReport(
        files={file.uri: digest for file, digest in hashes.items()},
        corrected=log.corrected,
        confirmed=log.confirmed,
        dropped=log.dropped,
        held_out=int(held_out.sum()),
        unknown=len(decided.decisions.keys() - log.found),
        undecided=decided.undecided,
    )
