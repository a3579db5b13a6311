"""What is said of a value that cannot be learned from, and the checks that all formats share."""

import json
import math
from typing import Any

from finetune_trainer.data.read import RefusedValueError, is_unicode, parse_json


class InvalidRowError(ValueError):
    """A row cannot be learned from; neither text quotes it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def checked_text(value: Any, name: str) -> str:
    """The value, if it is a text that says something; otherwise raises InvalidRowError, which calls it `name`."""
    if value is None:
        raise InvalidRowError(f"{name} is missing")
    if is_nan(value):
        raise InvalidRowError(f"{name} is missing", "it is NaN")
    if not isinstance(value, str):
        raise InvalidRowError(f"{name} is not text", f"it is of type {type(value).__name__}")
    if not value.strip():
        raise InvalidRowError(f"{name} is empty")
    if not is_unicode(value):
        raise InvalidRowError("not Unicode", f"{name} holds half of a surrogate pair")
    return value


def is_nan(value: Any) -> bool:
    """What pandas writes for what is missing."""
    return isinstance(value, float) and math.isnan(value)


def parsed(value: Any, name: str) -> Any:
    """The value; if it is text, such as a cell of a CSV file, what it is as JSON. Raises InvalidRowError, which calls
    them `name`, for text that is none or would be changed by reading it.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except RefusedValueError as error:
        raise InvalidRowError(
            f"{name} are not valid", f"their text is not JSON: {error.reason} {error.detail}"
        ) from None


def written(value: Any, name: str) -> str:
    """The value as JSON. Raises InvalidRowError, which calls it `name`, for what JSON cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise InvalidRowError(f"{name} are not valid", "they hold what JSON cannot, such as a date or NaN") from None
    if not is_unicode(text):
        raise InvalidRowError("not Unicode", f"{name} hold half of a surrogate pair")
    return text
