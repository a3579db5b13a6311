"""The stage `prepare`: fetches data and model, judges every row, and writes what training memory-maps.

The data is judged before the model is fetched: a mistake in it should not wait for a large download.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, PrepareResult, Result
from finetune_api.report import (
    DATA_PAGE,
    DATA_REPORT,
    QUARANTINE,
    REVIEW,
    DataReport,
    SampleReport,
    TokenizationReport,
)
from finetune_api.spec import Task
from finetune_api.status import ModelStatus

from finetune_trainer.data.advice import Advice, warnings_of
from finetune_trainer.data.cache import PreparedCache, hash_sources, hash_tokenizer
from finetune_trainer.data.convert import usable_formats
from finetune_trainer.data.decide import decide
from finetune_trainer.data.duplicates.search import SignatureFiles
from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.fingerprint import Fingerprint
from finetune_trainer.data.groups import Groups
from finetune_trainer.data.labels import check_minimum, label_order, resolve_labels
from finetune_trainer.data.page import render_html
from finetune_trainer.data.pipeline import PlacedRow, Rows, batch_rows, open_sources, read_all
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.read import Rejection, recognise_file
from finetune_trainer.data.report import Findings
from finetune_trainer.data.review.decisions import Decided, check_labels, check_names, read_decisions
from finetune_trainer.data.split import Split, check_splits
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.statistics import TokenStatistics, truncation_policy
from finetune_trainer.data.store import (
    DataManifest,
    SplitWriter,
    read_manifest,
    write_manifest,
)
from finetune_trainer.data.values import InvalidRowError
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.fetch import fetch_source, remove_folder
from finetune_trainer.fetch_adapter import fetch_adapter
from finetune_trainer.fetch_model import fetch_model
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch
from finetune_trainer.workspace import Workspace, hash_file, new_folder, write_file

if TYPE_CHECKING:  # transformers takes seconds; bad data should be told of before
    from finetune_trainer.data.tokenize import Encoded, Encoder

logger = logging.getLogger(__name__)

DOWNLOADS = ".data-download"
SPOOL, SIGNATURES = "rows", "signatures"


@dataclass(frozen=True)
class Run:
    """One run of the stage. `findings` grows from step to step."""

    plan: Plan
    workspace: Workspace
    telemetry: Telemetry
    quarantine: Quarantine
    findings: Findings
    advice: Advice = field(default_factory=Advice)

    def watch(self, activity: str, start: float, end: float) -> Watch:
        return Watch(self.telemetry, activity, start, end)

    def judge(self) -> None:
        """Raises UserError (DataInvalid) if too much was rejected, or a split or a label has not enough rows left.

        What a part of the data lacks may be in the rest: of a sample only that is held against it which it has.
        """
        dataset, survey, findings, advice = self.plan.dataset, self.findings.survey, self.findings, self.advice
        with advice.check(rows=self.quarantine.invalid):
            self.quarantine.check(survey.rows_read, dataset.max_rejected)
        if not (survey.cut and survey.rows.total()):
            with advice.check():
                check_splits(survey.rows, dataset, self.quarantine.reasons())
        if self.plan.task is Task.CLASSIFICATION:
            with advice.check(doubtful=survey.cut):
                labels = findings.labels = resolve_labels(survey.labels, dataset.labels, findings.labels)
                if dataset.labelling and dataset.labelling.minimum_rows:
                    check_minimum(survey.labels[Split.TRAIN], labels, dataset.labelling.minimum_rows, dataset.labels)
            if survey.cut:
                found = (label for counts in survey.labels.values() for label in counts)
                findings.labels = findings.labels or dataset.labels or label_order(found)
        advice.end()

    def report(self) -> DataReport:
        report, sample = self.findings.report(self.quarantine), self.plan.sample
        warnings = warnings_of(report, self.quarantine.invalid, self.plan.dataset.max_rejected)
        more: dict[str, Any] = {
            "findings": [*self.advice.findings, *warnings],
        }
        if sample is not None:  # without its weights not much is known of the model
            read = SampleReport(rows_per_source=sample.rows, complete=not self.findings.survey.cut)
            more |= {"sample": read, "model": None}
        return report.model_copy(update=more)

    def write_report(self, report: DataReport) -> None:
        """For programs and for people."""
        write_file(self.workspace.report / DATA_REPORT, report.to_json(indent=2))
        write_file(self.workspace.report / DATA_PAGE, render_html(report, self.plan.job.name))


def run(plan: Plan, telemetry: Telemetry) -> Result:
    """Prepares the workspace. Raises UserError, StageError (network) and Interrupted; can be run again at any time."""
    workspace = Workspace(Path(plan.workspace))
    downloads = workspace.root / DOWNLOADS
    remove_folder(downloads)
    try:
        with Quarantine(workspace.report / QUARANTINE) as quarantine:
            this = Run(plan, workspace, telemetry, quarantine, Findings(max_length=plan.training.max_length))
            try:
                fetch_data(this, downloads)
                cached = Cached(this)
                report = cached.restore() or make_data(this, downloads)
            except UserError as error:
                this.advice.refuse(error)
                this.write_report(this.report())
                raise
            this.write_report(report)
        cached.store()
    finally:
        remove_folder(downloads)
    if plan.sample is not None:
        return Result(stage=Stage.PREPARE, outcome=Outcome.SUCCEEDED)
    if report.model is None:
        raise TypeError("a report of prepared data names the model")
    prepared = PrepareResult(data=report.summary, model=report.model)
    return Result(stage=Stage.PREPARE, outcome=Outcome.SUCCEEDED, prepare=prepared)


class Cached:
    """Prepared data of an earlier run of the same job, or of another one that is made from the same."""

    def __init__(self, this: Run) -> None:
        self._this = this
        self._cache = PreparedCache(Path(this.plan.cache) if this.plan.cache else None)
        findings = this.findings
        self._sources = hash_sources(this.plan, findings.sources, findings.hashes, findings.decisions)
        self._restored = False

    def restore(self) -> DataReport | None:
        """Its report, with what this job trains of the model; None if there is none that can be used."""
        this = self._this
        if not self._cache.knows(self._sources):
            return None
        revision = fetch_model(this.plan.model, this.workspace, this.watch("Fetching the model", 0.2, 0.5))
        watch = this.watch("Reusing prepared data", 0.5, 1)
        tokenizer = hash_tokenizer(this.workspace.model)
        found = self._cache.restore(self._sources, tokenizer, this.workspace, watch.check)
        if found is None:
            return None
        this.findings.labels, this.findings.max_length = found.manifest.labels, found.manifest.max_length
        _, model = open_foundation(this, revision)
        this.quarantine.discard()
        self._restored = True
        logger.info("The data was prepared before, from the same sources, settings and tokenizer: it is used again")
        return found.report.model_copy(update={"model": model, "reused": True})

    def store(self) -> None:
        if not self._restored:
            workspace, watch = self._this.workspace, self._this.watch("Tokenizing", 1, 1)
            self._cache.store(self._sources, hash_tokenizer(workspace.model), workspace, watch.check)


def fetch_data(this: Run, downloads: Path) -> None:
    """The sources, on this machine, with the hashes of their files."""
    dataset, findings = this.plan.dataset, this.findings
    watch = this.watch("Fetching data", 0, 0.1)
    sources = open_sources(dataset, usable_formats(this.plan), downloads, watch)
    findings.hashes = {file: hash_file(file.path, watch.check) for opened in sources for file in opened.files}
    for source in this.plan.dataset.review.decisions if this.plan.dataset.review else ():
        for file in fetch_source(source, downloads / source.field, watch).files:
            findings.decisions[file] = hash_file(file.path, watch.check)
    findings.files = {file: recognise_file(file) for file in findings.hashes}
    findings.sources = sources


def make_data(this: Run, downloads: Path) -> DataReport:
    """The data is judged before the model is fetched."""
    similarity = this.plan.dataset.duplicates.similarity if this.plan.dataset.duplicates else None
    with ExitStack() as stack:
        spool = stack.enter_context(Spool(downloads / SPOOL))
        signatures = None
        if similarity is not None:
            signatures = stack.enter_context(SignatureFiles(downloads / SIGNATURES, similarity))
        rows = read_data(this, Rows(this.findings.sources, spool, signatures))
        rows.ledger.settle()  # looking at a model takes hundreds of MB by itself
        encoder = fetch_foundation(this)
        if encoder is not None:
            write_data(this, rows, encoder)
    return this.report()


def read_data(this: Run, rows: Rows) -> Rows:
    """Judges every row: bad data ends here."""
    dataset, findings = this.plan.dataset, this.findings
    most = this.plan.sample.rows if this.plan.sample else None
    watch = this.watch("Reading data", 0.1, 0.2)
    decided = read_decisions(findings.decisions, dataset, watch.check)
    read_all(rows, dataset, this.quarantine, findings.survey, watch, decisions=decided.decisions, most=most)
    with this.advice.check(doubtful=findings.survey.cut):
        check_labels(decided, findings.survey.log.review)
    groups = decide(rows, dataset, this.quarantine, findings.survey)
    splits = ", ".join(f"{split} {count}" for split, count in sorted(findings.survey.rows.items()))
    logger.info("%d rows read, %d rejected: %s", findings.survey.rows_read, this.quarantine.rejected, splits)
    this.judge()
    if dataset.review:
        review_labels(this, rows, groups, decided)
    return rows


def review_labels(this: Run, rows: Rows, groups: Groups, decided: Decided) -> None:
    """Marks the rows whose label is probably wrong, and shows them to people."""
    from finetune_trainer.data.review.run import find_facts, report_decisions, review  # scikit-learn takes a second

    settings, findings = this.plan.dataset.review, this.findings
    if settings is None or len(rows.ledger.label_names) < 2:
        return
    check_names(rows.ledger.label_names)
    watch = this.watch("Looking for wrong labels", 0.2, 0.2)
    path, facts = this.workspace.report / REVIEW, find_facts(rows, groups, decided)
    report = review(rows, facts, settings, path, lambda done: watch.advance(done, 1))
    if settings.decisions:
        decisions = report_decisions(rows, decided, findings.survey.log.review, findings.decisions)
        report = report.model_copy(update={"decisions": decisions})
    findings.review = report
    logger.info("%d of %d rows have a label that is probably wrong", report.suspicious_rows, report.judged_rows)


def fetch_foundation(this: Run) -> "Encoder | None":
    """The model, checked, and its tokenizer; None if a sample is judged and the model is out of reach."""
    sample = this.plan.sample
    if sample is not None and not sample.tokenize:
        return None
    watch = this.watch("Fetching the model", 0.2, 0.5)
    try:
        revision = fetch_model(this.plan.model, this.workspace, watch, weights=sample is None)
        return open_foundation(this, revision)[0]
    except (UserError, Interrupted):
        raise
    except StageError as error:
        if sample is None:
            raise
        this.advice.warn_unreachable(error)
        return None


def open_foundation(this: Run, revision: str | None) -> tuple["Encoder", ModelStatus]:
    """Checks that the model in the workspace fits the task, and opens its tokenizer."""
    plan, workspace, findings = this.plan, this.workspace, this.findings
    watch = this.watch("Opening the model", 0.5, 0.5)

    from finetune_trainer.data.tokenize import Encoder
    from finetune_trainer.model import facts
    from finetune_trainer.model.load import build_skeleton, check_start_adapter, load_tokenizer
    from finetune_trainer.train.footprint import add_footprint

    config = facts.load_config(workspace.model, plan.model.trust_remote_code)
    facts.check_task(config, plan.task)
    model = findings.model = facts.read_facts(workspace.model, config, revision)
    facts.check_layers(model, plan.last_layers)
    watch.check()
    model = findings.model = add_footprint(model, partial(build_skeleton, plan, workspace, findings.labels), plan)
    if plan.model.adapter is not None:
        fetch_adapter(plan.model.adapter, workspace, this.watch("Fetching the adapter", 0.5, 0.5))
        check_start_adapter(plan, workspace, findings.labels, revision)
    tokenizer = load_tokenizer(workspace, plan.model.trust_remote_code)
    facts.check_tokenizer(tokenizer, plan.task, model.vocabulary_size)
    limit = facts.context_length(config, tokenizer)
    findings.max_length = min(plan.training.max_length, limit or plan.training.max_length)
    logger.info("%s with %d parameters", model.architecture, model.parameters)
    return Encoder(tokenizer, findings.max_length, findings.labels or (), model.vocabulary_size), model


def write_data(this: Run, rows: Rows, encoder: "Encoder") -> None:
    """Tokenizes the rows into data/, whole or not at all."""
    plan, findings = this.plan, this.findings
    names = [split for split in Split if split is not Split.TEST or plan.dataset.test]
    labels: dict[str, Counter[str]] = {split: Counter() for split in names}
    tokenizer = hash_tokenizer(this.workspace.model)
    fingerprint = Fingerprint(plan, findings.labels, findings.max_length, tokenizer)
    statistics = TokenStatistics(encoder, findings.survey.rows[Split.TRAIN])
    with new_folder(this.workspace.data) as folder:
        with ExitStack() as stack:
            weighted = {Split.TRAIN} if _suspect_weight(this) < 1 else set()
            writers = {
                name: stack.enter_context(SplitWriter(folder / name, plan.task, weighted=name in weighted))
                for name in names
            }
            for row, encoded in _encoded_rows(this, rows, encoder):
                writers[row.split].write(encoded.row)
                fingerprint.add(row.split, encoded.row)
                statistics.add(row.split, row.example, encoded)
                if row.split is Split.TRAIN:
                    findings.lengths.add(encoded.length)
                    findings.cut_lengths.add(sum(len(part.input_ids) for part in encoded.row.documents))
                if isinstance(row.example, LabelledText):
                    labels[row.split][row.example.label] += 1
        splits = {str(name): writer.manifest for name, writer in writers.items()}
        findings.survey.labels = labels
        findings.survey.rows = Counter({name: split.rows for name, split in splits.items()})
        this.judge()
        findings.manifest = DataManifest(
            task=plan.task,
            labels=findings.labels,
            max_length=findings.max_length,
            fingerprint=fingerprint.value,
            splits=splits,
        )
        write_manifest(folder, findings.manifest)
        findings.tokenization = _tokenization(this, statistics, folder)
    train = splits[Split.TRAIN]
    logger.info("%d training rows with %d tokens, %d rows were cut", train.rows, train.tokens, train.truncated_rows)


def _suspect_weight(this: Run) -> float:
    """How much suspicious rows count in training; 1 if there are none."""
    review = this.findings.review
    if review is None or review.suspect_weight is None or not review.suspicious_rows:
        return 1.0
    return review.suspect_weight


def _tokenization(this: Run, statistics: TokenStatistics, folder: Path) -> TokenizationReport:
    """`folder`: the data as it is trained on."""
    plan, findings = this.plan, this.findings
    paired = plan.dpo is not None
    return TokenizationReport(
        truncation=truncation_policy(findings.max_length, plan.task, paired),
        splits=statistics.splits(read_manifest(folder).splits, plan.task),
        histogram=findings.lengths.histogram(),
        texts=statistics.texts(),
        packing=statistics.packing(findings.max_length, plan.task, paired),
    )


def _encoded_rows(this: Run, rows: Rows, encoder: "Encoder") -> Iterator[tuple[PlacedRow, "Encoded"]]:
    """All rows that can be learned from, in their order."""
    watch = this.watch("Tokenizing", 0.5, 1)
    total, done, weight = this.findings.survey.rows.total(), 0, _suspect_weight(this)
    for batch in batch_rows(rows.placed()):
        for row, result in zip(batch, encoder.encode([row.example for row in batch]), strict=True):
            if isinstance(result, InvalidRowError):
                this.quarantine.add(row.file, Rejection(row.line, result.reason, result.detail))
            else:
                weighted = result.row._replace(weight=weight) if row.suspicious else result.row
                yield row, result._replace(row=weighted)
        done += len(batch)
        watch.advance(done, total)
