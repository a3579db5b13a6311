"""Files that people really have, and files that nobody should, each with what must become of it (see test_nasty_files)."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather


@dataclass
class Nasty:
    """A file, and what must become of it. `kept`: texts, one per row."""

    name: str
    content: bytes | Callable[[], bytes]
    kept: list[str | list[str]] | None = None
    rejected: dict[str, int] = field(default_factory=dict)
    fatal: str = ""


# --- how files are written


def jsonl(*texts: object, end: str = "\n") -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts)


ONE, TWO = jsonl("one"), jsonl("two")
AB = b'{"text": "a"}\n%s\n{"text": "b"}\n'
"""Two sound rows around one that is to be put in."""


def between(row: str | bytes) -> bytes:
    return AB % (row.encode() if isinstance(row, str) else row)


def bad(name: str, row: str | bytes, reason: str) -> Nasty:
    return Nasty(name, between(row), kept=["a", "b"], rejected={reason: 1})


def arrow_stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_file(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def feather_file(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(table, sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("train.jsonl", content)
    return sink.getvalue()


def tarred(content: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        entry = tarfile.TarInfo("../../etc/train.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


def noise(size: int) -> str:
    """Text that does not compress well, always the same."""
    import random

    return "".join(random.Random(7).choices("abcdefghijklmnop ", k=size))


TEXTS = pa.table({"text": ["one", "two"]})
GZIP = gzip.compress((jsonl(noise(3000)) + TWO).encode(), mtime=0)
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
)
BROKEN_OFFSETS = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x0f\2\0\0\0"), pa.py_buffer(b"ab")]
)
GERMAN = "Die Umsätze der Gesellschaft übertrafen für das dritte Quartal die Erwartungen"
POLISH = "Przychody spółki wzrosły powyżej prognozy, a zysk spadł; żółć gęślą jaźń"
RUSSIAN = "Выручка компании выросла выше прогноза, прибыль упала"
JAPANESE = "会社の売上高は予想を上回り、利益は減少した。取締役会は月曜日に開かれる。"
CHINESE = "公司销售额超出预期，利润下降。董事会将于星期一开会。"
KOREAN = "회사의 매출은 예상을 웃돌았고 이익은 감소했다."


def table(text: str, encoding: str) -> bytes:
    return ("text,n\n" + f'"{text}",1\n' * 5).encode(encoding)


def chat(*turns: tuple[object, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


GOOD_CHAT = chat(("user", "q"), ("assistant", "a"))


def talk(row: str, reason: str) -> Nasty:
    """A conversation behind a sound one."""
    return Nasty(
        "a.jsonl", f"{GOOD_CHAT}\n{row}\n".encode(), kept=[["user", "q", "assistant", "a"]], rejected={reason: 1}
    )


def shared(*turns: tuple[object, object]) -> str:
    return json.dumps({"conversations": [{"from": speaker, "value": value} for speaker, value in turns]})


def called(arguments: object) -> str:
    """A conversation that ends with a call."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return json.dumps({"messages": turns})


def huge_tools() -> list[object]:
    """A schema of some MB, deep and wide."""
    properties: dict[str, object] = {"type": "string", "description": noise(200)}
    for level in range(40):
        properties = {"type": "object", "properties": {f"p{level}": properties}}
    many = {f"p{n}": {"type": "string", "enum": [noise(30)] * 20} for n in range(2000)}
    return [{"type": "function", "function": {"name": f"f{n}", "parameters": {**properties, **many}}} for n in range(2)]


PAIR = '{"prompt": "p", "completion": "c"}\n'


NASTY: dict[str, Nasty] = {
    # --- nothing there
    "no bytes": Nasty("a.jsonl", b"", fatal="has no rows that can be read"),
    "no bytes and no name": Nasty("part-0", b"", fatal="is empty"),
    "blank lines": Nasty("a.jsonl", b"\n \r\n\t\n", fatal="has no rows that can be read"),
    "a mark and no more": Nasty("a.jsonl", b"\xef\xbb\xbf", fatal="has no rows that can be read"),
    "an empty array": Nasty("a.json", b"[ ]", fatal="has no rows that can be read"),
    "a header and no rows": Nasty("a.csv", b"text,label\n", fatal="has no rows that can be read"),
    "an empty archive": Nasty("a.jsonl.gz", gzip.compress(b""), fatal="has no rows that can be read"),
    "a table without rows": Nasty("a.parquet", parquet(TEXTS.slice(0, 0)), fatal="has no rows that can be read"),
    # --- how lines end, and how text is encoded
    "CRLF": Nasty("a.jsonl", jsonl("one", "two", end="\r\n").encode(), kept=["one", "two"]),
    "CR": Nasty("a.jsonl", jsonl("one", "two", end="\r").encode(), kept=["one", "two"]),
    "all line ends": Nasty("a.jsonl", b'{"text":"1"}\r{"text":"2"}\r\n{"text":"3"}\n{"text":"4"}', kept=list("1234")),
    "no last line end": Nasty("a.jsonl", jsonl("one", "two").rstrip().encode(), kept=["one", "two"]),
    "UTF-8 with a mark": Nasty("a.jsonl", jsonl("é", "two").encode("utf-8-sig"), kept=["é", "two"]),
    "joined files with marks": Nasty("a.jsonl", ONE.encode("utf-8-sig") + TWO.encode("utf-8-sig"), kept=["one", "two"]),
    "UTF-16, little end first": Nasty("a.jsonl", b"\xff\xfe" + jsonl("é", "日").encode("utf-16-le"), kept=["é", "日"]),
    "UTF-16, big end first": Nasty("a.jsonl", b"\xfe\xff" + jsonl("é", "日").encode("utf-16-be"), kept=["é", "日"]),
    "UTF-16 of a spreadsheet": Nasty(
        "a.csv", "text\tlabel\r\nZürich, Genf\tx\r\n".encode("utf-16"), kept=["Zürich, Genf"]
    ),
    "UTF-16, cut in a character": Nasty(
        "a.jsonl", jsonl("one", "two").encode("utf-16")[:-3], kept=["one"], rejected={"not UTF-16": 1}
    ),
    "UTF-16, half a pair": Nasty(
        "a.jsonl",
        b"\xff\xfe" + ONE.encode("utf-16-le") + jsonl("\ud800").encode("utf-16-le", "surrogatepass"),
        kept=["one"],
        rejected={"not UTF-16": 1},
    ),
    "UTF-16 without a mark": Nasty("a.jsonl", ONE.encode("utf-16-le"), fatal="is UTF-16 without a byte order mark"),
    "UTF-16 without a mark, big": Nasty("a.csv", b"\0t\0e\0x\0t\0\n", fatal="is UTF-16 without a byte order mark"),
    "UTF-32": Nasty("a.jsonl", jsonl("é", "two").encode("utf-32"), kept=["é", "two"]),
    "German of Windows": Nasty("a.csv", table(GERMAN, "cp1252"), kept=[GERMAN] * 5),
    "Polish of Windows": Nasty("a.jsonl", jsonl(*[POLISH] * 5).encode("cp1250"), kept=[POLISH] * 5),
    "Russian of Windows": Nasty("a.csv", table(RUSSIAN, "cp1251"), kept=[RUSSIAN] * 5),
    "Russian of Unix": Nasty("a.txt", f"{RUSSIAN}\n".encode("koi8_r"), kept=[RUSSIAN]),
    "Japanese": Nasty("a.csv", table(JAPANESE, "shift_jis"), kept=[JAPANESE] * 5),
    "Chinese": Nasty("a.jsonl", jsonl(*[CHINESE] * 5).encode("gb18030"), kept=[CHINESE] * 5),
    "Korean in gzip": Nasty("a.csv.gz", gzip.compress(table(KOREAN, "euc_kr")), kept=[KOREAN] * 5),
    "UTF-8 with rows of Windows": Nasty(
        "a.csv",
        table(RUSSIAN, "utf-8") + f'"{RUSSIAN}",1\n'.encode("cp1251"),
        kept=[RUSSIAN] * 5,
        rejected={"not UTF-8": 1},
    ),
    "Windows with rows of UTF-8": Nasty(
        "a.csv", table(RUSSIAN, "cp1251") + f'"{RUSSIAN}",1\n'.encode(), kept=[RUSSIAN], rejected={"not UTF-8": 5}
    ),
    "too little to tell an encoding": Nasty(
        "a.csv", b"text,n\none,1\nt\xe9,1\n", kept=["one"], rejected={"not UTF-8": 1}
    ),
    "line separators that are none": Nasty(
        "a.jsonl", jsonl("a\u2028b\x85c\u2029d\x0b").encode(), kept=["a\u2028b\x85c\u2029d\x0b"]
    ),
    "one byte that is not UTF-8": bad("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
    "an overlong character": bad("a.jsonl", b'{"text": "\xc0\xaf"}', "not UTF-8"),
    "a surrogate as bytes": bad("a.jsonl", b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "half a surrogate pair": bad("a.jsonl", r'{"text": "\ud83d"}', "not Unicode"),
    "a whole surrogate pair": Nasty("a.jsonl", rb'{"text": "\ud83d\ude00"}', kept=["😀"]),
    # --- JSON that is none, or not quite
    "a broken line": bad("a.jsonl", '{"text": "x', "invalid JSON"),
    "a cut last line": Nasty("a.jsonl", (ONE + TWO).encode()[:-5], kept=["one"], rejected={"invalid JSON": 1}),
    "a list": bad("a.jsonl", '["x"]', "invalid JSON"),
    "a number": bad("a.jsonl", "7", "invalid JSON"),
    "null": bad("a.jsonl", "null", "invalid JSON"),
    "two objects in a line": bad("a.jsonl", '{"text": "x"} {"text": "y"}', "invalid JSON"),
    "a comma too many": bad("a.jsonl", '{"text": "x",}', "invalid JSON"),
    "Python, not JSON": bad("a.jsonl", "{'text': 'x'}", "invalid JSON"),
    "a comment": bad("a.jsonl", '{"text": "x"} // y', "invalid JSON"),
    "a tab in a string": bad("a.jsonl", '{"text": "x\ty"}', "invalid JSON"),
    "a NUL in a string": bad("a.jsonl", b'{"text": "x\0y"}', "invalid JSON"),
    "an escaped NUL": Nasty("a.jsonl", rb'{"text": "x\u0000y"}', kept=["x\0y"]),
    "zeros of a lost disk block": bad("a.jsonl", bytes(4096), "invalid JSON"),
    "a key twice": bad("a.jsonl", '{"text": "x", "text": "y"}', "duplicate key"),
    "a key twice, escaped": bad("a.jsonl", r'{"text": "x", "te\u0078t": "y"}', "duplicate key"),
    "a key twice, deep": bad("a.jsonl", '{"text": "x", "meta": [{"k": 1, "k": 2}]}', "duplicate key"),
    "NaN": bad("a.jsonl", '{"text": "x", "score": NaN}', "not a number"),
    "minus infinity": bad("a.jsonl", '{"text": "x", "score": -Infinity}', "not a number"),
    "a number beyond all": bad("a.jsonl", '{"text": "x", "score": 1e999}', "not a number"),
    "a number of 5000 digits": bad("a.jsonl", f'{{"text": "x", "n": {"9" * 5000}}}', "invalid JSON"),
    "a hundred lists deep": Nasty("a.jsonl", b'{"text": "x", "n": ' + b"[" * 99 + b"]" * 99 + b"}", kept=["x"]),
    "too many lists deep": bad("a.jsonl", '{"text": "x", "n": ' + "[" * 100 + "]" * 100 + "}", "nested too deeply"),
    "endlessly many lists deep": bad("a.jsonl", '{"text": ' + "[" * 200_000, "nested too deeply"),
    "too many columns": bad("a.jsonl", json.dumps({f"c{n}": n for n in range(5000)}), "too many columns"),
    "a line of 17 MiB": Nasty(
        "a.jsonl",
        lambda: between(b'{"text": "' + b"x" * (17 << 20) + b'"}'),
        kept=["a", "b"],
        rejected={"row is too long": 1},
    ),
    "a text of numbers": bad("a.jsonl", '{"text": 7}', "text is not text"),
    "a text that is a list": bad("a.jsonl", '{"text": ["x"]}', "text is not text"),
    "a text that is null": bad("a.jsonl", '{"text": null}', "text is missing"),
    "white space": bad("a.jsonl", r'{"text": " \n\u00a0 "}', "text is empty"),
    "another column": bad("a.jsonl", '{"Text": "x"}', "text is missing"),
    # --- arrays
    "an array": Nasty("a.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2).encode(), kept=["one", "two"]),
    "an array in one line": Nasty("a.json", b'[{"text":"one"},{"text":"two"}]', kept=["one", "two"]),
    "an array that is called JSONL": Nasty("a.jsonl", b'[{"text":"one"},\n{"text":"two"}]', kept=["one", "two"]),
    "an array without a name": Nasty("part-0", b'\n [ {"text":"one"} ]\n', kept=["one"]),
    "an array in UTF-16": Nasty("a.json", '[{"text":"é"}]'.encode("utf-16"), kept=["é"]),
    "marks inside strings": Nasty(
        "a.json", rb'[{"text": "]}, {\"[\\"}, {"text": "\\\\\",["}]', kept=[']}, {"[\\', '\\\\",[']
    ),
    "a broken element": Nasty(
        "a.json", b'[{"text": "a"}, {"text" "x"}, {"text": "b"}]', kept=["a", "b"], rejected={"invalid JSON": 1}
    ),
    "a missing comma": Nasty(
        "a.json",
        b'[{"text": "a"}, {"text": "x"} {"text": "y"}, {"text": "b"}]',
        kept=["a", "b"],
        rejected={"invalid JSON": 1},
    ),
    "an element too few": Nasty(
        "a.json", b'[{"text": "a"},,{"text": "b"}]', kept=["a", "b"], rejected={"invalid JSON": 1}
    ),
    "a comma at the end": Nasty("a.json", b'[{"text": "a"},\n]', kept=["a"]),
    "a wrong bracket": Nasty(
        "a.json", b'[{"text": "a"}, {"text": "x"]}, {"text": "b"}]', kept=["a", "b"], rejected={"invalid JSON": 1}
    ),
    "a bracket too many": Nasty(
        "a.json", b'[{"text": "a"}, {"text": "x"}}, {"text": "b"}]', kept=["a", "b"], rejected={"invalid JSON": 1}
    ),
    "elements of other kinds": Nasty(
        "a.json",
        b'[{"text": "a"}, 7, null, "x", [1], NaN]',
        kept=["a"],
        rejected={"invalid JSON": 4, "not a number": 1},
    ),
    "an array in an array": Nasty("a.json", b'[[{"text": "a"}]]', fatal="has no rows that can be read"),
    "a cut array": Nasty("a.json", b'[{"text": "a"},\n{"text": "b"', fatal="what begins in line 2 has no end"),
    "an array without its bracket": Nasty("a.json", b'[{"text": "a"},\n{"text": "b"}\n', fatal="has no end"),
    "an open string": Nasty("a.json", b'[{"text": "a},\n{"text": 1}]', fatal="has no end"),
    "an array per line": Nasty("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', fatal="has no rows that can be read"),
    "more behind an array": Nasty(
        "a.json", b'[{"text":\n"a"}]\n{"text": "b"}', fatal="goes on after the end of its array in line 3"
    ),
    "objects over lines": Nasty("a.json", b'{\n"text": "a"\n}\n{\n"text": "b"}', kept=["a", "b"]),
    "objects over lines, cut": Nasty(
        "a.json", b'{\n"text": "a"\n}\n{\n"text": "b', fatal="what begins in line 4 has no end"
    ),
    "rows inside an object": Nasty(
        "a.json", b'{\n"data": [{"text": "a"}]}', fatal="name the columns in dataset.sources[0].columns"
    ),
    # --- tables
    "semicolons": Nasty("a.csv", b'text;n\n"one, two";1\n', kept=["one, two"]),
    "tabs that are called CSV": Nasty("a.csv", b"text\tn\none, two; three\t1\n", kept=["one, two; three"]),
    "pipes": Nasty("a.csv", b"text|n\none, two|1\n", kept=["one, two"]),
    "commas in the header of semicolons": Nasty("a.csv", b"text;n, of m\none;1\ntwo;2\n", kept=["one", "two"]),
    "one column": Nasty("a.csv", b'text\none\n"two, three"\n', kept=["one", "two, three"]),
    "quoted line ends": Nasty("a.csv", b'text,n\r\n"one\r\ntwo\rthree\n",1\r\n', kept=["one\r\ntwo\rthree\n"]),
    "doubled quotes": Nasty("a.csv", b'text,n\n"say ""no""",1\n', kept=['say "no"']),
    "CR in a table": Nasty("a.csv", b"text,n\rone,1\rtwo,2\r", kept=["one", "two"]),
    "spaces around names": Nasty("a.csv", b" text , n \none,1\n", kept=["one"]),
    "empty records": Nasty("a.csv", b"text,n\none,1\n,\n\n,\n", kept=["one"]),
    "too few and too many fields": Nasty(
        "a.csv", b"text,n\none\na,1,2\ntwo,2\n", kept=["two"], rejected={"invalid CSV": 2}
    ),
    "a quote inside": Nasty("a.csv", b'text,n\n"a"b,1\ntwo,2\n', kept=["two"], rejected={"invalid CSV": 1}),
    "a quote never closed": Nasty(
        "a.csv", b'text,n\none,1\n"two,2\nthree,3\n', fatal="line 3 opens a quote that is never closed"
    ),
    "a NUL in a field": Nasty("a.csv", b"text,n\none,1\nt\0wo,2\n", kept=["one"], rejected={"NUL bytes": 1}),
    "bad bytes in a field": Nasty("a.csv", b"text,n\none,1\nt\xffwo,2\n", kept=["one"], rejected={"not UTF-8": 1}),
    "a name twice": Nasty("a.csv", b"text,text\none,1\n", fatal="names a column twice"),
    "a name twice but for spaces": Nasty("a.csv", b"text, text\none,1\n", fatal="names a column twice"),
    "no header": Nasty("a.csv", b"one,1\ntwo,2\n", fatal="name the columns in dataset.sources[0].columns"),
    "a header of 5000": Nasty(
        "a.csv", (",".join(f"c{n}" for n in range(5000)) + "\n").encode(), fatal="has 5000 columns"
    ),
    "a field of 17 MiB": Nasty(
        "a.csv", lambda: b"text,n\n" + b"x" * (17 << 20) + b",1\n", fatal="line 2 is longer than"
    ),
    "JSON that is called CSV": Nasty("a.csv", jsonl("one, two").encode(), kept=["one, two"]),
    "Parquet that is called CSV": Nasty("a.csv", parquet(TEXTS), kept=["one", "two"]),
    "text that is called Parquet": Nasty("a.parquet", b"one\ntwo\n", fatal="is no Parquet file"),
    # --- plain text
    "plain text": Nasty("a.txt", " one, [two]\r\n\r\n\tthree é\n".encode(), kept=[" one, [two]", "\tthree é"]),
    "text that begins with a bracket": Nasty("a.txt", b"[Chorus]\nla la\n", kept=["[Chorus]", "la la"]),
    "text with NUL": Nasty("a.txt", b"one\nt\0wo\n", kept=["one"], rejected={"NUL bytes": 1}),
    "text with bad bytes": Nasty("a.txt", b"one\nt\xe9\n", kept=["one"], rejected={"not UTF-8": 1}),
    # --- archives
    "gzip": Nasty("a.jsonl.gz", gzip.compress(ONE.encode()), kept=["one"]),
    "gzip of two members": Nasty(
        "a.jsonl.gz", gzip.compress(ONE.encode()) + gzip.compress(TWO.encode()), kept=["one", "two"]
    ),
    "bzip2": Nasty("a.jsonl.bz2", bz2.compress(ONE.encode()) + bz2.compress(TWO.encode()), kept=["one", "two"]),
    "Zstandard": Nasty("a.csv.zst", zstd(b"text,n\none,1\n") + zstd(b"two,2\n"), kept=["one", "two"]),
    "Zstandard with a skipped frame": Nasty(
        "a.jsonl", b"\x50\x2a\x4d\x18\4\0\0\0abcd" + zstd(ONE.encode()), kept=["one"]
    ),
    "gzip that is called plain": Nasty("a.jsonl", gzip.compress(ONE.encode()), kept=["one"]),
    "plain that is called gzip": Nasty("a.jsonl.gz", ONE.encode(), kept=["one"]),
    "bzip2 that is called gzip": Nasty("a.json.gz", bz2.compress(b'[{"text": "one"}]'), kept=["one"]),
    "a cut gzip": Nasty("a.jsonl.gz", GZIP[: len(GZIP) // 2], fatal="its gzip stream cannot be read to the end"),
    "a gzip without its sum": Nasty("a.jsonl.gz", GZIP[:-8], fatal="its gzip stream cannot be read to the end"),
    "a gzip with a wrong bit": Nasty("a.jsonl.gz", flipped(GZIP, len(GZIP) // 2), fatal="is damaged"),
    "a gzip with a wrong sum": Nasty("a.jsonl.gz", flipped(GZIP, len(GZIP) - 6), fatal="is damaged"),
    "more behind a gzip": Nasty("a.jsonl.gz", GZIP + b"{}", fatal="is damaged"),
    "a cut bzip2": Nasty("a.jsonl.bz2", bz2.compress(ONE.encode())[:-5], fatal="its bz2 stream cannot be read"),
    "more behind a bzip2": Nasty("a.jsonl.bz2", bz2.compress(ONE.encode()) + b"{}", fatal="is damaged"),
    "xz": Nasty(
        "a.jsonl.xz", lzma.compress(ONE.encode()) + bytes(8) + lzma.compress(TWO.encode()), kept=["one", "two"]
    ),
    "a cut xz": Nasty("a.jsonl.xz", lzma.compress(ONE.encode())[:-5], fatal="its xz stream cannot be read to the end"),
    "an xz with a wrong bit": Nasty("a.jsonl.xz", flipped(lzma.compress(ONE.encode()), 30), fatal="is damaged"),
    "more behind an xz": Nasty("a.jsonl.xz", lzma.compress(ONE.encode()) + b"{}", fatal="is damaged"),
    "an xz that takes much memory": Nasty(
        "a.jsonl.xz",
        lzma.compress(ONE.encode(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}]),
        fatal="takes more than 128 MiB of memory to decompress",
    ),
    "a cut Zstandard": Nasty("a.jsonl.zst", zstd(ONE.encode())[:-2], fatal="its zstd stream cannot be read"),
    "gzip in gzip": Nasty("a.jsonl.gz", gzip.compress(gzip.compress(ONE.encode())), fatal="is compressed twice"),
    "Parquet in gzip": Nasty(
        "a.parquet.gz", gzip.compress(parquet(TEXTS)), fatal="is a Parquet file compressed by gzip"
    ),
    "tar": Nasty("a.jsonl.gz", gzip.compress(tarred(ONE.encode())), fatal="is a tar archive"),
    "zip": Nasty("a.jsonl", zipped(ONE.encode()), fatal="is a zip archive"),
    # --- other people's files
    "an error page": Nasty("a.jsonl", b"<!DOCTYPE html><html>", fatal="is HTML or XML"),
    "a pointer": Nasty("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", fatal="run git lfs pull"),
    "a PDF": Nasty("a.txt", b"%PDF-1.7", fatal="is a PDF"),
    "a database": Nasty("part-0", b"SQLite format 3\0", fatal="is an SQLite database"),
    "bytes": Nasty("part-0", bytes([7, 0, 1, 2, 200, 0, 9]), fatal="is of no kind that can be read"),
    "prose without a name": Nasty("part-0", b"To be or not to be\n", fatal="is of no kind that can be read"),
    # --- columns
    "Parquet": Nasty("a.parquet", parquet(TEXTS), kept=["one", "two"]),
    "Parquet without a name": Nasty("part-0", parquet(TEXTS), kept=["one", "two"]),
    "Arrow": Nasty("a.arrow", arrow_file(TEXTS), kept=["one", "two"]),
    "an Arrow stream": Nasty("data-00000-of-00001.arrow", arrow_stream(TEXTS), kept=["one", "two"]),
    "Feather": Nasty("a.feather", feather_file(TEXTS), kept=["one", "two"]),
    "categories": Nasty(
        "a.arrow", arrow_file(pa.table({"text": TEXTS["text"].dictionary_encode()})), kept=["one", "two"]
    ),
    "long strings": Nasty(
        "a.arrow", arrow_file(TEXTS.cast(pa.schema([("text", pa.large_string())]))), kept=["one", "two"]
    ),
    "a column of numbers": Nasty(
        "a.parquet", parquet(pa.table({"text": [1, 2]})), rejected={"text is not text": 2}, kept=[]
    ),
    "a column of bytes": Nasty(
        "a.parquet", parquet(pa.table({"text": [b"x"]})), rejected={"text is not text": 1}, kept=[]
    ),
    "NaN for nothing": Nasty(
        "a.parquet", parquet(pa.table({"text": [float("nan")]})), rejected={"text is missing": 1}, kept=[]
    ),
    "null in a column": Nasty(
        "a.parquet", parquet(pa.table({"text": ["one", None]})), kept=["one"], rejected={"text is missing": 1}
    ),
    "bad bytes in Parquet": Nasty(
        "a.parquet", parquet(pa.table({"text": NOT_UTF8})), kept=["a", "b"], rejected={"not UTF-8": 1}
    ),
    "bad bytes in Arrow": Nasty(
        "a.arrow", arrow_file(pa.table({"text": NOT_UTF8})), kept=["a", "b"], rejected={"not UTF-8": 1}
    ),
    "offsets out of a buffer": Nasty(
        "a.arrow", arrow_file(pa.table({"text": BROKEN_OFFSETS})), fatal="cannot be read as Arrow"
    ),
    "a column twice in Arrow": Nasty(
        "a.arrow", arrow_file(pa.Table.from_arrays([TEXTS["text"]] * 2, ["text", "text"])), fatal="names a column twice"
    ),
    "a date beyond Python": Nasty(
        "a.arrow",
        arrow_file(pa.table({"text": pa.array([1 << 62], pa.timestamp("s"))})),
        fatal="has no rows that can be read",
    ),
    "half a Parquet": Nasty("a.parquet", parquet(TEXTS)[:-20], fatal="cannot be read as Parquet after row 0"),
    "half an Arrow": Nasty("a.arrow", arrow_file(TEXTS)[:-20], fatal="cannot be read as Arrow after row 0"),
    "half an Arrow stream": Nasty("a.arrow", arrow_stream(TEXTS)[:-30], fatal="cannot be read as ArrowStream"),
    "rows out of nothing": Nasty(
        "a.arrow", arrow_stream(pa.table({"text": pa.nulls(1 << 26)})), fatal="claims 67108864 rows"
    ),
    # --- what rows mean
    "a role that is none": talk(chat(("human", "q"), ("gpt", "a")), "role is not valid"),
    "a late system": talk(chat(("user", "q"), ("system", "s"), ("assistant", "a")), "role is not valid"),
    "no role": talk('{"messages": [{"content": "q"}]}', "role is not valid"),
    "the user last": talk(
        chat(("user", "q"), ("assistant", "a"), ("user", "q")), "messages do not end with the assistant"
    ),
    "an empty answer": talk(chat(("user", "q"), ("assistant", "  ")), "content is empty"),
    "an answer that is null": talk(chat(("user", "q"), ("assistant", None)), "content is missing"),
    "an answer that is a list": talk(chat(("user", "q"), ("assistant", ["a"])), "content is not text"),
    "no messages": talk('{"messages": []}', "messages are not valid"),
    "messages of another type": talk('{"messages": {"user": "q"}}', "messages are not valid"),
    "messages as text": Nasty(
        "a.csv",
        b'messages\n"[{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", ""content"": ""a""}]"\n"[{"\n',
        kept=[["user", "q", "assistant", "a"]],
        rejected={"messages are not valid": 1},
    ),
    "an empty completion": Nasty(
        "a.jsonl",
        f'{PAIR}{{"prompt": "p", "completion": ""}}\n{{"prompt": "p"}}\n{{"prompt": 7, "completion": "c"}}\n'.encode(),
        kept=[["p", "c"]],
        rejected={"completion is empty": 1, "completion is missing": 1, "prompt is not text": 1},
    ),
    # --- ShareGPT, tools, and answers of SQuAD
    "ShareGPT": Nasty("a.jsonl", shared(("human", "q"), ("gpt", "a")).encode(), kept=[["user", "q", "assistant", "a"]]),
    "ShareGPT as messages in a table": Nasty(
        "a.csv",
        b'messages\n"[{""from"": ""human"", ""value"": ""q""}, {""from"": ""gpt"", ""value"": ""a""}]"\n',
        kept=[["user", "q", "assistant", "a"]],
    ),
    "ShareGPT of wrong roles": Nasty(
        "a.jsonl",
        "\n".join(
            [
                shared(("human", "q"), ("gpt", "a")),
                shared(("User", "q"), ("gpt", "a")),
                shared(("human", "q"), ("bot", "a")),
                shared(("human", "q"), (7, "a")),
                shared(("human", "q"), ("system", "s"), ("gpt", "a")),
                shared(("human", "q"), ("gpt", "a"), ("human", "q")),
                shared(("human", "q"), ("gpt", None)),
                shared(("human", "q"), ("observation", "r"), ("gpt", "a")),
                shared(("human", "q"), ("function_call", "f(x)"), ("observation", "r"), ("gpt", "a")),
                GOOD_CHAT,
            ]
        ).encode(),
        kept=[["user", "q", "assistant", "a"]],
        rejected={
            "role is not valid": 5,
            "messages do not end with the assistant": 1,
            "value is missing": 1,
            "tool answers no call": 1,
            "tool calls are not valid": 1,
        },
    ),
    "ShareGPT behind messages": talk(shared(("human", "q"), ("gpt", "a")), "role is not valid"),
    "a call without an end": talk(called('{"x": '), "arguments are not valid"),
    "a call with a key twice": talk(called('{"x": 1, "x": 2}'), "arguments are not valid"),
    "a call with a key twice, as an object": talk(
        called(0).replace('"arguments": 0', '"arguments": {"x": 1, "x": 2}'), "duplicate key"
    ),
    "a call with NaN": talk(called('{"x": NaN}'), "arguments are not valid"),
    "arguments a hundred deep": Nasty(
        "a.jsonl",
        called('{"x": ' * 90 + "1" + "}" * 90).encode(),
        kept=[["user", "q", "assistant", "", "f", '{"x": ' * 90 + "1" + "}" * 90]],
    ),
    "arguments too deep": talk(called('{"x": ' * 101 + "1" + "}" * 101), "arguments are not valid"),
    "arguments endlessly deep": talk(called('{"x": ' * 100_000), "arguments are not valid"),
    "arguments of numbers without end": talk(called(f'{{"x": {"9" * 5000}}}'), "arguments are not valid"),
    "a result of no call": talk(chat(("user", "q"), ("tool", "r"), ("assistant", "a")), "tool answers no call"),
    "a huge schema": Nasty(
        "a.jsonl",
        lambda: json.dumps({**json.loads(GOOD_CHAT), "tools": huge_tools()}).encode(),
        kept=[["user", "q", "assistant", "a", json.dumps(huge_tools())]],
    ),
    "a schema with a key twice, as text": talk(
        json.dumps({**json.loads(GOOD_CHAT), "tools": '[{"name": "f", "name": "g"}]'}), "tools are not valid"
    ),
    "a schema without a name": talk(
        json.dumps({**json.loads(GOOD_CHAT), "tools": [{"type": "function"}]}), "tools are not valid"
    ),
    "answers of SQuAD": Nasty(
        "a.jsonl",
        (
            b'{"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 3]}}\n'
            b'{"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}\n'
            b'{"question": "q", "context": "", "answers": {"text": "a"}}\n'
            b'{"question": "q", "context": "c", "answers": null}\n'
            b'{"question": "q", "context": "c", "answers": {"text": [null]}}\n'
            b'{"question": "q", "context": "c", "answers": {"text": [["a"]]}}\n'
            b'{"question": "q", "context": "c", "answers": {"text": [" "]}}\n'
        ),
        kept=[["c\n\nq\n\n", "a"], ["q\n\n", "a"]],
        rejected={"answer is missing": 3, "answer is not text": 1, "answer is empty": 1},
    ),
    "answers of SQuAD in Parquet": Nasty(
        "a.parquet",
        parquet(
            pa.table(
                {
                    "question": ["q", "r"],
                    "context": ["c", None],
                    "answers": [{"text": ["a"], "answer_start": [0]}, {"text": [], "answer_start": []}],
                }
            )
        ),
        kept=[["c\n\nq\n\n", "a"]],
        rejected={"answer is missing": 1},
    ),
    "an answer of control tokens": Nasty(
        "a.jsonl", (PAIR + '{"prompt": "</s>", "completion": "<pad>"}\n').encode(), kept=[["p", "c"], ["</s>", "<pad>"]]
    ),
}
