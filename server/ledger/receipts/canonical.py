"""Canonical JSON (RFC 8785) of what is signed, read strictly: every file has one meaning, or none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import rfc8785

MOST_BYTES: Final = 1 << 20
MOST_DEPTH: Final = 8
SAFE: Final = 2**53 - 1
HASH: Final = "[0-9a-f]{64}"
NUMBER: Final = "0|[1-9][0-9]{0,18}"
Json = dict[str, Any]


class ReceiptInvalid(Exception):
    """A file is no valid receipt, statement, chain or key set; the message says what is wrong with it."""


def parse(text: bytes, *, most: int = MOST_BYTES) -> Any:
    """JSON in its canonical form (RFC 8785), without fractions, and at most one line break after it."""
    text = text[:-1] if text.endswith(b"\n") else text
    if len(text) > most:
        raise ReceiptInvalid(f"it has more than {most} bytes")
    try:
        value = json.loads(text.decode("utf-8"), parse_float=_refuse, parse_constant=_refuse)
        _require_shallow(value, MOST_DEPTH)
        canonical = rfc8785.dumps(value)
    except (ValueError, RecursionError):  # Unicode and JSON errors, and those of rfc8785, are ValueErrors
        canonical = None
    if canonical != text:
        raise ReceiptInvalid("it is not canonical JSON: it was changed, or not saved as the server sent it")
    return value


def members(value: Any, what: str, *names: str, optional: str | None = None) -> Json:
    """An object with exactly these members."""
    if not isinstance(value, dict) or value.keys() - {optional} != set(names):
        raise ReceiptInvalid(f"{what} must have {', '.join(names)}, and nothing else")
    return value


def texts(value: Any, what: str, patterns: Mapping[str, str], *, only: bool = True) -> dict[str, str]:
    """An object whose members are strings of these patterns, and with `only` the only ones."""
    if only:
        members(value, what, *patterns)
    for name, pattern in patterns.items():
        text = value.get(name)
        if not isinstance(text, str) or not re.fullmatch(pattern, text):
            raise ReceiptInvalid(f"'{name}' of {what} is wrong")
    return value


def list_of(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ReceiptInvalid(f"{what} must be a list that is not empty")
    return value


def hashes_of(value: Any) -> list[bytes]:
    if not isinstance(value, list) or not all(isinstance(one, str) and re.fullmatch(HASH, one) for one in value):
        raise ReceiptInvalid("a list of hashes has something else")
    return [bytes.fromhex(one) for one in value]


def _require_shallow(value: Any, depth: int) -> None:
    """Raise `ValueError` for what is nested too deeply, or has a number that not every reader reads alike."""
    if depth < 0 or (type(value) is int and abs(value) > SAFE):
        raise ValueError
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_shallow(one, depth - 1)


def _refuse(_text: str) -> Any:
    raise ValueError
