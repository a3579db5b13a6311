"""Log lines on stdout: JSON for a log collector, plain text at a terminal."""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime

TraceFormat = Callable[[BaseException], str]
"""Exception -> its traceback as text."""


class _Formatter(logging.Formatter):
    """Formats tracebacks by `trace`, which knows what may be shown."""

    def __init__(self, job: str, trace: TraceFormat) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._job = job
        self._trace = trace

    def formatException(self, ei: tuple[object, ...]) -> str:  # noqa: N802
        error = ei[1]
        return self._trace(error) if isinstance(error, BaseException) else ""


class _JsonFormatter(_Formatter):
    """One JSON object per line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "job": self._job,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(job: str, trace: TraceFormat) -> None:
    """All log records and Python warnings go to stdout. `job` is "namespace/name"."""
    formatter = _Formatter if sys.stdout.isatty() else _JsonFormatter
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter(job, trace))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "fsspec", "s3fs", "botocore", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def adopt_library_logs() -> None:
    """Libraries with a handler of their own log through ours; call it when they are imported."""
    for name in ("transformers", "huggingface_hub"):
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True
