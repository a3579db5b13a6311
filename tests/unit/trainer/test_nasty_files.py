"""Files that people really have, and files that nobody should: what is kept of each, what is rejected, what is fatal.

Every file goes the way that prepare takes: found, recognised, read, converted, placed, counted. What is kept must be what was
written, to the character; what is not must be counted with a reason, or end the stage with a message that names the file.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.dataset import DataFormat
from finetune_api.plan import JobReference, PlanDataset
from finetune_trainer.data.convert import FIELDS
from finetune_trainer.data.decide import decide
from finetune_trainer.data.examples import example_texts
from finetune_trainer.data.pipeline import Rows, Survey, open_sources, read_all
from finetune_trainer.data.quarantine import Quarantine
from finetune_trainer.data.read import FileFacts, FileKind, recognise_file
from finetune_trainer.data.spool import Spool
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.trainer.nasty_files import (
    GZIP,
    NASTY,
    ONE,
    RUSSIAN,
    TEXTS,
    arrow_file,
    arrow_stream,
    feather_file,
    jsonl,
    noise,
    parquet,
    table,
    zstd,
)

FORMATS = [f for f in FIELDS if f not in (DataFormat.LABELLED_TEXT, DataFormat.PREFERENCE)]
GIVEN = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


# --- how a file is judged


@dataclass
class Judged:
    """What became of a file: the texts of every row that is kept, the other rows by reason, or why it is refused."""

    kept: list[list[str]] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    fatal: str = ""


def judge(folder: Path, name: str, content: bytes) -> Judged:
    """Runs the first pass of prepare over one file."""
    path = folder / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    source = {"location": {"uri": f"pvc://claim/{name}", "path": str(path)}, "field": "dataset.sources[0]"}
    dataset = PlanDataset.model_validate({"sources": [source], "validation": {"fraction": 0.1}})
    watch = Watch(Telemetry(Stage.PREPARE, JobReference(namespace="n", name="j", uid="u")), "Reading", 0, 1)
    survey = Survey()
    try:
        with Quarantine(folder / "report" / "quarantine.jsonl") as quarantine, Spool(folder / "spool") as spool:
            sources = open_sources(dataset, FORMATS, folder / "down", watch)
            found = Rows(sources, spool)
            read_all(found, dataset, quarantine, survey, watch)
            decide(found, dataset, quarantine, survey)
            rows = list(found.placed())
    except UserError as error:
        assert error.reason is Reason.DATA_INVALID
        assert error.message.startswith(f"dataset.sources[0]: {name} ")
        return Judged(fatal=error.message)
    assert survey.rows_read == len(rows) + quarantine.rejected
    return Judged([example_texts(row.example) for row in rows], dict(quarantine.counts))


@pytest.mark.parametrize("case", NASTY.values(), ids=NASTY)
def test_a_nasty_file_has_its_expected_end(tmp_path, case):
    judged = judge(tmp_path, case.name, case.content() if callable(case.content) else case.content)
    assert case.fatal in judged.fatal and bool(case.fatal) == bool(judged.fatal), judged.fatal
    assert judged.kept == [[text] if isinstance(text, str) else text for text in case.kept or []]
    assert judged.rejected == case.rejected


# --- whatever is written


NAMES = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow", "part-0"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
VALID = {
    "a.jsonl": jsonl("one", "zwei ü", "drei").encode(),
    "b.json": json.dumps([{"text": "one"}, {"text": "two", "n": [{}]}], indent=1).encode(),
    "c.csv": b'text,n\r\none,1\r\n"two\r\n""x""",2\r\n',
    "d.parquet": parquet(pa.table({"text": ["one", "two", "three"] * 10, "n": range(30)})),
    "e.arrow": arrow_file(pa.table({"text": ["one", "two"], "n": [[1], [2, 3]]})),
    "f.arrow": arrow_stream(pa.table({"text": ["one", "two"], "n": [{"a": 1}, None]})),
    "g.feather": feather_file(TEXTS),
    "h.jsonl.gz": GZIP,
    "i.jsonl.bz2": bz2.compress(ONE.encode()),
    "j.jsonl.zst": zstd(ONE.encode()),
    "n.jsonl.xz": lzma.compress(ONE.encode()),
    "k.jsonl": jsonl("one", "two").encode("utf-16"),
    "l.csv": table(RUSSIAN, "cp1251"),
    "m.arrow": arrow_file(pa.table({"text": TEXTS["text"].dictionary_encode()})),
}


@GIVEN
@given(NAMES, st.binary(max_size=300))
def test_no_bytes_break_the_stage(tmp_path, name, content):
    judge(tmp_path, name, content)


@GIVEN
@given(st.sampled_from(sorted(VALID)), st.data())
def test_no_damage_breaks_the_stage(tmp_path, name, data):
    """Bytes are changed, lost, put in and moved in files that were whole."""
    content = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 20)))
        content[start:end] = data.draw(st.binary(max_size=20))
    judge(tmp_path, name, bytes(content))


@GIVEN
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["text", "n", "messages", "prompt", "completion", "tools"]), VALUES), max_size=4
    )
)
def test_random_json_is_kept_as_it_is_or_rejected(tmp_path, rows):
    """Written per line, as an array and over lines: the rows of one are those of the others."""
    written = [json.dumps(row) for row in rows]
    per_line = judge(tmp_path, "a.jsonl", "\n".join(written).encode())
    assert judge(tmp_path, "b.json", f"[{','.join(written)}]".encode()).kept == per_line.kept
    texts = [[row["text"]] for row in rows if isinstance(row.get("text"), str) and row["text"].strip()]
    assert all(text in texts for text in per_line.kept if len(text) == 1)


@GIVEN
@given(
    st.lists(TEXT.filter(str.strip), min_size=1, max_size=5),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress, zstd]),
)
def test_what_is_written_is_what_is_kept(tmp_path, texts, encoding, compress):
    """To the character, in every kind of file, encoding and compression."""
    expected = [[text] for text in texts]
    rows = [{"text": text, "n": 1} for text in texts]
    files = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "b.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "c.json": "\n".join(json.dumps(row, indent=2) for row in rows),
    }
    for name, text in files.items():
        assert judge(tmp_path, name, compress(text.encode(encoding))).kept == expected
    if not any("\0" in text for text in texts):
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["text", "n"], *([row["text"], "1"] for row in rows)])
        assert judge(tmp_path, "d.csv", compress(text.getvalue().encode(encoding))).kept == expected
    columns = pa.Table.from_pylist(rows)
    for name, content in (
        ("e.parquet", parquet(columns)),
        ("f.arrow", arrow_file(columns)),
        ("g", arrow_stream(columns)),
    ):
        assert judge(tmp_path, name, content).kept == expected


def test_no_message_quotes_a_nasty_file(tmp_path):
    """Neither what is fatal nor what is rejected says what stood there."""
    secret = "4929 1234"
    for number, template in enumerate(
        (
            '{"text": "%s"',
            '{"%s": 1, "%s": 1}',
            '[{"text": "%s',
            'text,n\n"%s,1\n',
            "%s,%s,%s\n",
            "text,n\n%s\n",
            '{"text": "x", "n": "%s", "m": NaN}',
        )
    ):
        for name in ("a.jsonl", "a.json", "a.csv", "part-0"):
            folder = tmp_path / f"{number}-{name}"
            judged = judge(folder, name, template.replace("%s", secret).encode())
            written = "".join(p.read_text() for p in (folder / "report").glob("*"))
            assert "4929" not in judged.fatal + written


def test_a_bomb_is_found_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_trainer.data.read.streams.UNCHECKED_BYTES", 1 << 20)
    for compress in (gzip.compress, bz2.compress, lzma.compress, zstd):
        judged = judge(tmp_path, "a.jsonl", compress(ONE.encode() * 500_000))
        assert "is it a decompression bomb" in judged.fatal
    honest = "".join(jsonl(noise(1000 + n)) for n in range(2000)).encode()
    assert len(honest) > 1 << 20
    assert len(judge(tmp_path, "b.jsonl.gz", gzip.compress(honest)).kept) == 2000


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.csv", table(RUSSIAN, "cp1251"), FileFacts(FileKind.CSV, None, "cp1251", ",")),
        (
            "a.csv.gz",
            gzip.compress("text\tn\nx\t1\n".encode("utf-16"), mtime=0),
            FileFacts(FileKind.CSV, "gzip", "utf-16", "\t"),
        ),
        ("a.json", b"[{}]", FileFacts(FileKind.JSON, None, "utf-8")),
        ("a.jsonl", zstd(ONE.encode("utf-8-sig")), FileFacts(FileKind.JSONL, "zstd", "utf-8-sig")),
        ("a.txt", b"one", FileFacts(FileKind.TEXT, None, "utf-8")),
        ("a", feather_file(TEXTS), FileFacts(FileKind.ARROW)),
    ],
)
def test_what_a_file_is_can_be_told(tmp_path, name, content, facts):
    (tmp_path / name).write_bytes(content)
    assert recognise_file(SourceFile("f", f"file://{name}", tmp_path / name)) == facts
