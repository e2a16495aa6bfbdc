"""From a request's JSON to what may go on: its honoured fields, its decision and its gate.

Nothing here knows vLLM. What leaves is a body that holds honoured fields only, so that what was
refused or ignored cannot reach a handler, and a decision that the engine's gates are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexgate.policies.cache import DecisionCache
from flexgate.policies.decision import Decision, DecisionRequest
from flexgate.policies.errors import PolicyError, VersionNotReached
from flexgate.policies.ids import TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.server.http.errors import Unavailable
from flexgate.server.http.refusals import from_decision
from flexgate.server.inference.request import extension, fields
from flexgate.server.inference.request.extension import Extension, parse_extension
from flexgate.server.inference.request.limits import Limits
from flexgate.server.policy.decision_samples import DecisionSamples
from flexgate.server.policy.live import PolicySource

CACHE_SALT = "cache_salt"


@dataclass(frozen=True, slots=True)
class Kind:
    """One endpoint's rules: which fields it has, and what they may hold."""

    name: str
    table: fields.Table
    check: Callable[[dict[str, Any], Limits], None]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may go on. `body` has honoured fields only, without ours and the salt."""

    body: dict[str, Any]
    snapshot: Snapshot
    decision: Decision
    client_salt: str | None
    explain: str
    request: DecisionRequest


def honoured_body(kind: Kind, raw: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The honoured fields of a body, within limits, and the extension as an `Extension`.

    Raises:
        Invalid: naming the field.
    """
    body = fields.keep_honoured(raw, kind.table)
    kind.check(body, limits)
    if extension.FIELD in body:
        body[extension.FIELD] = parse_extension(body[extension.FIELD])
    return body


async def admit(
    body: dict[str, Any],
    *,
    tenant: TenantId,
    decision_id: str,
    policy: PolicySource,
    cache: DecisionCache,
    samples: DecisionSamples,
    now: float,
) -> Admitted:
    """Decide which experts a request may use.

    Args:
        body: from `honoured_body`.
        now: Unix seconds.

    Raises:
        ApiError: the policy says no or cannot be asked.
    """
    left = dict(body)
    asked: Extension = left.pop(extension.FIELD, None) or Extension()
    client_salt = left.pop(CACHE_SALT, None)
    wanted = asked.decision_request(decision_id)
    try:
        snapshot = await _snapshot(policy, asked)
        decision = cache.decide(snapshot, tenant, wanted, now)
    except PolicyError as error:
        samples.add_refused(tenant, wanted, error, now)
        raise from_decision(error) from error
    samples.add(tenant, wanted, now)
    return Admitted(left, snapshot, decision, client_salt, asked.explain, wanted)


async def _snapshot(policy: PolicySource, asked: Extension) -> Snapshot:
    if asked.min_policy_version is None:
        return await policy.current()
    try:
        return await policy.at_least(asked.min_policy_version)
    except VersionNotReached as error:
        raise Unavailable(
            f"'flexgate.min_policy_version' asks for policy version {asked.min_policy_version}, and this server has "
            f"version {error.current}. Try again, or ask for a lower version.",
            code="policy_version_not_reached",
        ) from error
