"""Whose an expert was, and when: from the history of the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flexgate.policies.store.database import reading
from flexgate.policies.store.revisions import read_between
from flexgate.policies.store.store import Store

_EXPERT: Final = "expert"


@dataclass(frozen=True, slots=True)
class Ownership:
    """The times, half-open and in Unix seconds, in which each expert was one owner's."""

    times: Mapping[str, tuple[tuple[float, float], ...]]

    def had(self, expert: str, since: float, until: float) -> bool:
        """Whether the expert was the owner's at both times and between them."""
        return any(start <= since and until < end for start, end in self.times.get(expert, ()))


def read_ownership(store: Store, owner_id: str) -> Ownership:
    """Which experts an owner has and had."""
    began: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    with reading(store.engine) as connection:
        changes = read_between(connection, _EXPERT, -math.inf, math.inf)
    for at, change in changes:
        expert, owned = change.object_id, change.after is not None and change.after["owner"] == owner_id
        if owned:
            began.setdefault(expert, at)
        elif expert in began:
            times.setdefault(expert, []).append((began.pop(expert), at))
    for expert, at in began.items():
        times.setdefault(expert, []).append((at, math.inf))
    return Ownership({expert: tuple(of_one) for expert, of_one in times.items()})
