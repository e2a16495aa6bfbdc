"""Typed reads of a JSON object, strict as JSON is: no number is a string, no true is a one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from flexgate.server.http.errors import Invalid


def invalid(message: str, param: str) -> NoReturn:
    """Refuse a value."""
    raise Invalid(message, param=param, code="invalid_value")


def too_much(message: str, param: str) -> NoReturn:
    """Refuse a value that is over a limit."""
    raise Invalid(message, param=param, code="limit_exceeded")


def integer(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """The integer field `name` between `low` and `high`, or None when it is absent."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int:
        invalid(f"'{name}' must be an integer.", name)
    if value < low:
        invalid(f"'{name}' must be at least {low}, not {_number(value)}.", name)
    if high is not None and value > high:
        too_much(f"'{name}' must be at most {high}, not {_number(value)}.", name)
    return value


def boolean(body: Mapping[str, Any], name: str) -> bool | None:
    """The boolean field `name`, or None when it is absent."""
    value = body.get(name)
    if value is not None and type(value) is not bool:
        invalid(f"'{name}' must be true or false.", name)
    return value


def text(body: Mapping[str, Any], name: str, *, longest: int) -> str | None:
    """The string field `name`, or None when it is absent."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        invalid(f"'{name}' must be a string.", name)
    if len(value) > longest:
        too_much(f"'{name}' may have at most {longest} characters.", name)
    return value


def sized(body: Mapping[str, Any], name: str, *, most: int) -> None:
    """Refuse a list or object in `name` with more than `most` members."""
    value = body.get(name)
    if isinstance(value, list | dict) and len(value) > most:
        too_much(f"'{name}' may have at most {most} members, not {len(value)}.", name)


def characters(value: Any) -> int:
    """How many characters the texts inside a JSON value have, without the names of fields."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list | tuple):
            left += item
        elif isinstance(item, dict):
            left += item.values()
    return total


def _number(value: int) -> str:
    return str(value) if abs(value) < 10**12 else "a number of more than 12 digits"
