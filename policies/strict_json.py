"""Strict JSON: no object has a key twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def repeated_key(pairs: Iterable[tuple[str, Any]]) -> str | None:
    """The first repeated key, or None."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, as `object_pairs_hook`; raises `JSONDecodeError`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise json.JSONDecodeError(f"the key {str(repeated_key(pairs))[:80]!r} is given twice", "", 0)
    return found
