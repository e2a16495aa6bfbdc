"""Which experts took part in a response: gate mass, tokens, and shares in whole parts per million."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from flexgate.policies.decision import Decision
from flexgate.policies.ids import ExpertId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.inference.counterfactual import Counterfactual
from flexgate.server.ledger.shares import share_ppm

METHOD: Final = "gate_mass/v1"


class Use(Protocol):
    """One expert's part in a response."""

    @property
    def expert(self) -> str: ...
    @property
    def mass(self) -> int: ...
    @property
    def gate_mass(self) -> float: ...
    @property
    def tokens(self) -> int: ...


class GateViolated(Exception):
    """The engine reports that an expert outside the gate took part: the response is withheld."""


def attribution_object(
    snapshot: Snapshot,
    decision: Decision,
    uses: Iterable[Use],
    cached_prompt_tokens: int,
    counterfactual: Counterfactual | None = None,
    *,
    ungated: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Every listed expert's part, the largest first, then in catalogue order; excluded ones with exact zeros.

    With a counterfactual, each part says by how much the response is likelier with its expert; null of one that took no
    part or cannot be left out.

    Args:
        ungated: what every token passes in the model, outside of the gate and of all shares.

    Raises:
        GateViolated: an expert outside the gate has mass or tokens.
    """
    by_expert = {use.expert: use for use in uses}
    for use in by_expert.values():
        if use.expert not in decision.allowed and (use.mass or use.tokens):
            raise GateViolated("an expert outside the gate took part in a response")
    listed = {*decision.allowed, *(reason.expert for reason in decision.excluded)}
    experts = [expert for expert in snapshot.experts if expert in listed]
    shares = share_ppm([by_expert[e].mass if e in by_expert else 0 for e in experts])
    parts = [
        _part(snapshot, expert, by_expert.get(expert), share) for expert, share in zip(experts, shares, strict=True)
    ]
    parts.sort(key=lambda part: -part["gate_mass"])
    content: dict[str, Any] = {"method": METHOD, "cached_prompt_tokens": cached_prompt_tokens, "experts": parts}
    content |= ungated
    if counterfactual is not None:
        for part in parts:
            part["delta_logprob"] = counterfactual.delta_logprob.get(part["id"])
        passes, tokens = counterfactual.passes, counterfactual.tokens
        content["counterfactual"] = {"logprob": counterfactual.logprob, "passes": passes, "tokens": tokens}
    return content


def credits_of(decision: Decision, uses: Iterable[Use]) -> list[dict[str, Any]]:
    """The credit lines that agreements demand for the experts that took part, in the order of the catalogue."""
    used = {use.expert for use in uses if use.mass or use.tokens}
    experts: dict[tuple[str, str], list[str]] = {}
    for expert, agreement in zip(decision.allowed, decision.agreements, strict=True):
        if agreement is not None and agreement.credit is not None and expert in used:
            experts.setdefault((agreement.owner, agreement.credit), []).append(expert)
    return [{"owner": owner, "credit": credit, "experts": names} for (owner, credit), names in experts.items()]


def _part(snapshot: Snapshot, expert: ExpertId, use: Use | None, share: int) -> dict[str, Any]:
    document = snapshot.experts[expert]
    return {
        "id": expert,
        "owner": document.owner,
        "grade": document.grade,
        "gate_mass": 0.0 if use is None else use.gate_mass,
        "share_ppm": share,
        "tokens": 0 if use is None else use.tokens,
    }
