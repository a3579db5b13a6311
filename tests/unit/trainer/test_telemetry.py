"""What the operator and Prometheus can ask a running trainer, and that nobody can keep them from it."""

import json
import logging
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing

import pytest
from finetune_api.constants import Stage
from finetune_api.plan import JobReference
from finetune_api.progress import Progress
from finetune_api.spec import Precision
from finetune_trainer.telemetry import Telemetry, server
from finetune_trainer.telemetry.logs import adopt_library_logs
from finetune_trainer.telemetry.telemetry import METRICS, port_from_environment
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

JOB = JobReference(namespace="team", name="sentiment", uid="1")


@pytest.fixture
def telemetry():
    with Telemetry(Stage.TRAIN, JOB, port=0) as entered:
        yield entered


def get(telemetry: Telemetry, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{telemetry.port}{path}", timeout=3) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def ask(telemetry: Telemetry, request: bytes) -> bytes:
    """The whole answer to raw bytes."""
    with closing(connect(telemetry)) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def connect(telemetry: Telemetry) -> socket.socket:
    return socket.create_connection(("127.0.0.1", telemetry.port), timeout=3)


class TestProgress:
    def test_a_beat_renews_the_time_and_nothing_else_once_a_second(self, telemetry, monkeypatch):
        telemetry.update(activity="Evaluating", step=5)
        before = telemetry.progress
        telemetry.beat()
        assert telemetry.progress == before
        monkeypatch.setattr("finetune_trainer.telemetry.telemetry.BEAT_SECONDS", 0.0)
        time.sleep(0.001)
        telemetry.beat()
        assert telemetry.progress.updated_at > before.updated_at
        assert telemetry.progress.model_copy(update={"updated_at": before.updated_at}) == before

    def test_is_served_as_the_document_that_the_operator_reads(self, telemetry):
        telemetry.update(activity="Training", fraction=0.25, step=5, total_steps=20, training_loss=1.5)
        content_type, body = get(telemetry, "/progress")
        progress = Progress.model_validate_json(body)
        assert content_type == "application/json"
        assert (progress.stage, progress.activity, progress.step, progress.training_loss) == (
            Stage.TRAIN,
            "Training",
            5,
            1.5,
        )
        assert json.loads(body)["totalSteps"] == 20

    def test_is_there_before_the_first_update(self, telemetry):
        progress = Progress.model_validate_json(get(telemetry, "/progress")[1])
        assert (progress.activity, progress.fraction, progress.step) == ("Starting", 0, None)

    def test_keeps_what_an_update_does_not_name_and_takes_the_time(self, telemetry):
        before = time.time()
        telemetry.update(step=3)
        telemetry.update(activity="Evaluating")
        assert (telemetry.progress.step, telemetry.progress.activity) == (3, "Evaluating")
        assert before <= telemetry.progress.updated_at <= time.time()

    @pytest.mark.parametrize(("given", "kept"), [(1.0000000002, 1), (-1e-9, 0), (math.nan, 0), (0.5, 0.5)])
    def test_fraction_stays_between_0_and_1(self, telemetry, given, kept):
        telemetry.update(fraction=given)
        assert telemetry.progress.fraction == kept

    def test_of_a_loss_that_is_no_number_is_still_json(self, telemetry):
        telemetry.update(training_loss=math.nan)
        body = get(telemetry, "/progress")[1]
        assert Progress.model_validate_json(body).training_loss is None
        assert "NaN" not in body

    def test_refuses_a_field_that_does_not_exist(self, telemetry):
        with pytest.raises(ValidationError, match="los"):
            telemetry.update(los=1.0)

    def test_of_many_threads_is_never_torn(self, telemetry):
        def count() -> None:
            for number in range(50):
                telemetry.update(step=number, total_steps=number)

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            progress = telemetry.progress
            assert progress.step == progress.total_steps
        assert telemetry.progress.step == 49


class TestMetrics:
    def series(self, telemetry):
        families = text_string_to_metric_families(get(telemetry, "/metrics")[1])
        return {sample.name: sample for family in families for sample in family.samples}

    def test_are_gauges_with_the_job_and_its_stage(self, telemetry):
        telemetry.update(fraction=0.5, training_loss=0.75, step=4)
        series = self.series(telemetry)
        assert series["finetune_trainer_progress_ratio"].value == 0.5
        assert series["finetune_trainer_training_loss"].value == 0.75
        assert series["finetune_trainer_step"].labels == {"namespace": "team", "name": "sentiment", "stage": "train"}

    def test_have_no_series_for_what_is_not_known(self, telemetry):
        assert set(self.series(telemetry)) == {
            "finetune_trainer_progress_ratio",
            "finetune_trainer_updated_timestamp_seconds",
        }

    def test_cover_every_number_of_the_progress(self):
        numbers = {
            name
            for name, field in Progress.model_fields.items()
            if field.annotation not in (Stage, str, str | None, Precision | None) and name != "resumed_from_step"
        }
        assert {field for field, _ in METRICS.values()} == numbers

    def test_show_a_loss_that_is_no_number(self, telemetry):
        telemetry.update(training_loss=math.nan)
        assert math.isnan(self.series(telemetry)["finetune_trainer_training_loss"].value)


class TestServer:
    def test_healthz(self, telemetry):
        assert get(telemetry, "/healthz")[1] == "ok\n"

    def test_a_query_does_not_matter(self, telemetry):
        assert get(telemetry, "/healthz?verbose=1")[1] == "ok\n"

    @pytest.mark.parametrize("path", ["/", "/nothing", "/progress/", "/../etc/passwd"])
    def test_other_paths_are_not_found(self, telemetry, path):
        with pytest.raises(urllib.error.HTTPError) as raised:
            get(telemetry, path)
        assert raised.value.code == 404
        raised.value.close()

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "BREW"])
    def test_other_methods_are_refused(self, telemetry, method):
        answer = ask(telemetry, f"{method} /progress HTTP/1.0\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.0 405 ")
        assert b"\r\nAllow: GET\r\n" in answer

    @pytest.mark.parametrize(
        "request_bytes",
        [
            b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
            b"GET\r\n\r\n",
            b"GET /progress HTTP/9.9\r\n\r\n",
            b"GET http://[::1/progress HTTP/1.0\r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n",
            b"GET /progress HTTP/1.0\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        ],
    )
    def test_nonsense_is_answered_or_cut_and_harms_nobody(self, telemetry, request_bytes):
        try:
            answer = ask(telemetry, request_bytes)
        except ConnectionError:
            answer = b""
        assert b" 200 " not in answer.split(b"\r\n")[0]
        assert get(telemetry, "/healthz")[1] == "ok\n"

    def test_says_nothing_about_its_software(self, telemetry):
        assert b"Python" not in ask(telemetry, b"GET /healthz HTTP/1.0\r\n\r\n")

    def test_a_client_that_sends_nothing_is_cut_off(self, telemetry, monkeypatch):
        monkeypatch.setattr(server._Handler, "timeout", 0.2)
        with closing(connect(telemetry)) as client:
            assert client.recv(1) == b""

    def test_many_slow_clients_do_not_block_the_operator(self, telemetry):
        start = time.monotonic()
        with ExitStack() as stack:
            for _ in range(150):
                client = stack.enter_context(closing(connect(telemetry)))
                client.sendall(b"GET /progress HT")
            for _ in range(5):
                get(telemetry, "/progress")
            assert time.monotonic() - start < 10  # a full queue of connections costs a second each
            served = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
            assert len(served) <= server.MAX_CONNECTIONS + 1

    def test_clients_that_do_not_read_do_not_block_the_operator(self, telemetry):
        with ExitStack() as stack:
            for _ in range(50):
                client = stack.enter_context(closing(connect(telemetry)))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            before = time.monotonic()
            get(telemetry, "/progress")
            assert time.monotonic() - before < 2

    def test_clients_that_reset_harm_nobody(self, telemetry):
        for _ in range(20):
            client = connect(telemetry)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            client.close()
        assert get(telemetry, "/healthz")[1] == "ok\n"

    def test_ends_with_the_stage(self):
        with Telemetry(Stage.TRAIN, JOB, port=0) as telemetry:
            port = telemetry.port
        assert telemetry.port is None
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()

    @pytest.mark.parametrize("port", [None, 70_000])
    def test_a_port_that_cannot_be_had_does_not_end_a_training(self, telemetry, caplog, port):
        with Telemetry(Stage.TRAIN, JOB, port or telemetry.port) as second:
            second.update(step=1)
            assert second.port is None
        assert "cannot listen" in caplog.text


@pytest.mark.parametrize(
    ("value", "port"), [(None, 9400), ("", 9400), ("0", 0), ("9555", 9555), ("web", 9400), ("-1", 9400)]
)
def test_port_comes_from_the_environment(monkeypatch, value, port):
    monkeypatch.delenv("FINETUNE_TELEMETRY_PORT", raising=False)
    if value is not None:
        monkeypatch.setenv("FINETUNE_TELEMETRY_PORT", value)
    assert port_from_environment() == port


class TestLogs:
    def lines(self, code: str) -> list[dict]:
        """The log lines of a process that runs `code` after it started to log."""
        start = (
            "import logging, sys, warnings\n"
            "from finetune_trainer.telemetry.logs import start_logging\n"
            "start_logging('team/sentiment', lambda error: f'trace of {type(error).__name__}')\n"
        )
        process = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True)
        assert process.stderr == ""
        return [json.loads(line) for line in process.stdout.splitlines()]

    def test_are_json_one_line_each(self):
        (line,) = self.lines("logging.getLogger('finetune_trainer').info('a %s\\nb', 'ü\\udc80\"')")
        assert line.pop("time").endswith("+00:00")
        assert line == {
            "level": "info",
            "logger": "finetune_trainer",
            "message": 'a ü\udc80"\nb',
            "job": "team/sentiment",
        }

    def test_hold_tracebacks_only_as_the_given_format_shows_them(self):
        code = "try:\n    raise ValueError('a row')\nexcept ValueError:\n    logging.exception('failed')"
        (line,) = self.lines(code)
        assert line["traceback"] == "trace of ValueError"
        assert "a row" not in json.dumps(line)

    def test_hold_python_warnings_too(self):
        (line,) = self.lines("warnings.warn('old', stacklevel=1)")
        assert line["level"] == "warning"
        assert "old" in line["message"]

    def test_leave_the_chatter_of_http_clients_out(self):
        assert self.lines("logging.getLogger('httpx').info('GET https://secret')") == []

    def test_take_over_libraries_that_log_by_themselves(self):
        library = logging.getLogger("transformers")
        handlers, propagate = list(library.handlers), library.propagate
        try:
            library.addHandler(logging.StreamHandler())
            library.propagate = False
            adopt_library_logs()
            assert library.handlers == []
            assert library.propagate
        finally:
            library.handlers, library.propagate = handlers, propagate
