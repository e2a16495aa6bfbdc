"""Requests and tokens per minute, requests at once, and budgets: checked in memory, per process.

A request holds what it may use at most from its admission to its end, where it is settled for what
it really used. A project's limits and its key's both hold; nothing is counted of a request that one
of them refuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from flexgate.policies.tenants import Quota
from flexgate.server.errors import ApiError, Unavailable
from flexgate.server.quotas import refusals
from flexgate.server.quotas.refusals import Standing
from flexgate.server.quotas.spending import Spending
from flexgate.server.quotas.window import Use, Window

UNLIMITED: Final = Quota()


@dataclass(frozen=True, slots=True)
class Subject:
    """A project or a key, with its limits. `kind` is how it is spoken of."""

    id: str
    kind: str
    quota: Quota


@dataclass(slots=True)
class _State:
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: int = 0
    reserved: int = 0


class Hold:
    """What one admitted request holds. Settle it once, however the request ends."""

    def __init__(self, held: list[tuple[Subject, _State, Use | None]], reserved: int, limiter: Limiter) -> None:
        self._held = held
        self._reserved = reserved
        self._limiter = limiter
        self.headers: dict[str, str] = {}

    def settle(self, tokens: int) -> None:
        """Give back what was not used. A second call does nothing."""
        held, self._held = self._held, []
        for subject, state, use in held:
            self._limiter.settle(subject, state, use, self._reserved, tokens)


class Limiter:
    """Admits requests. Call it from the event loop alone."""

    def __init__(self, spending: Spending, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._spending = spending
        self._clock = clock
        self._states: dict[str, _State] = {}

    def admit(self, subjects: Iterable[Subject], reserve: int | None) -> Hold:
        """Hold one request and `reserve` tokens of every subject; raises `ApiError` (429).

        None is a request that uses no tokens: limits and budgets of tokens do not concern it.
        """
        limited = [subject for subject in subjects if subject.quota != UNLIMITED]
        now = self._clock()
        pairs = [(subject, self._states.setdefault(subject.id, _State())) for subject in limited]
        for subject, state in pairs:
            error = self._refusal(subject, state, reserve, now)
            if error is not None:
                error.headers |= refusals.headers(self._standings(pairs, now))
                raise error
        hold = Hold([(s, state, self._take(s, state, reserve, now)) for s, state in pairs], reserve or 0, self)
        hold.headers = refusals.headers(self._standings(pairs, now))
        return hold

    def settle(self, subject: Subject, state: _State, use: Use | None, reserved: int, tokens: int) -> None:
        """End one request of a subject."""
        now = self._clock()
        state.running -= 1
        state.reserved -= reserved
        if use is not None:
            if tokens > reserved:
                state.tokens.add(now, tokens - reserved)
            else:
                state.tokens.shrink(use, tokens, now)
        if subject.quota.total_tokens is not None and tokens:
            self._spending.add(subject.id, tokens)

    def _take(self, subject: Subject, state: _State, reserve: int | None, now: float) -> Use | None:
        state.running += 1
        state.reserved += reserve or 0
        if subject.quota.requests_per_minute is not None:
            state.requests.add(now, 1)
        if subject.quota.tokens_per_minute is None or reserve is None:
            return None
        return state.tokens.add(now, reserve)

    def _refusal(self, subject: Subject, state: _State, reserve: int | None, now: float) -> ApiError | None:
        quota = subject.quota
        if quota.total_tokens is not None and reserve is not None:
            spent = self._spending.spent(subject.id)
            if spent is None:
                return Unavailable("The used tokens are not known yet. Try again.", code="budget_unknown")
            if spent + state.reserved + max(reserve, 1) > quota.total_tokens:
                return refusals.over_budget(subject.kind, quota.total_tokens, spent + state.reserved, reserve)
        if quota.concurrent_requests is not None and state.running >= quota.concurrent_requests:
            return refusals.too_many_at_once(subject.kind, quota.concurrent_requests)
        if quota.requests_per_minute is not None:
            wait = state.requests.wait(quota.requests_per_minute, 1, now)
            if wait:
                return refusals.too_many_requests(subject.kind, quota.requests_per_minute, wait)
        if quota.tokens_per_minute is not None and reserve is not None:
            wait = state.tokens.wait(quota.tokens_per_minute, max(reserve, 1), now)
            if wait:
                return refusals.too_many_tokens(subject.kind, quota.tokens_per_minute, reserve, wait)
        return None

    def _standings(self, pairs: list[tuple[Subject, _State]], now: float) -> list[Standing]:
        found = []
        for subject, state in pairs:
            for what, limit, window in (
                ("requests", subject.quota.requests_per_minute, state.requests),
                ("tokens", subject.quota.tokens_per_minute, state.tokens),
            ):
                if limit is not None:
                    used = window.used(now)
                    found.append(Standing(what, limit, max(0, limit - used), window.wait(limit, limit, now)))
        return found
