"""docs/data.md: every row that it shows is read, or refused, as it says."""

import re
from pathlib import Path

import pytest
from finetune_api.dataset import DataFormat
from finetune_api.plan import PlanSource
from finetune_trainer.data.convert import (
    FIELDS,
    OPTIONAL_FIELDS,
    USUAL_COLUMNS,
    convert_row,
    recognise_format,
    usable_columns,
    usable_formats,
)
from finetune_trainer.data.read import Rejection, read_rows
from finetune_trainer.fetch import SourceFile

from tests.plans import make_plan

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
SHOWN = [
    (format, row)
    for format, block in re.findall(r"^```json (\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for row in block.splitlines()
]
REFUSED = re.findall(r"^\| `(\{.*\})` \| (.*) \|$", PAGE, re.MULTILINE)
SOURCE = PlanSource.model_validate({"location": {"uri": "file://a"}, "field": "dataset.sources[0]"})
USABLE = [
    usable_formats(make_plan(Path("unused"), **changes))
    for changes in ({"task": "Generation"}, {"task": "Generation", "dpo": {"beta": 0.1}}, {})
]


def read(folder: Path, row: str, usable: list[DataFormat]):
    """The recognised format of a file with this row, and what becomes of the row."""
    path = folder / "a.jsonl"
    path.write_text(row + "\n")
    file = SourceFile("dataset.sources[0]", "file://a.jsonl", path)
    format = recognise_format(file, SOURCE, usable)
    (raw,) = read_rows(file, usable_columns(SOURCE))
    return format, convert_row(raw, SOURCE, format)


@pytest.mark.parametrize(("format", "row"), SHOWN)
def test_every_row_of_the_page_is_recognised_and_read(tmp_path, format, row):
    usable = next(formats for formats in USABLE if format in formats)
    found, example = read(tmp_path, row, usable)
    assert found == format
    assert not isinstance(example, Rejection), example


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_every_refused_row_of_the_page_is_refused(tmp_path, row, reason):
    _, found = read(tmp_path, row, USABLE[0])
    assert isinstance(found, Rejection)
    assert found.reason == reason


def test_the_page_has_every_format_with_its_columns_in_the_order_of_recognition():
    assert {format for format, _ in SHOWN} == set(DataFormat)
    assert len(REFUSED) >= 12
    lines = dict(re.findall(r"^\| (\w+) \| (.*?) \|", PAGE, re.MULTILINE))
    assert [name for name in lines if name in set(DataFormat)] == [format.value for format in FIELDS]
    for format, columns in lines.items():
        if format in set(DataFormat) and format not in ("ShareGPT", "LabelledText"):
            for field in (*FIELDS[DataFormat(format)], *OPTIONAL_FIELDS.get(DataFormat(format), ())):
                assert f"{field}: {', '.join(f'`{name}`' for name in USUAL_COLUMNS[field])}" in columns
