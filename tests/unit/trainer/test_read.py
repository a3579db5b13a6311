"""Files as people have them: every row with its line, every bad row with its reason."""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetune_trainer.data.read import FileKind, RawRow, Rejection, read_rows, recognise_file
from finetune_trainer.errors import UserError
from finetune_trainer.fetch import SourceFile
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> SourceFile:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return SourceFile("dataset.sources[0]", f"s3://bucket/{name}", path)

    return write


def kind(file: SourceFile) -> FileKind:
    return recognise_file(file).kind


def lines(file: SourceFile) -> list[tuple[int, object]]:
    """(Line, values or reason) of every row."""
    return [(row.line, row.values if isinstance(row, RawRow) else row.reason) for row in read_rows(file)]


def test_jsonl_rows_have_their_line_and_empty_lines_are_none(write):
    file = write("a.jsonl", '{"a": 1}\n\n   \r\n{"a": 2}\r\n{"a": 3}')
    assert lines(file) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


def test_a_byte_order_mark_is_no_part_of_the_first_row(write):
    assert lines(write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n')) == [(1, {"a": 1})]
    assert lines(write("a.csv", b"\xef\xbb\xbftext,label\nx,y\n")) == [(2, {"text": "x", "label": "y"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "invalid JSON"),
        (b'["a"]', "invalid JSON"),
        (b"7", "invalid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_costs_only_itself(write, line, reason):
    assert lines(write("a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')) == [
        (1, {"a": 1}),
        (2, reason),
        (3, {"a": 3}),
    ]


def test_a_rejection_does_not_quote_the_row(write):
    secret = "4929 1234"
    file = write("a.jsonl", f'{{"a": {secret}\n{{"{secret}\n\\u{secret}\n"{secret}"\n')
    rejections = list(read_rows(file))
    assert len(rejections) == 4
    assert all(isinstance(r, Rejection) and "4929" not in r.reason + r.detail for r in rejections)


def test_csv_rows_begin_at_their_physical_line(write):
    file = write("a.csv", 'text,label\r\n"two\r\nlines",good\r\n\r\nshort,bad\r\n')
    assert lines(file) == [
        (2, {"text": "two\r\nlines", "label": "good"}),
        (5, {"text": "short", "label": "bad"}),
    ]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_of_other_countries(write, mark):
    file = write("a.csv", f'text{mark}label\n"one, two"{mark}good\n')
    assert lines(file) == [(2, {"text": "one, two", "label": "good"})]


def test_bad_csv_rows_cost_only_themselves(write):
    content = b'text,label\na\n"a"b,c\n\xff,good\nfine,good\n'
    assert lines(write("a.csv", content)) == [
        (2, "invalid CSV"),
        (3, "invalid CSV"),
        (4, "not UTF-8"),
        (5, {"text": "fine", "label": "good"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", 'text,label\na,b\n"never closed,c\nd,e\n', "line 3 opens a quote"),
        ("a.csv", "a,a\n1,2\n", "names a column twice"),
        ("a.parquet", b"PAR1 and nothing more", "cannot be read as Parquet"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "is damaged"),
        ("unknown", b"\x00\x01\x02", "is of no kind that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(write, name, content, words):
    with pytest.raises(UserError) as caught:
        list(read_rows(write(name, content)))
    assert caught.value.message.startswith(f"dataset.sources[0]: {name} ")
    assert words in caught.value.message


def test_an_endless_line_is_told_of_and_not_kept_in_memory(write, monkeypatch):
    monkeypatch.setattr("finetune_trainer.data.read.rows.MAX_ROW_CHARACTERS", 100)
    long = '{"a": "' + "x" * 1000 + '"}'
    assert lines(write("a.jsonl", f'{{"a": 1}}\n{long}\n{{"a": 3}}\n')) == [
        (1, {"a": 1}),
        (2, "row is too long"),
        (3, {"a": 3}),
    ]
    for name, content, words in [
        ("a.csv", f"a,b\n1,{long}\n", "line 2 is longer"),
        ("a.json", f"[1, {long}]", "what begins in line 1 has no end"),
    ]:
        with pytest.raises(UserError, match=words):
            list(read_rows(write(name, content)))


def test_parquet_rows_have_their_number(write, tmp_path):
    table = pa.table({"text": ["a", None], "messages": [[{"role": "user", "content": "x"}], []]})
    pq.write_table(table, tmp_path / "a.parquet")
    file = SourceFile("dataset.sources[0]", "file://a.parquet", tmp_path / "a.parquet")
    assert lines(file) == [
        (1, {"text": "a", "messages": [{"role": "user", "content": "x"}]}),
        (2, {"text": None, "messages": []}),
    ]


def test_parquet_columns_that_nobody_wants_are_not_read(tmp_path):
    turns = [{"role": "user", "content": "x"}]
    table = pa.table({"id": [7], "my.text": ["a"], "messages": [turns], "embedding": [[0.5] * 100]})
    pq.write_table(table, tmp_path / "a.parquet")
    file = SourceFile("f", "file://a.parquet", tmp_path / "a.parquet")
    assert [row.values for row in read_rows(file, {"my.text", "messages", "label"})] == [
        {"my.text": "a", "messages": turns}
    ]
    assert [set(row.values) for row in read_rows(file, {"label"})] == [set(table.column_names)]  # to say what it has


def test_half_a_parquet_file_is_refused(write, tmp_path):
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(5000)]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    half = len(whole) // 2
    for damaged in (whole[:half], whole[:100] + bytes(200) + whole[300:]):
        with pytest.raises(UserError, match="is the file whole"):
            list(read_rows(write("a.parquet", damaged)))


def test_gzip_is_read_as_what_it_holds(write):
    assert lines(write("a.jsonl.gz", gzip.compress(b'{"a": 1}\n'))) == [(1, {"a": 1})]
    assert lines(write("part-0", gzip.compress(b"a,b\n1,2\n"))) == [(2, {"a": "1", "b": "2"})]


def test_the_kind_is_told_by_name_and_else_by_content(write, tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "p")
    parquet = (tmp_path / "p").read_bytes()
    assert kind(write("a.CSV", "a\n1\n")) is FileKind.CSV
    assert kind(write("a.tsv", "a\tb\n")) is FileKind.CSV
    assert kind(write("part-0", '  {"a": 1}')) is FileKind.JSONL
    assert kind(write("part-0", "a,b\n1,2\n")) is FileKind.CSV
    assert kind(write("part-0", parquet)) is FileKind.PARQUET


@given(
    st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
            min_size=2,
            max_size=2,
        ),
        max_size=5,
    )
)
def test_whatever_a_csv_writer_writes_is_read_back(tmp_path_factory, rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["one", "two"])
    writer.writerows(rows)
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(text.getvalue().encode())
    found = [row.values for row in read_rows(SourceFile("f", "file://a.csv", path)) if isinstance(row, RawRow)]
    assert found == [dict(zip(["one", "two"], row, strict=True)) for row in rows]


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_the_readers(tmp_path_factory, content):
    for name in ("a.jsonl", "a.csv"):
        path = tmp_path_factory.mktemp("any") / name
        path.write_bytes(content)
        try:
            for row in read_rows(SourceFile("f", f"file://{name}", path)):
                assert isinstance(row, (RawRow, Rejection))
                json.dumps(row.values if isinstance(row, RawRow) else row.detail)
        except UserError:
            pass


def encoded_rows(kind: str) -> bytes:
    """Five MB of rows that hardly can be compressed."""
    rows = [{"text": base64.b85encode(random.Random(n).randbytes(2000)).decode()} for n in range(2000)]
    table, out = pa.table({"text": [row["text"] for row in rows]}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, out, row_group_size=200)
    elif kind == "arrow":
        with pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=200)
    else:
        compress = {"jsonl": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind]
        out.write(compress("\n".join(map(json.dumps, rows)).encode()))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "gz", "bz2", "xz", "parquet", "arrow"])
def test_how_much_of_a_file_is_read_is_known_while_it_is_read(write, kind):
    file = write("a" if kind in ("gz", "bz2", "xz") else f"a.{kind}", encoded_rows(kind))
    size = file.path.stat().st_size
    for _ in range(2):  # read again, it begins again
        at = [file.position.bytes / size for _ in read_rows(file)]
        assert at == sorted(at)
        assert at[0] <= 0.5 and abs(at[len(at) // 2 - 1] - 0.5) < 0.3 and at[-1] > 0.9
