"""What a request's gate left out, with the grade of its exclusion, as the ledger keeps it.

A catalogue is written once: every expert with what excluding it excludes. A request has one character for each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Final

import msgspec

ALLOWED: Final = "0"
LISTED: Final = "1"
"""Left out, and shown to the tenant as excluded."""
HIDDEN: Final = "2"
"""Left out, and for the tenant it does not exist."""
Grades = Sequence[tuple[str, str]]
"""Experts, each with its grade."""


@lru_cache(maxsize=4)
def catalogue_of(grades: tuple[tuple[str, str], ...]) -> str:
    """A catalogue as it is written."""
    return msgspec.json.encode(grades).decode()


def marks_of(experts: Iterable[str], allowed: Collection[str], listed: Iterable[str]) -> str:
    """What became of each expert of a catalogue. `listed` are those that the tenant is shown as excluded."""
    marks = dict.fromkeys(experts, HIDDEN)
    marks |= dict.fromkeys(listed, LISTED)
    marks |= dict.fromkeys(allowed, ALLOWED)
    return "".join(marks.values())


def excluded_of(catalogue: str, marks: str) -> tuple[Grades, Grades]:
    """What was left out: the experts that the tenant is shown, and those that are hidden from it."""
    grades = msgspec.json.decode(catalogue, type=list[tuple[str, str]])
    both = list(zip(grades, marks, strict=False))  # a row that was changed is found by its receipt
    listed, hidden = ([one for one, mark in both if mark == kind] for kind in (LISTED, HIDDEN))
    return listed, hidden
