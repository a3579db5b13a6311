"""What `finetune validate` prints for people: a line per finding, then the data in tables."""

from collections.abc import Mapping, Sequence

from finetune_api.report import DataReport, Level
from finetune_api.text import visible
from finetune_api.validation import Validation
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_operator.display import Terminal

STYLES = {Level.ERROR: "red", Level.WARNING: "yellow"}
MOST_ROWS = 20
"""Of a table that could have any number of them."""

PLAIN_WIDTH = 1000
"""Where no terminal sets one: no line is broken or cut."""


def make_console() -> Console:
    console = Terminal()
    return console if console.is_terminal else Terminal(width=PLAIN_WIDTH)


def print_validation(console: Console, validation: Validation) -> None:
    """Findings as compilers print them, with file and line; the verdict; tables of what the data is like."""
    for found in validation.findings:
        where = f"{validation.manifest}:{found.line}" if found.line else validation.manifest
        line = Text(f"{where}: ")
        line.append(found.level, STYLES[found.level])
        line.append("".join(f": {visible(part)}" for part in (found.field, found.message) if part))
        console.print(line, soft_wrap=True)
    console.print(Text(_verdict(validation), "green" if validation.valid else "red"), soft_wrap=True)
    if validation.data is not None:
        _print_data(console, validation.data)


def _verdict(validation: Validation) -> str:
    name = validation.job or "no job"
    errors = sum(found.level is Level.ERROR for found in validation.findings)
    warnings = len(validation.findings) - errors
    counts = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((errors, "error"), (warnings, "warning")) if n]
    verdict = f"{validation.manifest}: {name} is {'valid' if validation.valid else 'not valid'}"
    return f"{verdict}: {', '.join(counts)}" if counts else verdict


def _print_data(console: Console, data: DataReport) -> None:
    summary = data.summary
    read = f"{summary.rows_read:,} rows read, {summary.rows_kept:,} kept"
    if data.sample is not None and not data.sample.complete:
        read += f" (a sample: at most {data.sample.rows_per_source:,} rows of each source)"
    console.print(Text(f"\n{read}"), soft_wrap=True)
    splits = {"train": summary.train_rows, "validation": summary.validation_rows, "test": summary.test_rows}
    _counts(console, "Splits", "split", splits)
    _counts(
        console,
        "Left out (file and line of each: quarantine.jsonl in the folder of --report)",
        "reason",
        data.rejections,
    )
    if data.labels:
        names = [name for name in splits if name in data.labels]
        labels = dict.fromkeys(label for counts in data.labels.values() for label in counts)
        rows = [[label, *(f"{data.labels[name].get(label, 0):,}" for name in names)] for label in labels]
        _table(console, "Labels", ["label", *names], rows)
    if data.lengths is not None:
        found = data.lengths
        points = {"half": found.p50, "9 of 10": found.p90, "99 of 100": found.p99, "all": found.longest}
        title = f"Tokens of a training row: {summary.truncated_rows:,} rows are cut at {summary.max_length:,}"
        _counts(console, title, "of the rows", points, "at most")
    if data.personal_data is not None:
        _counts(console, f"Personal data: {data.personal_data.action}", "kind", data.personal_data.found, "values")
    rows = [[s.uri, s.format, s.file.kind, f"{s.rows_read:,}", f"{s.rows_rejected:,}"] for s in data.sources]
    _table(console, "Sources", ["file", "rows look like", "kind", "read", "left out"], rows, text_columns=3)


def _counts(console: Console, title: str, name: str, counts: Mapping[str, int], unit: str = "rows") -> None:
    _table(console, title, [name, unit], [[key, f"{number:,}"] for key, number in counts.items()])


def _table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> None:
    """Nothing if it has no rows."""
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < text_columns else "right", overflow="fold")
    for row in rows[:MOST_ROWS]:
        table.add_row(*(Text(cell) for cell in row))
    console.print(Text(f"\n{title}", "bold"), soft_wrap=True)
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"  and {len(rows) - MOST_ROWS:,} more")
