"""Which experts took part in a response: gate mass, tokens, and shares in whole parts per million."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Final, Protocol

from flexgate.policies.decision import Decision
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot

PPM: Final = 1_000_000


def share_ppm(masses: Sequence[float]) -> list[int]:
    """Each mass as its share of the total, by largest remainder, ties to the earlier.

    All zero when the total is zero. A mass of zero always has a share of zero.

    Raises:
        ValueError: a mass is negative, infinite or not a number.
    """
    if any(not math.isfinite(mass) or mass < 0 for mass in masses):
        raise ValueError("gate masses must be finite and not negative")
    exact = [Fraction(mass) for mass in masses]
    total = sum(exact)
    if total == 0:
        return [0] * len(exact)
    ideal = [mass * PPM / total for mass in exact]
    shares = [int(share) for share in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (shares[i] - ideal[i], i))
    for i in by_remainder[: PPM - sum(shares)]:
        shares[i] += 1
    return shares


METHOD: Final = "gate_mass/v1"


class Use(Protocol):
    """One expert's part in a response."""

    @property
    def expert(self) -> str: ...
    @property
    def gate_mass(self) -> float: ...
    @property
    def tokens(self) -> int: ...


class GateViolated(Exception):
    """The engine reports that an expert outside the gate took part: the response is withheld."""


def attribution_object(
    snapshot: Snapshot, decision: Decision, uses: Iterable[Use], cached_prompt_tokens: int
) -> dict[str, Any]:
    """Every listed expert's part, the largest first, then in catalogue order; excluded ones with exact zeros.

    Raises:
        GateViolated: an expert outside the gate has mass or tokens.
    """
    by_expert = {use.expert: use for use in uses}
    for use in by_expert.values():
        if use.expert not in decision.allowed and (use.gate_mass or use.tokens):
            raise GateViolated("an expert outside the gate took part in a response")
    listed = {*decision.allowed, *(reason.expert for reason in decision.excluded)}
    experts = [expert for expert in snapshot.experts if expert in listed]
    masses = [by_expert[e].gate_mass if e in by_expert else 0.0 for e in experts]
    parts = [
        _part(snapshot, expert, by_expert.get(expert), mass, share)
        for expert, mass, share in zip(experts, masses, share_ppm(masses), strict=True)
    ]
    parts.sort(key=lambda part: -part["gate_mass"])
    return {"method": METHOD, "cached_prompt_tokens": cached_prompt_tokens, "experts": parts}


def _part(snapshot: Snapshot, expert: ExpertId, use: Use | None, mass: float, share: int) -> dict[str, Any]:
    document = snapshot.experts[expert]
    return {
        "id": expert,
        "owner": document.owner,
        "grade": document.grade,
        "gate_mass": mass,
        "share_ppm": share,
        "tokens": 0 if use is None else use.tokens,
    }
