"""`Watch`: how far one activity of a stage is, and whether it may go on."""

import logging
import time

from finetune_trainer.errors import Interrupted
from finetune_trainer.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)

UPDATE_SECONDS = 0.5
LOG_SECONDS = 15.0


class Watch:
    """Maps an activity's progress to its part (`start` to `end`) of the stage's fraction.

    Every call ends the stage with Interrupted once SIGTERM arrived, so call it often; it tells the telemetry twice
    a second and the log every quarter minute. Threads may share one.
    """

    def __init__(self, telemetry: Telemetry, activity: str, start: float, end: float) -> None:
        self._telemetry = telemetry
        self._activity = activity
        self._start, self._end = start, end
        self._next_update = 0.0
        self._next_log = time.monotonic() + LOG_SECONDS
        self.advance(0, 1)

    def check(self) -> None:
        """Raises Interrupted if a stop was requested."""
        if self._telemetry.stop_requested.is_set():
            raise Interrupted(f"stopped while {self._activity[0].lower()}{self._activity[1:]}")

    def advance(self, done: float, total: float) -> None:
        """`done` of `total`, in any unit; raises Interrupted if a stop was requested."""
        self.check()
        now = time.monotonic()
        if now < self._next_update:
            return
        self._next_update = now + UPDATE_SECONDS
        share = min(1.0, done / total) if total > 0 else 1.0
        self._telemetry.update(activity=self._activity, fraction=self._start + (self._end - self._start) * share)
        if now >= self._next_log:
            self._next_log = now + LOG_SECONDS
            logger.info("%s: %.0f %%", self._activity, 100 * share)
