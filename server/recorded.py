"""The questions that requests asked of the policy, of late, to be replayed against a proposal.

Only what a decision depends on is kept, once per distinct question, with a count: never a prompt.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from flexgate.policies.decision import DecisionRequest
from flexgate.policies.simulate import Replay
from flexgate.policies.terms import TenantId

MAX_QUESTIONS: Final = 10_000

_Key = tuple[TenantId, str | None, str | None, tuple[str, ...] | None, tuple[str, ...]]


class Recorded:
    """The newest distinct questions; the one that was asked longest ago makes way."""

    def __init__(self, max_questions: int = MAX_QUESTIONS) -> None:
        self._max = max_questions
        self._lock = threading.Lock()
        self._times: OrderedDict[_Key, int] = OrderedDict()

    def add(self, tenant_id: TenantId, request: DecisionRequest) -> None:
        """Note one decided request."""
        key = (tenant_id, request.purpose, request.region, request.only, request.ignore)
        with self._lock:
            self._times[key] = self._times.pop(key, 0) + 1
            if len(self._times) > self._max:
                self._times.popitem(last=False)

    def replays(self, now: float) -> list[Replay]:
        """Every question, as if it were asked at `now` (Unix seconds)."""
        with self._lock:
            asked = list(self._times.items())
        return [
            Replay(
                tenant_id,
                DecisionRequest(decision_id="simulate", purpose=purpose, region=region, only=only, ignore=ignore),
                now,
                times,
            )
            for (tenant_id, purpose, region, only, ignore), times in asked
        ]
