"""report/data.html: what a reader finds on it, and that nothing in the data can change it."""

import re
from html.parser import HTMLParser

import pytest
from finetune_api.base import Document
from finetune_api.constants import Reason
from finetune_api.report import (
    CleaningReport,
    CleaningSample,
    CleaningStep,
    DataFinding,
    DataReport,
    DuplicateReport,
    FileReport,
    LabellingReport,
    LengthReport,
    Level,
    PersonalDataReport,
    Remark,
    RuleReport,
    SampleReport,
    SourceReport,
)
from finetune_api.status import DataStatus, ModelStatus
from finetune_trainer.data.page import render_html
from finetune_trainer.data.page.charts import histogram
from finetune_trainer.data.page.other import document_section
from hypothesis import given
from hypothesis import strategies as st

VOID = {"meta"}
INLINE = {"bdi", "code", "b", "strong", "span", "em"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></table><h1>all is well</h1>",
    "'; DROP TABLE rows; --",
    "&lt;b&gt; {0} {title} %s {{7*7}}",
    "javascript:alert(1)",
    "<!-- ",
    "]]>",
]
HIDDEN = "abc\u202edcba\x1b[31m\x00\u200b"


class Page(HTMLParser):
    """The page as a tree of tags that must fit together: what is in it, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.words.append("" if tag in INLINE else " ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            if {"h1", "h2"} & set(self.open):
                self.headings.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def status(**changes) -> DataStatus:
    fields = {
        "rows_read": 12_345, "rows_kept": 12_100, "rows_rejected": 245, "train_rows": 10_000, "validation_rows": 1_100, "test_rows": 1_000,
        "tokens": 3_214_551, "supervised_tokens": 10_000, "truncated_rows": 120, "max_length": 256, "fingerprint": "f00d",
    }  # fmt: skip
    return DataStatus(**{**fields, **changes})


def source(**changes) -> SourceReport:
    fields = {
        "field": "dataset.sources[0]", "uri": "s3://bucket/train.csv", "sha256": "0" * 64, "format": "LabelledText",
        "file": FileReport(kind="CSV", encoding="utf-8", delimiter=";"), "rows_read": 12_345, "rows_rejected": 245,
    }  # fmt: skip
    return SourceReport(**{**fields, **changes})


def full(name: str = "good", **changes) -> DataReport:
    """Every part of a report; `name` stands wherever text of the data may."""
    fields = {
        "summary": status(),
        "findings": [
            DataFinding(level=Level.WARNING, reason=Remark.ROWS_TRUNCATED, field="training.maxLength", message=name)
        ],
        "model": ModelStatus(architecture=name[:128], revision="abc", parameters=22_713_216, context_length=512),
        "sources": [source(uri=name, format=name, file=FileReport(kind=name, encoding=name, delimiter="\t"))],
        "ignored_files": [name],
        "rejections": {name: 200, "label is missing": 45},
        "cleaning": CleaningReport(
            steps={
                name: CleaningStep(
                    rows_changed=3, samples=[CleaningSample(before=name, after=name), CleaningSample(before=name)]
                )
            },
            languages={name: 5},
        ),
        "personal_data": PersonalDataReport(action=name, rows=3, found={name: 4}),
        "duplicates": DuplicateReport(
            similarity=0.8,
            exact_rows=300,
            near_rows=512,
            rows_dropped=812,
            held_out_rows=122,
            groups=4,
            largest_group=31,
            group_sizes={name: 3, "10 to 99": 1},
            note=name,
        ),
        "labels": {"train": {name: 7_000, "bad": 3_000}, "validation": {name: 800, "bad": 300}},
        "labelling": LabellingReport(
            aliases={name: 3}, by_rule={name: RuleReport(votes=9, overlaps=1, conflicts=0, judged=4, right=3)}
        ),
        "lengths": LengthReport(mean=31.2, p50=28, p90=61, p99=188, longest=512),
    }
    return DataReport(**{**fields, **changes})


def test_a_person_in_a_hurry_reads_the_top():
    page = Page(render_html(full(), "headlines"))
    assert page.text.startswith("Data report: headlines Data report headlines Usable, with 1 warning")
    assert "12,345 rows read, 98.0 % kept: 10,000 to train on, 1,100 for validation, 1,000 for test." in page.text
    assert "The commonest reason to leave a row out is: good (200 rows)." in page.text
    assert "The training rows hold 3.21 million tokens; 1.2 % of the rows are cut at 256 tokens." in page.text


def test_every_part_has_a_section():
    headings = Page(render_html(full(), "headlines")).headings
    assert headings == [
        "headlines", "Splits", "Rows left out", "Duplicates", "Labels", "Lengths", "Cleaning", "Personal data", "Labelling", "Sources",
        "Where it comes from",
    ]  # fmt: skip


def test_what_the_report_has_not_is_not_on_the_page():
    bare = DataReport(summary=status(rows_kept=0, rows_read=0, tokens=0, fingerprint=""), sources=[], rejections={})
    page = Page(render_html(bare, "headlines"))
    assert page.headings == ["headlines", "Where it comes from"]
    assert "No row was read." in page.text


def test_refused_data_says_so_first_and_why():
    error = DataFinding(
        level=Level.ERROR, reason=Reason.DATA_INVALID, field="dataset.sources[0]", message="a.csv line 3: no label"
    )
    page = Page(render_html(full(findings=[error]), "headlines"))
    top = page.text.partition("Splits")[0]
    assert "Refused This data cannot be trained on before the errors below are mended." in top
    assert "Error dataset.sources[0] a.csv line 3: no label" in top


def test_without_findings_it_is_ready():
    assert "Ready 12,345 rows" in Page(render_html(full(findings=[]), "headlines")).text


def test_a_sample_is_called_one():
    part = full(sample=SampleReport(rows_per_source=1000, complete=False))
    assert "This is a sample: at most 1,000 rows of each source" in Page(render_html(part, "x")).text
    whole = full(sample=SampleReport(rows_per_source=1000, complete=True))
    assert "This is a sample" not in Page(render_html(whole, "x")).text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_of_the_data_is_only_text(hostile):
    """The tags are those of a harmless report, and the text is on the page as it is."""
    page, harmless = Page(render_html(full(hostile), hostile)), Page(render_html(full(), "good"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in page.tags] == [sorted(a) for _, a in harmless.tags]
    assert page.text.count(" ".join(hostile.split())) == harmless.text.count("good")


@given(st.text(min_size=1, max_size=40))
def test_whatever_text_there_is_the_page_keeps_its_form(text):
    html = render_html(full(text), text)
    html.encode()
    page, harmless = Page(html), Page(render_html(full(), "good"))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]


def test_characters_that_cannot_be_seen_are_shown():
    html = render_html(full(HIDDEN), "x")
    assert not {"\u202e", "\x1b", "\x00", "\u200b"} & set(html)
    assert "abc⟨U+202E⟩dcba⟨U+001B⟩[31m⟨U+0000⟩⟨U+200B⟩" in Page(html).text


def test_the_page_loads_and_runs_nothing():
    html = render_html(full(), "headlines")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "form", "a", "base"} & {tag for tag, _ in page.tags}
    attributes = {name for _, found in page.tags for name in found}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "style")}
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|https?:", html)


def test_it_can_be_read_aloud():
    page = Page(render_html(full(), "headlines"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") == tags.count("thead")
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["aria-labelledby"] for tag, attributes in page.tags if tag == "section"} == ids
    for tag, attributes in page.tags:
        if tag == "svg":  # it says what it shows, or repeats a number beside it
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")


def test_the_same_report_gives_the_same_page():
    assert render_html(full(), "x") == render_html(DataReport.model_validate_json(full().to_json()), "x")


@pytest.mark.parametrize(
    ("part", "shown"), [(1, "< 0.1 %"), (12_344, "> 99.9 %"), (12_345, "100 %"), (0, "0 %"), (123, "1.0 %")]
)
def test_only_all_is_100_percent_and_only_nothing_is_none(part, shown):
    page = Page(render_html(full(rejections={"a reason": part} if part else {}, summary=status(rows_kept=part)), "x"))
    assert f"12,345 rows read, {shown} kept" in page.text


def test_long_tables_end_and_say_what_is_missing():
    labels = {f"label {n}": 1000 - n for n in range(200)}
    page = Page(render_html(full(labels={"train": labels}, rejections={str(n): 1 for n in range(40)}), "x"))
    assert "And 170 rarer labels, which data.json has." in page.text
    assert "label 29" in page.text
    assert "label 30" not in page.text
    assert "And 10 more with 10 in all." in page.text


def test_labels_are_compared_by_share_in_each_split():
    page = Page(render_html(full(), "x"))
    assert "2 labels; the commonest has 2.33 times the rows of the rarest." in page.text
    assert "good 7,000 70.0 % 800 72.7 % bad 3,000 30.0 % 300 27.3 %" in page.text


def test_a_histogram_says_in_words_what_it_draws():
    drawn = Page(str(histogram([1, 2, 4, 8], [5, 20, 1], "the most rows have 2 to 3", "tokens", limit=4)))
    (svg,) = [attributes for tag, attributes in drawn.tags if tag == "svg"]
    assert svg["role"] == "img"
    assert svg["aria-label"] == "the most rows have 2 to 3"
    columns = [attributes for tag, attributes in drawn.tags if tag == "rect"]
    heights = [float(attributes["height"]) for attributes in columns]
    assert heights[1] == max(heights)
    assert heights[0] == pytest.approx(heights[1] / 4)
    assert "2 to 3 tokens: 20 rows" in drawn.text
    assert "longest allowed: 4" in drawn.text
    assert Page(str(histogram([1, 2], [0], "nothing", "tokens", limit=90))).text.count("longest allowed") == 0


class Buckets(Document):
    edges: list[int]
    rows: list[int]


class Part(Document):
    kept_share: float
    tokens_per_word: float
    in_use: bool
    by_name: dict[str, Buckets | None]
    histogram: Buckets


def test_a_part_without_a_section_of_its_own_is_shown_by_its_fields():
    part = Part(
        kept_share=0.25,
        tokens_per_word=1.3125,
        in_use=True,
        by_name={},
        histogram=Buckets(edges=[1, 2, 4], rows=[3, 9]),
    )
    page = Page(str(document_section("A new part", part, note="What it is.", limit=3)))
    assert page.headings == ["A new part"]
    assert "What it is. Kept share 25.0 % Tokens per word 1.312 In use yes Histogram 1 tokens: 3 rows" in page.text
    assert "longest allowed: 3" in page.text


def test_the_trainers_own_duplicates_are_told():
    page = Page(render_html(full(), "x"))
    assert "812 duplicates left out by dataset.duplicates." in page.text
    assert "Similar to an earlier row 512 4.1 % The same as an earlier row 300 2.4 %" in page.text
    assert "the largest of 31 rows" in page.text
