"""The `flexgate` object and the `x-flexgate-*` headers of an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Protocol

from flexgate.policies.agreements import ExpertId
from flexgate.policies.decision import Decision
from flexgate.policies.snapshot import Snapshot
from flexgate.server.http.refusals import reason_json
from flexgate.server.inference.attribution import share_ppm

METHOD: Final = "gate_mass/v1"


class Use(Protocol):
    """One expert's part in an answer."""

    @property
    def expert(self) -> str: ...
    @property
    def gate_mass(self) -> float: ...
    @property
    def tokens(self) -> int: ...


class GateViolated(Exception):
    """The engine reports that an expert outside the gate took part: the answer is withheld."""


def headers(decision: Decision, weights_epoch: int) -> dict[str, str]:
    """Headers for clients that drop unknown fields of a body."""
    return {
        "x-flexgate-experts": ",".join(decision.allowed),
        "x-flexgate-policy-version": str(decision.policy_version),
        "x-flexgate-weights-epoch": str(weights_epoch),
    }


def answer_object(
    decision: Decision,
    *,
    weights_epoch: int,
    explain: str,
    attribution: dict[str, Any] | None,
) -> dict[str, Any]:
    """What an answer says about its gate. `explain` of 'none' leaves the reasons out."""
    answer: dict[str, Any] = {
        "decision_id": decision.decision_id,
        "policy_version": decision.policy_version,
        "weights_epoch": weights_epoch,
        "allowed": list(decision.allowed),
    }
    if explain == "reasons":
        answer["excluded"] = [reason_json(reason) for reason in decision.excluded]
    if attribution is not None:
        answer["attribution"] = attribution
    return answer


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
            raise GateViolated("an expert outside the gate took part in an answer")
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
    return {
        "id": expert,
        "owner": snapshot.experts[expert].owner,
        "gate_mass": mass,
        "share_ppm": share,
        "tokens": 0 if use is None else use.tokens,
    }
