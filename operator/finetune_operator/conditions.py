"""`status.conditions`: kept in order, one per type, with a transition time that changes only with the status."""

from collections.abc import Iterable
from typing import Literal

from finetune_api.constants import ConditionType, Reason
from finetune_api.status import Condition

from finetune_operator.observed import format_time

MESSAGE_LENGTH = 2048
"""`finetune_api.status.Message` ends here."""


def shorten(message: str, length: int = MESSAGE_LENGTH) -> str:
    """The message within the schema's bound."""
    return message if len(message) <= length else message[: length - 1] + "…"


class Conditions:
    """The conditions of one status, changed by `set`. The API conventions say what the fields mean:
    https://github.com/kubernetes/community/blob/master/contributors/devel/sig-architecture/api-conventions.md
    """

    def __init__(self, current: Iterable[Condition], generation: int, now: float) -> None:
        self._conditions = {condition.type: condition for condition in current}
        self._generation = generation
        self._now = now

    def get(self, kind: ConditionType) -> Condition | None:
        return self._conditions.get(kind)

    def is_true(self, kind: ConditionType) -> bool:
        condition = self.get(kind)
        return condition is not None and condition.status == "True"

    def set(self, kind: ConditionType, holds: bool | None, reason: Reason, message: str) -> None:
        """Sets one condition, to Unknown with None; its transition time stays if only reason or message is new."""
        old = self.get(kind)
        status: Literal["True", "False", "Unknown"] = "Unknown" if holds is None else "True" if holds else "False"
        same = old is not None and old.status == status
        self._conditions[kind] = Condition(
            type=kind,
            status=status,
            reason=reason,
            message=shorten(message),
            observed_generation=self._generation,
            last_transition_time=old.last_transition_time if old and same else format_time(self._now),
        )

    def remove(self, *kinds: ConditionType) -> None:
        for kind in kinds:
            self._conditions.pop(kind, None)

    def to_list(self) -> list[Condition]:
        """In the order in which a job meets them."""
        return [self._conditions[kind] for kind in ConditionType if kind in self._conditions]
