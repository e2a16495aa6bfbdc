"""What must take part in a tenant's requests: by the catalogue always, by agreements for some purposes or for a time.

A requirement permits nothing, and like a prohibition it applies as soon as it touches what a request declares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from flexgate.policies.compiled.agreements import AssigneeAgreements, CompiledAgreement, by_start
from flexgate.policies.context import Context
from flexgate.policies.ids import ExpertId


class Requirement(NamedTuple):
    """The agreement by which an expert must take part now, and until when agreements go on to require it."""

    agreement: CompiledAgreement
    until: float


class Required(NamedTuple):
    """What must take part in a request.

    `experts` are all of them; `by_agreement` has those that an agreement requires now, and `coming` when agreements
    begin to require an expert that they do not require now.
    """

    experts: frozenset[ExpertId]
    by_agreement: Mapping[ExpertId, Requirement]
    coming: Mapping[ExpertId, float]


_BY_AGREEMENT: Final[Mapping[ExpertId, Requirement]] = MappingProxyType({})
_COMING: Final[Mapping[ExpertId, float]] = MappingProxyType({})


def required_of(
    always: frozenset[ExpertId], found: Sequence[AssigneeAgreements], context: Context, now: float
) -> Required:
    """What `always` must take part, and what the agreements in `found` require for a declared purpose and region."""
    if not any(of_one.required for of_one in found):
        return Required(always, _BY_AGREEMENT, _COMING)
    by_agreement: dict[ExpertId, Requirement] = {}
    coming: dict[ExpertId, float] = {}
    for expert in {expert for of_one in found for expert in of_one.required}:
        touching = [one for of_one in found for one in of_one.required.get(expert, ()) if context.touched_by(one)]
        in_force = [one for one in touching if one.starts <= now < one.ends]
        later = min((one.starts for one in touching if one.starts > now), default=math.inf)
        if in_force:
            first = min(in_force, key=lambda one: one.agreement_id)
            by_agreement[expert] = Requirement(first, _reach(touching, now))
        elif later < math.inf:
            coming[expert] = later
    return Required(always.union(by_agreement), by_agreement, coming)


def _reach(agreements: list[CompiledAgreement], now: float) -> float:
    """How far agreements reach from `now` without a gap."""
    until = now
    for one in sorted(agreements, key=by_start):
        if one.starts <= until < one.ends:
            until = one.ends
    return until
