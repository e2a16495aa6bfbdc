"""Strict reads of a JSON object: no number as a string, no true as 1, no unknown field."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from flexgate.policies.field_errors import path_of
from flexgate.server.http.errors import UNKNOWN_FIELD, Invalid


def invalid(message: str, param: str) -> NoReturn:
    """Refuse a value."""
    raise Invalid(message, param=param, code="invalid_value")


def too_much(message: str, param: str) -> NoReturn:
    """Refuse a value that is over a limit."""
    raise Invalid(message, param=param, code="limit_exceeded")


def integer(body: Mapping[str, Any], name: str, low: int, high: int | None = None, *, why: str = "") -> int | None:
    """The integer field `name` between `low` and `high`, or None when it is absent; `why` explains `high`."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int:
        invalid(f"'{name}' must be an integer.", name)
    if value < low:
        invalid(f"'{name}' must be at least {low}{_number(value)}.", name)
    if high is not None and value > high:
        too_much(f"'{name}' must be at most {high}{_number(value)}{why}.", name)
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
    """What was given instead, unless it is too long to repeat."""
    return f", not {value}" if abs(value) < 10**12 else ""


class Fate(enum.StrEnum):
    """What becomes of a field.

    It is honoured (checked and handed on), ignored (accepted and dropped, because dropping it changes no response) or
    refused. A refused field is accepted when it is null or has a value that asks for nothing, and is dropped then.
    """

    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Rule:
    """A field's fate. `neutral` are values of a refused or ignored field that ask for nothing.

    An ignored field without `neutral` is dropped whatever its value. `why` ends the sentence
    that refuses it.
    """

    fate: Fate
    neutral: tuple[Any, ...] = ()
    why: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether a request with this value may go on."""
        if self.fate is Fate.HONOURED or value is None:
            return True
        if self.fate is Fate.IGNORED and not self.neutral:
            return True
        return any(type(value) is type(item) and value == item for item in self.neutral)


Table = Mapping[str, Rule]


def keep_honoured(body: Mapping[str, Any], table: Table, *, under: Sequence[str | int] = ()) -> dict[str, Any]:
    """The honoured fields of `body`; `under` is the place of the object that `body` is, if not the request.

    A field that is null asks for nothing, whatever its name.

    Raises:
        Invalid: a field is unknown, or refused and asks for something.
    """
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        rule = table.get(name)
        if rule is None or not rule.accepts(value):
            _refuse_field(rule, path_of((*under, name)) or "")
        if rule.fate is Fate.HONOURED:
            kept[name] = value
    return kept


def _refuse_field(rule: Rule | None, param: str) -> NoReturn:
    if rule is None:
        param = _shown(param)
        raise Invalid(f"'{param}' {UNKNOWN_FIELD}.", param=param, code="unknown_parameter")
    raise Invalid(f"'{param}' is not supported: {rule.why}.", param=param, code="unsupported_parameter")


def _shown(name: str) -> str:
    return name if len(name) <= 80 else name[:77] + "..."
