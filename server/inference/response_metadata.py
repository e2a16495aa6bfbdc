"""The `flexgate` object and the `x-flexgate-*` headers of a response."""

from __future__ import annotations

from typing import Any

from flexgate.policies.decision import Decision
from flexgate.server.http.refusals import reason_json


def headers(decision: Decision, weights_epoch: int) -> dict[str, str]:
    """Headers for clients that drop unknown fields of a body, and before a stream who is to be credited.

    `x-flexgate-credits` has the owners whose agreements demand a credit, and whose experts may take part.
    """
    credited = dict.fromkeys(one.owner for one in decision.agreements if one is not None and one.credit is not None)
    return {
        "x-flexgate-experts": ",".join(decision.allowed),
        **({"x-flexgate-credits": ",".join(credited)} if credited else {}),
        "x-flexgate-policy-version": str(decision.policy_version),
        "x-flexgate-weights-epoch": str(weights_epoch),
    }


def metadata(
    decision: Decision,
    *,
    weights_epoch: int,
    explain: str,
    attribution: dict[str, Any] | None,
    credits: list[dict[str, Any]],
    max_tokens: int | None,
) -> dict[str, Any]:
    """What a response says about its gate. `explain` of 'none' leaves the reasons out, and never the credits.

    `max_tokens` is the length that a budget cut the response to, if it did.
    """
    content: dict[str, Any] = {
        "decision_id": decision.decision_id,
        "policy_version": decision.policy_version,
        "weights_epoch": weights_epoch,
        "allowed": list(decision.allowed),
    }
    if max_tokens is not None:
        content["max_tokens"] = max_tokens
    if credits:
        content["credits"] = credits
    if explain != "none":
        content["excluded"] = [reason_json(reason) for reason in decision.excluded]
    if attribution is not None:
        content["attribution"] = attribution
    return content
