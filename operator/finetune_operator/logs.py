"""The operator's log: one JSON object per line on stdout, with the job that it is about."""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

current_job: ContextVar[str] = ContextVar("current_job", default="")
"""`namespace/name` of the FineTuneJob that this task works on."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if job := current_job.get():
            line["job"] = job
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(level: str) -> None:
    """All log records and Python warnings go to stdout. Raises ValueError for a level that logging does not know."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    if logging.getLogger().level > logging.DEBUG:
        logging.getLogger("kopf").setLevel(logging.WARNING)
    # kopf runs in a thread of its own, where signals are none of its business; it warns about that
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
