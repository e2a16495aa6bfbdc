"""Requests and tokens per minute, requests at once, and budgets: checked in memory, per process.

A request reserves what it may use at most, and commits at its end what it really used. A project's limits and its
key's both hold. A request that one of them refuses counts as a request of the minute if that came to light once its
prompts were tokens, and in no budget.

    reserve(scopes, amounts) ──> Reservation ── left(…) ── raise_to(tokens=…) ──> commit(amounts)

Budgets of a day or month are of tokens, of requests, or of money: what is owed to owners by agreements.

A kind of limit is one `Rule`: the quota's field, the unit it counts, its counter, and how it refuses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final
from weakref import WeakValueDictionary

from flexgate.policies.compiled.compiler import TenantRules
from flexgate.policies.documents import Cost, Quota
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.limits import refusals
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.counters import Budget, Counter, InFlight, PeriodBudget, SlidingWindow
from flexgate.server.inference.limits.refusals import Refused, Standing
from flexgate.server.ledger.statements import PeriodKind

UNLIMITED: Final = Quota()
REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
COST: Final = "cost"
"""In billionths of the budget's currency."""
PERIODS: Final[tuple[PeriodKind, ...]] = ("month", "day")
KEPT_COUNTERS: Final = 1_024
"""Of limits and scopes; beyond, those of which nothing is in use are forgotten."""
_STATED: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")

Amounts = Mapping[str, int]
"""How much of each unit. A limit of another unit does not count."""


@dataclass(frozen=True, slots=True)
class LimitScope:
    """A project or a key, with its limits. `kind` is how refusals name it."""

    id: str
    kind: str
    quota: Quota


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of limit. `shown` limits appear in the `x-ratelimit-*` headers; a `budget` gives nothing back soon."""

    field: str
    unit: str
    counter: Callable[[str], Counter]
    refuse: Callable[[Refused], ApiError]
    shown: bool = True
    budget: bool = False


def default_rules(usage: BudgetUsage, wall_clock: Callable[[], float]) -> tuple[Rule, ...]:
    """The limits that a quota has, in the order in which they refuse; `wall_clock` gives Unix seconds."""

    def each(unit: str, kind: PeriodKind, suffix: str = "") -> Rule:
        return Rule(
            f"{unit}_per_{kind}",
            unit,
            lambda scope: PeriodBudget(usage, scope + suffix, kind, wall_clock),
            partial(refusals.over_period, unit, kind),
            shown=False,
            budget=True,
        )

    return (
        Rule(
            "total_tokens",
            TOKENS,
            lambda scope: Budget(usage, scope),
            refusals.over_budget,
            shown=False,
            budget=True,
        ),
        *(each(TOKENS, kind) for kind in PERIODS),
        *(each(REQUESTS, kind, "/n") for kind in PERIODS),
        *(each(COST, kind) for kind in PERIODS),
        Rule("concurrent_requests", REQUESTS, lambda _: InFlight(), refusals.too_many_at_once, shown=False),
        Rule("requests_per_minute", REQUESTS, lambda _: SlidingWindow(), refusals.too_many_requests),
        Rule("tokens_per_minute", TOKENS, lambda _: SlidingWindow(), refusals.too_many_tokens),
    )


@dataclass(slots=True)
class _Line:
    """One limit that holds for a request, and what the request has reserved of it."""

    scope: LimitScope
    rule: Rule
    limit: int
    counter: Counter
    currency: str = ""
    amount: int = 0
    part: Any = None

    def has_less(self, amount: int | None) -> bool:
        """Whether less than `amount`, or nothing yet, is reserved; without an amount there is nothing to reserve."""
        return amount is not None and (self.part is None or self.amount < amount)

    def check(self, more: int, now: float) -> None:
        """Raise the limit's refusal where `more` does not fit. Nothing fits once a limit is used up."""
        fits = self.amount + more <= self.limit  # some time, where nothing else is reserved
        wait = self.counter.wait(self.limit, max(more, 1), now) if fits else math.inf
        if wait:
            used = self.counter.used(now) - self.amount
            raise self.rule.refuse(Refused(self.scope.kind, self.limit, used, self.amount + more, wait, self.currency))

    def reserve(self, amount: int, now: float) -> None:
        """Reserve `amount` instead of what is reserved."""
        if self.part is not None:
            self.counter.commit(self.part, 0, now)
        self.amount = amount
        self.part = self.counter.reserve(amount, now)


class Reservation:
    """One request's reservation. Commit it once, however the request ends."""

    __slots__ = ("_clock", "_lines", "_shown")

    def __init__(self, lines: list[_Line], shown: Sequence[_Line], clock: Callable[[], float]) -> None:
        """`shown` are all limits that hold for the request, also those that do not count it."""
        self._lines = lines
        self._shown = shown
        self._clock = clock

    @property
    def headers(self) -> dict[str, str]:
        """The `x-ratelimit-*` headers: how the limits stand now, with what this request has reserved or used."""
        return refusals.headers(_standings(self._shown, self._clock()))

    def left(self, unit: str) -> float:
        """How much of a unit the request may reserve in all, by budgets alone: other limits have room again soon."""
        now = self._clock()
        lines = (line for line in self._lines if line.rule.budget and line.rule.unit == unit)
        return min((line.limit - line.counter.used(now) + line.amount for line in lines), default=math.inf)

    def raise_to(self, **amounts: int) -> None:
        """Reserve so much of each unit in all, where less is reserved; raises `ApiError` (429)."""
        now = self._clock()
        lines = [line for line in self._lines if line.has_less(amounts.get(line.rule.unit))]
        with _with_headers(self._shown, now):
            for line in lines:
                line.check(amounts[line.rule.unit] - line.amount, now)
        for line in lines:
            line.reserve(amounts[line.rule.unit], now)

    def commit(self, amounts: Amounts, *, served: bool = True) -> None:
        """Count what was used and release the rest, once; a unit that is not named was used as reserved.

        Args:
            served: whether anything was computed for the request; else it is none in budgets of requests.
        """
        lines, self._lines = self._lines, []
        now = self._clock()
        for line in lines:
            counts = served or not (line.rule.budget and line.rule.unit == REQUESTS)
            line.counter.commit(line.part, amounts.get(line.rule.unit, line.amount) if counts else 0, now)


class Limiter:
    """Reserves for requests. Call it from the event loop alone."""

    def __init__(
        self,
        usage: BudgetUsage,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rules: Sequence[Rule] | None = None,
    ) -> None:
        self._clock = clock
        self._rules = default_rules(usage, wall_clock) if rules is None else tuple(rules)
        self._counters: dict[tuple[str, str], Counter] = {}
        self._held: WeakValueDictionary[tuple[str, str], Counter] = WeakValueDictionary()  # with those of requests

    def reserve(self, scopes: Iterable[LimitScope], amounts: Amounts) -> Reservation:
        """Reserve `amounts` within every scope's limits; raises `ApiError` (429)."""
        lines = list(self._lines(scopes, self._counter))
        concerned = [line for line in lines if line.rule.unit in amounts]
        reservation = Reservation(concerned, lines, self._clock)
        reservation.raise_to(**amounts)
        return reservation

    def count(self, scopes: Iterable[LimitScope], amounts: Amounts, costs: Amounts) -> None:
        """Count what was used without a reservation, in budgets alone; `costs` are by currency, in billionths.

        No counter is kept, or asked what is used: this also works before the store was read.
        """
        now = self._clock()
        for line in self._lines(scopes, lambda scope, rule: rule.counter(scope)):
            used = costs.get(line.currency, 0) if line.currency else amounts[line.rule.unit]
            if line.rule.budget:
                line.counter.commit(line.counter.reserve(0, now), used, now)

    def _lines(self, scopes: Iterable[LimitScope], counter: Callable[[str, Rule], Counter]) -> Iterator[_Line]:
        for scope in scopes:
            if scope.quota is UNLIMITED:
                continue
            for rule in self._rules:
                limit = getattr(scope.quota, rule.field)
                if isinstance(limit, Cost):
                    of_currency = counter(f"{scope.id}/{limit.currency}", rule)
                    yield _Line(scope, rule, limit.billionths, of_currency, limit.currency)
                elif limit is not None:
                    yield _Line(scope, rule, limit, counter(scope.id, rule))

    def _counter(self, scope: str, rule: Rule) -> Counter:
        key = (scope, rule.field)
        counter = self._counters.pop(key, None)
        if counter is None:
            self._forget_idle()
            counter = self._held.get(key)  # forgotten, but a running request has it, and may reserve more
        if counter is None:
            counter = self._held[key] = rule.counter(scope)
        self._counters[key] = counter  # behind all others: none is forgotten while its request reserves
        return counter

    def _forget_idle(self) -> None:
        """Look at the two counters that were not used for longest, and forget those of which nothing is in use."""
        now = self._clock()
        for key in list(islice(self._counters, 2 if len(self._counters) >= KEPT_COUNTERS else 0)):
            counter = self._counters.pop(key)
            if counter.reset(now):
                self._counters[key] = counter


def scopes_of(tenant: TenantRules, key_id: str) -> tuple[LimitScope, LimitScope]:
    """The project and the key."""
    key_quota = tenant.key_quotas.get(key_id, UNLIMITED)
    return LimitScope(tenant.id, "This project", tenant.quota), LimitScope(key_id, "This key", key_quota)


def limit_cost(scopes: Iterable[LimitScope]) -> bool:
    """Whether any of them has a budget of money."""
    return any(scope.quota.cost_per_day is not None or scope.quota.cost_per_month is not None for scope in scopes)


def stated_length(body: Mapping[str, Any]) -> int | None:
    """New tokens of a choice that a request asks for at most; None where it says nothing."""
    return next((body[name] for name in _STATED if body.get(name) is not None), None)


def stated_tokens(body: Mapping[str, Any]) -> int:
    """New tokens that a request says it asks for at most; 0 where it says nothing.

    What it can use is known once its prompts are tokens: `Reservation.raise_to` reserves that.
    """
    return int((stated_length(body) or 0) * body.get("n", 1) * len(body.get("prompt", (None,))))


@contextmanager
def _with_headers(lines: Sequence[_Line], now: float) -> Iterator[None]:
    """Give a refusal the headers that say how the limits stand."""
    try:
        yield
    except ApiError as error:
        error.headers |= refusals.headers(_standings(lines, now))
        raise


def _standings(lines: Iterable[_Line], now: float) -> list[Standing]:
    found = []
    for line in lines:
        if line.rule.shown:
            remaining = max(0, line.limit - line.counter.used(now))
            found.append(Standing(line.rule.unit, line.limit, remaining, line.counter.reset(now)))
    return found
