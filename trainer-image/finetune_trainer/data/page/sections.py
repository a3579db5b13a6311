"""The page's sections, each a function of the report; one that has nothing to say is None."""

from collections.abc import Callable
from typing import Any

from finetune_api.report import CleaningSample, DataReport, Level, SourceReport
from markupsafe import Markup

from finetune_trainer.data.page.elements import (
    MOST_ROWS,
    Cell,
    Number,
    bar,
    bars,
    compact,
    count,
    counted,
    facts,
    fill,
    join,
    section,
    share,
    table,
    tiles,
    words,
)
from finetune_trainer.data.page.other import document_section, title_of

TAB = "\t"
LEVEL_STYLES = {Level.ERROR: "error", Level.WARNING: "warning"}
OWN_SECTIONS = {
    *("summary", "findings", "sample", "reused", "model", "sources", "ignored_files", "rejections"),
    *("cleaning", "personal_data", "labels", "lengths", "duplicates"),
}
"""Fields of the report that the functions here show; any other gets a section by its own description."""


def heading(report: DataReport, job: str) -> Markup:
    """What a person in a hurry reads."""
    errors = sum(finding.level is Level.ERROR for finding in report.findings)
    warnings = len(report.findings) - errors
    if errors:
        style, verdict = "error", "Refused"
    elif warnings:
        style, verdict = "warning", f"Usable, with {counted(warnings, 'warning')}"
    else:
        style, verdict = "good", "Ready"
    return fill(
        '<header><p class="kind">Data report</p><h1>{}</h1><p class="badge {}">{}</p>{}</header>',
        words(job),
        style,
        verdict,
        join([fill('<p class="lead">{}</p>', sentence) for sentence in sentences(report)]),
    )


def sentences(report: DataReport) -> list[str]:
    """The report in a few of them."""
    summary = report.summary
    said = []
    if any(finding.level is Level.ERROR for finding in report.findings):
        said.append("This data cannot be trained on before the errors below are mended.")
    if not summary.rows_read:
        return [*said, "No row was read."]
    kept = f"{counted(summary.rows_read, 'row')} read, {share(summary.rows_kept, summary.rows_read)} kept"
    if summary.rows_kept:
        splits = [("to train on", summary.train_rows), ("for validation", summary.validation_rows)]
        splits += [("for test", summary.test_rows)] if summary.test_rows else []
        kept += ": " + ", ".join(f"{compact(rows)} {name}" for name, rows in splits)
    said.append(f"{kept}.")
    if report.sample and not report.sample.complete:
        limit = report.sample.rows_per_source or 0
        said.append(
            f"This is a sample: at most {counted(limit, 'row')} of each source, from the beginnings of its files."
        )
    if report.rejections:
        reason, rows = max(report.rejections.items(), key=lambda item: item[1])
        said.append(f"The commonest reason to leave a row out is: {reason} ({counted(rows, 'row')}).")
    if summary.tokens:
        text = f"The training rows hold {counted(summary.tokens, 'token')}"
        if summary.truncated_rows:
            cut = share(summary.truncated_rows, summary.train_rows)
            text += f"; {cut} of the rows are cut at {count(summary.max_length)} tokens"
        said.append(f"{text}.")
    return said


def findings(report: DataReport) -> Markup | None:
    if not report.findings:
        return None
    items = [
        fill(
            '<li><b class="{}">{}</b> {}{}</li>',
            LEVEL_STYLES[finding.level],
            finding.level,
            fill("<code>{}</code> ", words(finding.field)) if finding.field else Markup(""),
            words(finding.message),
        )
        for finding in report.findings
    ]
    return fill('<ul class="findings" aria-label="Errors and warnings">{}</ul>', join(items))


def numbers(report: DataReport) -> Markup:
    summary = report.summary
    shown = [
        ("Rows read", count(summary.rows_read), counted(len(report.sources), "file")),
        ("Rows kept", count(summary.rows_kept), share(summary.rows_kept, summary.rows_read)),
        ("Rows left out", count(summary.rows_rejected), share(summary.rows_rejected, summary.rows_read)),
    ]
    if summary.tokens:
        shown.append(("Tokens to train on", count(summary.tokens), f"{count(summary.supervised_tokens)} with a loss"))
    return tiles(shown)


def splits(report: DataReport) -> Markup | None:
    summary = report.summary
    if not summary.rows_kept:
        return None
    rows = {"Training": summary.train_rows, "Validation": summary.validation_rows, "Test": summary.test_rows}
    shown = {name: number for name, number in rows.items() if number or name != "Test"}
    body: list[list[Cell]] = [
        [name, number, Number(share(number, summary.rows_kept)), bar(number, summary.rows_kept)]
        for name, number in shown.items()
    ]
    return section("Splits", table("Rows that are kept, by what they are for", ["Split", "Rows", "Share", ""], body))


def rejections(report: DataReport) -> Markup | None:
    if not report.rejections:
        return None
    return section(
        "Rows left out",
        bars("By reason", "Reason", report.rejections, report.summary.rows_read, hue=3),
        note="Each of them stands in quarantine.jsonl with its file and line. Shares are of all rows read.",
    )


def duplicates(report: DataReport) -> Markup | None:
    found = report.duplicates
    if found is None:
        return None
    kinds = {"The same as an earlier row": found.exact_rows}
    kinds |= {"Similar to an earlier row": found.near_rows} if found.near_rows is not None else {}
    kinds |= {"In a validation or test source, too": found.held_out_rows}
    note = f"{counted(found.rows_dropped, 'duplicate')} left out by dataset.duplicates."
    body = [bars("Rows that say what another row says", "Row", kinds, report.summary.rows_read)]
    if found.group_sizes:
        most = max(found.group_sizes.values())
        sizes: list[list[Cell]] = [
            [f"{size} rows", groups, bar(groups, most)] for size, groups in found.group_sizes.items()
        ]
        title = (
            f"Groups of similar rows, the largest of {counted(found.largest_group, 'row')}; a group goes to one split"
        )
        body.append(table(title, ["Size of the group", "Groups", ""], sizes))
    if found.note:
        body.append(fill("<p>{}</p>", found.note))
    return section("Duplicates", *body, note=note)


def labels(report: DataReport) -> Markup | None:
    if not report.labels:
        return None
    names = [name for name in ("train", "validation", "test") if sum(report.labels.get(name, {}).values())]
    if not names:
        return None
    totals = {name: sum(report.labels[name].values()) for name in names}
    ranked = sorted(report.labels[names[0]].items(), key=lambda item: -item[1])
    most = {name: max(report.labels[name].values()) / totals[name] for name in names}
    rows: list[list[Cell]] = []
    for label, _ in ranked[:MOST_ROWS]:
        row: list[Cell] = [label]
        for hue, name in enumerate(names, start=1):
            number = report.labels[name].get(label, 0)
            row += [number, Number(share(number, totals[name])), bar(number / totals[name], most[name], hue)]
        rows.append(row)
    columns = ["Label", *(column for name in names for column in (title_of(name), "Share", ""))]
    rest = len(ranked) - MOST_ROWS
    note = f"And {counted(rest, 'rarer label')}, which data.json has." if rest > 0 else ""
    return section("Labels", table("Rows by label and split", columns, rows, note), note=_balance(ranked))


def _balance(ranked: list[tuple[str, int]]) -> str:
    (most, largest), (least, smallest) = ranked[0], ranked[-1]
    if not smallest or most == least:
        return f"{counted(len(ranked), 'label')}."
    return f"{counted(len(ranked), 'label')}; the commonest has {largest / smallest:.3g} times the rows of the rarest."


def lengths(report: DataReport) -> Markup | None:
    found = report.lengths
    if found is None:
        return None
    limit = report.summary.max_length
    points = [("Half of the rows", found.p50), ("9 of 10 rows", found.p90), ("99 of 100 rows", found.p99)]
    points.append(("All rows", found.longest))
    table_rows: list[list[Cell]] = [[name, tokens, bar(tokens, found.longest, 2)] for name, tokens in points]
    cut = report.summary.truncated_rows
    return section(
        "Lengths",
        table("Training rows are no longer than", ["Of the training rows", "Tokens", ""], table_rows),
        note=f"On average {found.mean:,.1f} tokens before any cut; {counted(cut, 'row')} cut at {count(limit)} tokens.",
    )


def cleaning(report: DataReport) -> Markup | None:
    if report.cleaning is None:
        return None
    steps = report.cleaning.steps
    rows: list[list[Cell]] = [[name, step.rows_changed, step.rows_dropped] for name, step in steps.items()]
    body = [table("What each setting of dataset.clean did", ["Setting", "Rows changed", "Rows left out"], rows)]
    for name, step in steps.items():
        if step.samples:
            body.append(_samples(name, step.samples))
    if report.cleaning.languages:
        found = report.cleaning.languages
        body.append(bars("Languages found", "Language", found, sum(found.values()), hue=2))
    note = "Samples are redacted: a letter is shown as x, a digit as 0."
    return section("Cleaning", *body, note=note if any(step.samples for step in steps.values()) else "")


def _samples(name: str, samples: list[CleaningSample]) -> Markup:
    rows: list[list[Cell]] = [
        [
            fill('<span class="sample">{}</span>', words(sample.before)),
            fill("<em>left out</em>")
            if sample.after is None
            else fill('<span class="sample">{}</span>', words(sample.after)),
        ]
        for sample in samples
    ]
    return table(f"Samples of {name}", ["Before", "After"], rows)


def personal_data(report: DataReport) -> Markup | None:
    found = report.personal_data
    if found is None:
        return None
    note = f"Found in {counted(found.rows, 'row')}. Action: {found.action}. The values themselves are written nowhere."
    if not found.found:
        return section("Personal data", note=note)
    total = sum(found.found.values())
    return section("Personal data", bars("Values by kind", "Kind", found.found, total, unit="Values", hue=3), note=note)


def others(report: DataReport) -> Markup | None:
    """Parts of the report without a section here."""
    parts = [
        document_section(title_of(name), value, note=field.description or "", limit=report.summary.max_length)
        for name, field in type(report).model_fields.items()
        if name not in OWN_SECTIONS and (value := _document(report, name)) is not None
    ]
    return join(parts) if parts else None


def _document(report: DataReport, name: str) -> Any:
    return getattr(report, name)


def sources(report: DataReport) -> Markup | None:
    if not report.sources:
        return None
    columns = ["File", "For", "Rows look like", "Kind", "Rows read", "Left out"]
    rows = [_source(source) for source in report.sources[:MOST_ROWS]]
    rest = len(report.sources) - MOST_ROWS
    body = [table("Files, as they were recognised by their content", columns, rows, _more(rest))]
    if report.ignored_files:
        items = [fill("<li><code>{}</code></li>", words(uri)) for uri in report.ignored_files[:MOST_ROWS]]
        body.append(
            fill(
                "<h3>Files that are no data</h3><ul>{}</ul>{}",
                join(items),
                fill('<p class="note">{}</p>', _more(len(report.ignored_files) - MOST_ROWS)),
            )
        )
    return section("Sources", *body)


def _source(source: SourceReport) -> list[Cell]:
    file = source.file
    kind = [file.kind, file.compression, file.encoding]
    if file.delimiter:
        kind.append(f"fields between {'tabs' if file.delimiter == TAB else file.delimiter}")
    return [
        source.uri,
        source.field,
        source.format,
        ", ".join(filter(None, kind)),
        source.rows_read,
        source.rows_rejected,
    ]


def _more(rest: int) -> str:
    return f"And {count(rest)} more, which data.json has." if rest > 0 else ""


def origin(report: DataReport) -> Markup:
    summary, model = report.summary, report.model
    known: list[tuple[str, Cell]] = [("Longest row allowed", Number(counted(summary.max_length, "token")))]
    if model is not None:
        known.append(("Model", model.architecture))
        known.append(("Parameters", Number(compact(model.parameters))))
        known += [("Model's revision", model.revision)] if model.revision else []
        known += [("Context length", model.context_length)] if model.context_length else []
    if report.reused:
        known.append(("Prepared", "by an earlier run, from the same files, settings and tokenizer"))
    if summary.fingerprint:
        known.append(("Fingerprint of rows, tokenizer and settings", fill("<code>{}</code>", summary.fingerprint)))
    return section("Where it comes from", facts(known))


SECTIONS: tuple[Callable[[DataReport], Markup | None], ...] = (
    findings,
    numbers,
    splits,
    rejections,
    duplicates,
    labels,
    lengths,
    cleaning,
    personal_data,
    others,
    sources,
    origin,
)
"""In the order of the page."""
