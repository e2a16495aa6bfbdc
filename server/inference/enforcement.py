"""End running requests whose right to run has gone: their key, their project, the permission of an expert, or the
right to run without one.

A newer policy is compared with every running request before this process says that it enforces it, so that `wait=all`
covers the requests that began under an older one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol

from flexgate.policies.decide import decide
from flexgate.policies.decision import Decision, DecisionRequest
from flexgate.policies.errors import PolicyError
from flexgate.policies.ids import ExpertId, TenantId
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.withhold import Withholding
from flexgate.server.engine.protocol.endings import (
    EXPERT_REVOKED,
    KEY_EXPIRED,
    KEY_REVOKED,
    PERMISSION_ENDED,
    POLICY_UNAVAILABLE,
    PROJECT_ARCHIVED,
)
from flexgate.server.http.auth import Principal

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.calls import GatedCall
    from flexgate.server.engine.frontend.client import GatedEngineClient

END_SECONDS: Final = 0.5
"""How long the enforcement of a policy waits for ended requests to notice; none of them gets a token meanwhile."""

_Decisions = dict[tuple[object, ...], Decision | None]
"""By project and what a request asks for; None is a refusal."""
RevokedKeys = Literal["end", "finish"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Right:
    """The rights that a running request depends on, and the version of the policy that gave them."""

    call: GatedCall
    principal: Principal
    tenant: TenantId
    request: DecisionRequest
    policy_version: int


class NewestPolicy(Protocol):
    """The newest snapshot that was read, and what of it is withheld."""

    @property
    def stored(self) -> Snapshot | None: ...
    @property
    def withheld(self) -> tuple[Withholding, ...]: ...
    def without_withheld(self, stored: Snapshot) -> Snapshot: ...


class RunningRequests:
    """The requests that run in this process. Safe to use from several threads."""

    def __init__(
        self,
        client: GatedEngineClient,
        *,
        clock: Callable[[], float],
        policy: NewestPolicy,
        revoked_keys: RevokedKeys = "end",
    ) -> None:
        """`clock` gives Unix seconds; `policy` has what was read last, before it is enforced.

        `revoked_keys` says whether requests end with their key or may finish.
        """
        self._client = client
        self._policy = policy
        self._clock = clock
        self._ends_with_key = revoked_keys == "end"
        self._lock = threading.Lock()
        self._rights: dict[GatedCall, Right] = {}

    def begin(self, right: Right) -> None:
        """Watch a request from now on, and end it at once if its right has been taken away meanwhile."""
        with self._lock:
            self._rights[right.call] = right
        if self._ends_with_key and right.principal.expires is not None:
            self._client.end_at(right.call, right.principal.expires, KEY_EXPIRED)
        # Once the request is watched: what is read or withheld later is enforced on it.
        stored, withheld = self._policy.stored, self._policy.withheld
        if stored is not None and (withheld or stored.policy_version != right.policy_version):
            self._judge(right, self._policy.without_withheld(stored), {})

    def end(self, call: GatedCall) -> None:
        """Watch a request no longer."""
        with self._lock:
            self._rights.pop(call, None)

    def enforce(self, snapshot: Snapshot) -> None:
        """End requests that `snapshot` no longer permits, and wait up to `END_SECONDS` for their end. Blocks."""
        with self._lock:
            rights = tuple(self._rights.values())
        decisions: _Decisions = {}
        ended = [right.call for right in rights if self._ends(right, snapshot, decisions)]
        if ended:
            logger.info(
                "policy version %d: %d running requests lost their right and are ended",
                snapshot.policy_version,
                len(ended),
            )
            _wait_for(ended)

    def expire(self) -> None:
        """End every running request: the policy can no longer be confirmed."""
        with self._lock:
            calls = tuple(self._rights)
        running = [call for call in calls if call.failed is None]
        if running:
            logger.error("the policy database does not answer: %d running requests are ended", len(running))
        for call in running:
            self._client.stop(call, POLICY_UNAVAILABLE)

    def _ends(self, right: Right, snapshot: Snapshot, decisions: _Decisions) -> bool:
        """Judge a request; if that fails, stop it and go on with the others."""
        if right.call.failed is not None:  # it gets no more tokens; its client may read the end late
            return False
        try:
            return self._judge(right, snapshot, decisions)
        except Exception:
            logger.exception("a running request of project %s cannot be judged, and is ended", right.tenant)
            self._client.stop(right.call, PERMISSION_ENDED)
            return True

    def _judge(self, right: Right, snapshot: Snapshot, decisions: _Decisions) -> bool:
        """Stop a request that has lost its right, or bring its end forward."""
        reason = self._lost_identity(right, snapshot)
        if reason is None:
            decision = self._decide_as_it_runs(right, snapshot, decisions)
            reason = _lost_permission(right.call, snapshot, decision)
            if reason is None and decision is not None:
                self._client.end_at(right.call, decision.valid_until, PERMISSION_ENDED)
        if reason is None:
            return False
        self._client.stop(right.call, reason)
        return True

    def _decide_as_it_runs(self, right: Right, snapshot: Snapshot, decisions: _Decisions) -> Decision | None:
        """Decide again on a request without what it runs without, which may be permitted by now, or required."""
        decision = self._decide(right.tenant, right.request, snapshot, decisions)
        running = {ref.expert for ref in right.call.experts}
        further = () if decision is None else tuple(expert for expert in decision.allowed if expert not in running)
        if not further:
            return decision
        query = replace(right.request, ignore=(*right.request.ignore, *further))
        return self._decide(right.tenant, query, snapshot, decisions)

    def _decide(
        self, tenant: TenantId, query: DecisionRequest, snapshot: Snapshot, decisions: _Decisions
    ) -> Decision | None:
        question = (tenant, query.purpose, query.region, query.only, query.ignore)
        if question not in decisions:
            try:
                decisions[question] = decide(snapshot, tenant, query, self._clock())
            except PolicyError:
                decisions[question] = None
        return decisions[question]

    def _lost_identity(self, right: Right, snapshot: Snapshot) -> str | None:
        tenant, key = snapshot.tenants.get(right.tenant), snapshot.keys.get(right.principal.digest)
        if tenant is None or tenant.archived:
            return PROJECT_ARCHIVED
        if self._ends_with_key and (key is None or key.revoked is not None):
            return KEY_REVOKED
        return None


def _lost_permission(call: GatedCall, snapshot: Snapshot, decision: Decision | None) -> str | None:
    allowed = frozenset[ExpertId]() if decision is None else decision.allowed
    lost = [ref.expert for ref in call.experts if ref.expert not in allowed]
    if not lost:
        return None
    known = (snapshot.experts.get(ExpertId(expert)) for expert in lost)
    return EXPERT_REVOKED if any(e is not None and not e.live for e in known) else PERMISSION_ENDED


def _wait_for(calls: list[GatedCall]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and not all(call.ended.is_set() for call in calls):
            time.sleep(0.005)
