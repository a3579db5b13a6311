"""What a user sees of a run: lines in a pipe, a live picture at a terminal, tables at the end."""

import io
import re
import time

import pytest
import yaml
from finetune_api.constants import Phase, Reason, Stage
from finetune_api.progress import Progress
from finetune_api.report import DataReport, Evaluation, EvaluationReport, Level
from finetune_api.status import FailureStatus, FineTuneJobStatus, ResultStatus
from finetune_api.validation import Validation, ValidationFinding
from finetune_operator import display
from finetune_operator.cluster import Event
from finetune_operator.display import LiveDisplay, PlainDisplay, Terminal, make_display, print_document, print_evidence
from finetune_operator.validation_table import print_validation

from tests.crd_fuzz import INJECTIONS
from tests.fake_cluster import ARTIFACT, DATA, TRAINED
from tests.fake_trainer import REPORT

TRAINING = Progress(
    stage=Stage.TRAIN, activity="Training", fraction=0.42, step=21, total_steps=50, training_loss=0.5124,
    evaluation_loss=0.61, learning_rate=0.00051, tokens_per_second=1234.5, estimated_remaining_seconds=75,
    updated_at=0,
)  # fmt: skip
NUMBERS = "Training  step 21/50  loss 0.512  validation loss 0.610  lr 5.1e-04  1,234 tokens/s  ETA 1m15s"


class Screen:
    def __init__(self, terminal: bool) -> None:
        self.file = io.StringIO()
        self.console = Terminal(file=self.file, force_terminal=terminal, width=120)

    @property
    def text(self) -> str:
        return self.file.getvalue()

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)


def status(phase: Phase | None, message: str = "", **fields: object) -> FineTuneJobStatus:
    return FineTuneJobStatus(phase=phase, message=message, **fields)


@pytest.fixture
def pipe() -> Screen:
    return Screen(terminal=False)


@pytest.fixture
def terminal() -> Screen:
    return Screen(terminal=True)


class TestPlain:
    def test_a_line_per_phase(self, pipe):
        with PlainDisplay(pipe.console) as plain:
            for phase in (None, Phase.PENDING, Phase.PENDING, Phase.PREPARING, Phase.PREPARING):
                plain.show(status(phase, "some words"), None)
        lines = pipe.text.splitlines()
        assert [line.split()[1] for line in lines] == ["Pending", "Preparing"]
        assert re.fullmatch(r"\d\d:\d\d:\d\d  Pending     some words", lines[0])

    def test_numbers_now_and_then(self, pipe, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        plain = PlainDisplay(pipe.console)
        for _ in range(31):
            plain.show(status(Phase.TRAINING), TRAINING)
            now[0] += 1
        assert [line.split("    ")[-1] for line in pipe.text.splitlines()] == [NUMBERS] * 4

    def test_the_end_is_told_in_words(self, pipe):
        PlainDisplay(pipe.console).show(status(Phase.FAILED, "train: [bold]it broke[/bold]"), TRAINING)
        assert pipe.text.endswith("Failed      train: [bold]it broke[/bold]\n")

    def test_only_warnings_are_told_beside_the_phases(self, pipe):
        plain = PlainDisplay(pipe.console)
        plain.event(Event("Normal", "Training", "train runs"))
        plain.event(Event("Warning", "StageFailed", "attempt 1 failed"))
        assert len(pipe.text.splitlines()) == 1
        assert pipe.text.endswith("Warning     StageFailed: attempt 1 failed\n")

    def test_no_line_is_broken_or_coloured(self, pipe):
        PlainDisplay(pipe.console).show(status(Phase.TRAINING, "x" * 500), None)
        assert len(pipe.text.splitlines()) == 1
        assert "\x1b" not in pipe.text


class TestLive:
    def test_a_terminal_gets_it(self, terminal, pipe):
        assert isinstance(make_display(terminal.console, "title"), LiveDisplay)
        assert isinstance(make_display(pipe.console, "title"), PlainDisplay)

    def test_the_running_stage_has_its_numbers(self, terminal):
        with LiveDisplay(terminal.console, "demo: Classification by LoRA") as live:
            live.show(status(Phase.TRAINING, data=DATA), TRAINING)
        picture = terminal.plain
        assert "demo: Classification by LoRA" in picture
        assert re.search(r"✓ +prepare .*700 rows to train on, 100 validation, 200 test", picture)
        assert re.search(r"train +━+.* 42%", picture)
        assert re.search(r"· +publish", picture)
        assert NUMBERS in picture

    def test_the_end_shows_all_stages_done(self, terminal):
        result = ResultStatus(scores=TRAINED.scores, artifact=ARTIFACT)
        with LiveDisplay(terminal.console, "demo") as live:
            live.show(status(Phase.SUCCEEDED, data=DATA, result=result), None)
        picture = terminal.plain
        assert picture.count("✓") >= 3
        assert "macroF1 0.91" in picture
        assert "Adapter" in picture

    def test_the_failed_stage_is_marked(self, terminal):
        failure = FailureStatus(stage=Stage.TRAIN, reason="StageFailed", message="it broke", exit_code=1)
        with LiveDisplay(terminal.console, "demo") as live:
            live.show(status(Phase.FAILED, "train: it broke", data=DATA, failure=failure), None)
        assert re.search(r"✗ +train .*failed", terminal.plain)

    def test_warnings_stay_in_sight(self, terminal):
        with LiveDisplay(terminal.console, "demo") as live:
            for number in range(display.MESSAGES + 2):
                live.event(Event("Warning", "StageFailed", f"attempt {number}"))
            live.stopping()
        last = terminal.plain.rsplit("demo", 1)[-1]
        assert "attempt 0" not in last
        assert f"attempt {display.MESSAGES + 1}" in last
        assert display.STOPPING in last

    def test_a_run_that_begins_in_the_middle_can_be_drawn(self, terminal):
        """The first look at a run that is gone on with."""
        with LiveDisplay(terminal.console, "demo") as live:
            live.show(status(None), None)
            live.show(status(Phase.PUBLISHING, data=DATA, result=ResultStatus(scores=TRAINED.scores)), None)
        assert re.search(r"✓ +train", terminal.plain)


class TestEvidence:
    def test_tuned_against_baseline(self, pipe):
        print_evidence(pipe.console, REPORT)
        assert "test split, 40 rows" in pipe.text
        assert re.search(r"majority class", pipe.text)
        assert re.search(r"accuracy\W+0.875\W+0.875\W+\+0.000", pipe.text)
        assert re.search(r"F1 bad\W+0.900", pipe.text)
        assert re.search(r"bad\W+18\W+2\W", pipe.text)

    def test_generation_has_no_classes(self, pipe):
        tuned, before = (
            Evaluation(name=n, metrics={"loss": loss}) for n, loss in (("tuned", 1.5), ("untuned model", 2))
        )
        print_evidence(pipe.console, EvaluationReport(split="test", rows=9, tuned=tuned, baseline=before, scores=[]))
        assert re.search(r"loss\W+1.500\W+2.000\W+-0.500", pipe.text)
        assert "confusion" not in pipe.text

    def test_many_classes_are_left_to_the_file(self, pipe):
        classes = [REPORT.tuned.classes[0].model_copy(update={"label": f"class-{i}"}) for i in range(200)]
        tuned = REPORT.tuned.model_copy(update={"classes": classes, "confusion": [[0] * 200] * 200})
        print_evidence(pipe.console, REPORT.model_copy(update={"tuned": tuned}))
        assert "200 classes: see report/evaluation.json" in pipe.text
        assert "class-1" not in pipe.text

    def test_labels_are_no_markup(self, pipe):
        classes = [scores.model_copy(update={"label": f"[{scores.label}]"}) for scores in REPORT.tuned.classes]
        tuned = REPORT.tuned.model_copy(update={"classes": classes})
        print_evidence(pipe.console, REPORT.model_copy(update={"tuned": tuned, "baseline": tuned}))
        assert "F1 [bad]" in pipe.text
        assert pipe.text.count("[good]") >= 3


def show_all(screen: Screen, word: str) -> None:
    """Everything that is shown of a run, with a word in each place that a manifest, a dataset or a model can fill."""
    failure = FailureStatus(stage=Stage.TRAIN, reason="StageFailed", message=word, exit_code=1)
    result = ResultStatus(scores=[TRAINED.scores[0].model_copy(update={"metric": word})])
    ends = status(Phase.FAILED, word, data=DATA, failure=failure, result=result)
    for shown in (PlainDisplay(screen.console), LiveDisplay(screen.console, word)):
        with shown:
            shown.event(Event("Warning", "StageFailed", word))
            shown.show(status(Phase.TRAINING, word), TRAINING.model_copy(update={"activity": word}))
            shown.show(ends, None)
    classes = [scores.model_copy(update={"label": word}) for scores in REPORT.tuned.classes]
    evaluation = REPORT.tuned.model_copy(update={"classes": classes, "name": word})
    print_evidence(
        screen.console, REPORT.model_copy(update={"tuned": evaluation, "baseline": evaluation, "split": word})
    )
    print_document(screen.console, {"spec": {word: word}})
    finding = ValidationFinding(level=Level.ERROR, reason=Reason.DATA_INVALID, field=word, message=word)
    data = DataReport(sources=[], rejections={word: 1}, labels={"train": {word: 1}}, summary=DATA, findings=[])
    validation = Validation(manifest=word, job=word, valid=False, findings=[finding], data=data)
    print_validation(screen.console, validation)


def commands(text: str) -> set[str]:
    """What a terminal would obey, but for line breaks and what rich itself says whatever the words are."""
    numberless = re.sub(r"\x1b\[[0-9;]*(?=[A-Zm])", "\x1b[", text)
    return {c for c in re.sub(r"\x1b\[(\?25[hl]|[A-Zm])", "", numberless) if not c.isprintable()} - {"\n", "\r"}


@pytest.mark.parametrize("screen", ["pipe", "terminal"])
def test_no_text_has_power_over_the_terminal(screen, request):
    target = request.getfixturevalue(screen)
    show_all(target, "harmless")
    assert commands(target.text) == set()
    for word in [*INJECTIONS, "\x1b[2J\x1b[H"]:
        before = len(target.text)
        show_all(target, word)
        assert commands(target.text[before:]) == set()


def test_the_document_is_yaml_whatever_its_width(pipe):
    document = {"kind": "FineTuneJob", "status": {"message": "naïve [red] " + "word " * 100, "progress": {"step": 1}}}
    print_document(pipe.console, document)
    assert yaml.safe_load(pipe.text) == document
