"""Budgets of money: what a request may cost is reserved, and what it did cost is what the ledger says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from clocks import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgate.policies.agreements import Agreement
from flexgate.policies.compiled.agreements import CompiledAgreement, compile_agreement
from flexgate.policies.decision import Decision, allow
from flexgate.policies.documents import BILLION, Cost, Quota
from flexgate.policies.ids import ExpertId, TenantId
from flexgate.policies.store import Store, budgets
from flexgate.server.http.errors import ApiError
from flexgate.server.inference.limits.budget_usage import BudgetUsage
from flexgate.server.inference.limits.cost import cost_of, price_of
from flexgate.server.inference.limits.limiter import COST, REQUESTS, TOKENS, Limiter, LimitScope
from flexgate.server.ledger.amounts import Uses, owed
from flexgate.server.ledger.entries import Part
from flexgate.server.ledger.shares import share_ppm

UNITS = (
    "request",
    "thousand_tokens",
    "thousand_share_weighted_tokens",
    "million_tokens",
    "million_share_weighted_tokens",
)
EUR = Cost.model_validate({"amount": "1", "currency": "EUR"})


def agreement(expert: str, duties: Sequence[tuple[str, str]], currency: str = "EUR") -> CompiledAgreement:
    """An agreement on one expert; `duties` are rates with their units."""
    return compile_agreement(
        Agreement.model_validate(
            {
                "id": f"a-{expert}",
                "owner": "o",
                "experts": [expert],
                "assignee": "everyone",
                "effect": "permit",
                "duties": [
                    {"kind": "compensate", "rate": rate, "currency": currency, "unit": unit} for rate, unit in duties
                ],
            }
        )
    )


def decision(agreements: Sequence[CompiledAgreement | None], *required: str) -> Decision:
    experts = allow([ExpertId(f"e{number}") for number in range(len(agreements))])
    return Decision(
        decision_id="dec_1",
        tenant_id=TenantId("t"),
        policy_version=1,
        allowed=experts,
        agreements=tuple(agreements),
        required=frozenset(map(ExpertId, required)),
        excluded=(),
        valid_until=9e9,
        purpose=None,
        region=None,
    )


def scope(**quota: Any) -> LimitScope:
    return LimitScope("t", "This project", Quota(**quota))


def parts(masses: Sequence[int], positions: Sequence[int]) -> list[Part]:
    """What experts did, each with its share."""
    return [
        Part(f"e{number}", "o", mass, position, 0, 0, f"a-e{number}", 1, None, share, None)
        for number, (mass, position, share) in enumerate(zip(masses, positions, share_ppm(masses), strict=True))
    ]


RATES = st.decimals(0, 999, places=9).map(lambda rate: f"{rate:f}")
DUTIES = st.lists(st.tuples(RATES, st.sampled_from(UNITS)), max_size=3, unique_by=lambda duty: duty[1])


@given(st.lists(DUTIES, min_size=1, max_size=4), st.integers(1, 5_000), st.data())
def test_no_request_costs_more_than_what_is_reserved_for_it_or_less_than_what_is_owed(
    duties: list[list[tuple[str, str]]], tokens: int, data: Any
) -> None:
    agreements = [agreement(f"e{number}", of) if of else None for number, of in enumerate(duties)]
    decided = decision(agreements)
    masses = [data.draw(st.integers(0, 2**40)) for _ in agreements]
    did = parts(masses, [data.draw(st.integers(0, tokens)) if mass else 0 for mass in masses])
    exactly = Fraction()
    for part, one in zip(did, agreements, strict=True):
        took_part = part.prompt_mass or part.prompt_positions
        uses = Uses(1, part.prompt_positions, part.share_ppm * tokens)
        found = owed(one.duties, uses) if one is not None and took_part else None
        exactly += Fraction() if found is None else found[0]
    did = [part for part in did if part.prompt_mass or part.prompt_positions]
    price, cost = price_of(decided, [scope(cost_per_day=EUR)]), cost_of(decided, [(did, tokens)])
    most = 0 if price is None else price.most(tokens)
    assert cost <= most
    assert 0 <= cost - exactly * BILLION < 1


@given(DUTIES, st.integers(0, 10**13), st.integers(1, 2))
def test_as_many_tokens_fit_into_a_budget_as_are_reserved_of_it(
    duties: list[tuple[str, str]], billionths: int, entries: int
) -> None:
    price = price_of(decision([agreement("e0", duties)]), [scope(cost_per_day=EUR)])
    if price is None:
        return
    tokens = price.tokens(billionths, entries=entries)
    if tokens == math.inf:
        assert price.per_token == 0
    else:
        assert tokens < 0 or price.most(int(tokens), entries=entries) <= billionths
        assert price.most(int(tokens) + 1, entries=entries) > billionths


def test_without_paid_agreements_there_is_no_price() -> None:
    free = agreement("e1", [("0", "request")])
    assert price_of(decision([None, free]), [scope(cost_per_day=EUR)]) is None


def test_a_budget_in_another_currency_than_an_expert_is_paid_in_refuses_it_by_name() -> None:
    decided = decision([agreement("e0", [("1", "request")]), agreement("e1", [("1", "request")], "USD")])
    with pytest.raises(ApiError) as caught:
        price_of(decided, [scope(cost_per_month=EUR)])
    assert (caught.value.status, caught.value.code) == (403, "budget_currency")
    assert str(caught.value) == (
        "This project's budget is in EUR, and the expert 'e1' is paid in USD. Leave it out ('flexgate': {'experts': "
        "{'ignore': ['e1']}}), or ask an administrator for a budget in USD."
    )


def test_no_one_is_asked_to_leave_out_an_expert_that_is_required() -> None:
    decided = decision([agreement("e0", [("1", "request")], "USD")], "e0")
    with pytest.raises(ApiError) as caught:
        price_of(decided, [scope(cost_per_month=EUR)])
    assert str(caught.value) == (
        "This project's budget is in EUR, and the expert 'e0' is paid in USD. Ask an administrator for a budget in USD."
    )


def test_what_is_free_in_another_currency_is_free() -> None:
    free = agreement("e0", [("0", "request")], "USD")
    assert price_of(decision([free]), [scope(cost_per_day=EUR)]) is None


def test_a_quota_has_one_currency() -> None:
    dollars = Cost.model_validate({"amount": "1", "currency": "USD"})
    with pytest.raises(ValueError, match="cost_per_day is in EUR and cost_per_month in USD: use one currency for both"):
        Quota(cost_per_day=EUR, cost_per_month=dollars)


def test_a_budget_of_money_is_exact_and_says_what_a_request_may_cost(real_store: Store, clock: Clock) -> None:
    usage = BudgetUsage(real_store)
    usage.refresh()
    limiter = Limiter(usage, clock=clock, wall_clock=clock)
    clock.now = 1_793_491_200.0 - 60  # of October 2026, in UTC
    t = scope(cost_per_day=Cost.model_validate({"amount": "0.30", "currency": "EUR"}))
    for _ in range(3):  # in doubles, three times 0.1 is more than 0.3
        limiter.reserve([t], {REQUESTS: 1, TOKENS: 9, COST: BILLION // 10}).commit({TOKENS: 1})
    with pytest.raises(ApiError) as caught:
        limiter.reserve([t], {REQUESTS: 1, TOKENS: 9, COST: 1})
    assert (caught.value.status, caught.value.code) == (429, "insufficient_quota")
    assert str(caught.value) == (
        "This project has nothing left of its budget of 0.3 EUR per day: all of it is used, or reserved by running "
        "requests. A new day begins, in UTC, in 1m0s. Ask an administrator to raise the budget."
    )
    limiter.reserve([t], {REQUESTS: 1, TOKENS: 9})  # one that costs nothing
    usage.refresh()
    assert budgets.read_use(real_store.engine).used == {"t/EUR@2026-10-31": 3 * BILLION // 10}
    clock.now += 60
    limiter.reserve([t], {REQUESTS: 1, COST: BILLION // 10})


@pytest.mark.parametrize("kind", ["day", "month"])
def test_requests_of_a_day_or_month_are_limited_in_utc(real_store: Store, clock: Clock, kind: str) -> None:
    usage = BudgetUsage(real_store)
    usage.refresh()
    limiter = Limiter(usage, clock=clock, wall_clock=clock)
    clock.now = 1_793_491_200.0 - 60
    t = scope(**{f"requests_per_{kind}": 2, f"tokens_per_{kind}": 100})
    for _ in range(2):
        limiter.reserve([t], {REQUESTS: 1, TOKENS: 9}).commit({TOKENS: 7})
    with pytest.raises(ApiError) as caught:
        limiter.reserve([t], {REQUESTS: 1, TOKENS: 9})
    assert str(caught.value) == (
        f"This project has nothing left of its budget of 2 requests per {kind}: all of it is used, or reserved by "
        f"running requests. A new {kind} begins, in UTC, in 1m0s. Ask an administrator to raise the budget."
    )
    usage.refresh()
    period = "2026-10-31" if kind == "day" else "2026-10"
    assert budgets.read_use(real_store.engine).used == {f"t/n@{period}": 2, f"t@{period}": 14}
    clock.now += 60
    limiter.reserve([t], {REQUESTS: 1, TOKENS: 9})


class Used:
    """What is committed, without a store; the limits' own memory alone is under test."""

    def __init__(self) -> None:
        self.by_scope: dict[str, int] = {}
        self.running: dict[str, int] = {}

    def committed(self, scope: str) -> int:
        return self.by_scope.get(scope, 0)

    def unwritable(self) -> bool:
        return False

    def reserved(self, scope: str) -> int:
        return self.running.get(scope, 0)

    def reserve(self, scope: str, tokens: int) -> None:
        self.running[scope] = self.running.get(scope, 0) + tokens

    def commit(self, scope: str, tokens: int, reserved_in: str, reserved: int) -> None:
        self.by_scope[scope] = self.by_scope.get(scope, 0) + tokens
        self.reserve(reserved_in, -reserved)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 40)),
        st.tuples(st.just("raise"), st.integers(0, 9), st.integers(0, 60)),
        st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 100)),
        st.tuples(st.just("pass"), st.sampled_from([1, 40_000, 86_400, 90_000])),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(STEPS, st.integers(0, 100), st.integers(0, 5), st.integers(0, 200))
def test_whatever_runs_at_once_no_period_uses_more_than_its_budget(
    steps: list[tuple[Any, ...]], cost: int, requests: int, month: int
) -> None:
    now, usage = Clock(1_793_404_800.0), Used()
    limiter = Limiter(usage, clock=now, wall_clock=now)  # type: ignore[arg-type]
    billionth = lambda value: Cost.model_validate({"amount": f"0.{value:09d}", "currency": "EUR"})  # noqa: E731
    t = scope(cost_per_day=billionth(cost), cost_per_month=billionth(month), requests_per_day=requests)
    running: list[tuple[Any, int]] = []
    for what, *values in steps:
        if what == "begin":
            taken = sum(amount for _, amount in running) + max(values[0], 1)
            day, of_month = _used(usage, now.now)
            counted = usage.committed(f"t/n@{_day(now.now)}") + len(running)
            fits = day + taken <= cost and of_month + taken <= month and counted < requests
            try:
                running.append((limiter.reserve([t], {REQUESTS: 1, COST: values[0]}), values[0]))
            except ApiError:
                assert not fits
                continue
            assert fits
        elif what == "raise" and running:
            place = values[0] % len(running)
            reservation, amount = running[place]
            try:
                reservation.raise_to(cost=values[1])
                running[place] = reservation, max(amount, values[1])
            except ApiError:
                pass
        elif what == "end" and running:
            reservation, amount = running.pop(values[0] % len(running))
            reservation.commit({COST: amount * values[1] // 100})
        elif what == "pass":
            now.now += values[0]
        used = usage.by_scope
        assert all(value <= cost for name, value in used.items() if name.startswith("t/EUR@") and len(name) > 14)
        assert all(value <= month for name, value in used.items() if name.startswith("t/EUR@") and len(name) < 14)
        assert all(value <= requests for name, value in used.items() if name.startswith("t/n@"))


def _day(now: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


def _used(usage: Used, now: float) -> tuple[int, int]:
    day = _day(now)
    return usage.committed(f"t/EUR@{day}"), usage.committed(f"t/EUR@{day[:7]}")
