"""Statements say what was used, to the last minor unit, by a recount of their own."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from contextlib import closing
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgate.policies.agreements import Agreement
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.statements import Account, Period, owner_uses
from flexgate.server.ledger.usage import Reading

NOVEMBER = Period.of("2026-11")
EXPERTS = {"base": None, "news": "gazette", "sport": "gazette", "law": "chancery", "maths": "academy"}
DUTIES: list[list[dict[str, Any]]] = [
    [],
    [{"kind": "attribute"}],
    [{"kind": "compensate", "rate": "0.0123", "currency": "EUR", "unit": "request"}],
    [
        {"kind": "compensate", "rate": "1.005", "currency": "EUR", "unit": "thousand_tokens"},
        {"kind": "compensate", "rate": "0.333333333", "currency": "EUR", "unit": "thousand_share_weighted_tokens"},
    ],
    [{"kind": "compensate", "rate": "77.7", "currency": "JPY", "unit": "million_share_weighted_tokens"}],
    [{"kind": "compensate", "rate": "9.5", "currency": "KWD", "unit": "million_tokens"}],
]
PER = {"request": 1, "thousand": 1000, "million": 1_000_000}
MINOR = {"EUR": "0.01", "JPY": "1", "KWD": "0.001"}


class Request(NamedTuple):
    """What one request used, as its client and its engine could say."""

    name: str
    tenant: str
    ended_at: float
    tokens: int
    parts: dict[str, tuple[tuple[str, int] | None, int, int]]  # agreement, mass, positions


def random_requests(rng: random.Random, count: int) -> list[Request]:
    start, end = NOVEMBER.start - 86_400, NOVEMBER.end + 86_400
    found = []
    for number in range(count):
        parts = {}
        for expert, owner in EXPERTS.items():
            if rng.random() < 0.6:
                named = owner is not None and rng.random() < 0.9
                name = (f"{owner}-{rng.randrange(2)}", rng.randint(1, 3)) if named else None
                parts[expert] = name, rng.choice([0, 1, rng.randrange(2**40)]), rng.randrange(1, 900)
        ended = rng.choice([NOVEMBER.start, NOVEMBER.end, rng.randrange(start, end), rng.randrange(start, end)])
        tokens = rng.randrange(1, 10 ** rng.randint(1, 6))
        found.append(Request(f"dec_{number}", f"t{rng.randrange(4)}", ended - rng.choice([0, 1e-6]), tokens, parts))
    return sorted(found, key=lambda one: one.ended_at)  # as their ends are written


def written(path: Path, requests: list[Request]) -> Path:
    """A ledger of these requests."""

    async def write() -> None:
        at = [0.0]
        journal = Journal(path, clock=lambda: at[0])
        for one in requests:
            at[0] = one.ended_at
            experts = tuple(
                RegisteredExpert(slot, expert, EXPERTS[expert], *(one.parts[expert][0] or ()))
                for slot, expert in enumerate(EXPERTS)
                if expert in one.parts
            )
            entry = journal.register(Registration(one.name, 1, one.tenant, "k", "/v1/x", "m", 1, 1, experts))
            rows = [one.parts.get(expert, (None, 0, 0)) for expert in EXPERTS]
            prompt = [mass for _, mass, _ in rows] + [positions for _, _, positions in rows]
            entry.end(COMPLETED, Used(1, 0, one.tokens - 1, prompt, [0] * len(prompt)))
        journal.close()

    asyncio.run(write())
    return path


def shares_of(one: Request) -> dict[str, int]:
    """Shares by largest remainder, in fractions: no code is shared with what is judged."""
    masses = {expert: mass for expert, (_, mass, _) in one.parts.items()}
    total = sum(masses.values())
    if not total:
        return dict.fromkeys(masses, 0)
    exact = {expert: Fraction(mass, total) * 1_000_000 for expert, mass in masses.items()}
    shares = {expert: value.numerator // value.denominator for expert, value in exact.items()}
    missing = 1_000_000 - sum(shares.values())
    for expert in sorted(exact, key=lambda e: exact[e] - shares[e], reverse=True)[:missing]:
        shares[expert] += 1
    return shares


def terms_of(name: tuple[str, int]) -> Agreement:
    id_, version = name
    owner = id_.rpartition("-")[0]
    duties = DUTIES[(len(id_) + 2 * version + int(id_[-1])) % len(DUTIES)]
    fields = {"id": id_, "version": version, "owner": owner, "experts": ["x"], "assignee": "everyone"}
    return Agreement.model_validate({**fields, "effect": "permit", "duties": duties})


def account_of(path: Path, owner: str, period: Period = NOVEMBER) -> Account:
    found = owner_uses(path, owner, period)
    return found.account({terms.version: terms_of(terms.version) for terms in found.counted_under})


def recounted(requests: list[Request], owner: str) -> dict[tuple[tuple[str, int] | None, str], Fraction | None]:
    """The exact amount of each line, request by request, in decimal arithmetic."""
    amounts: dict[Any, Any] = {}
    with localcontext(prec=200):
        for one in requests:
            shares = shares_of(one)
            for expert, (name, _, positions) in one.parts.items():
                if EXPERTS[expert] != owner or not NOVEMBER.start <= one.ended_at < NOVEMBER.end:
                    continue
                for duty in () if name is None else terms_of(name).duties:
                    if duty.kind == "compensate":
                        weighted = Decimal(one.tokens * shares[expert]) / 1_000_000
                        kind, _, of = duty.unit.partition("_")
                        count = Decimal(1) if not of else weighted if of.startswith("share") else Decimal(positions)
                        before = amounts.get((name, expert)) or (Decimal(0), duty.currency)
                        amounts[name, expert] = before[0] + duty.rate * count / PER[kind], duty.currency
                amounts.setdefault((name, expert), None)
        return {line: found and Fraction(found[0]) for line, found in amounts.items()}


def test_amounts_are_those_of_a_recount_to_the_last_minor_unit(tmp_path: Path) -> None:
    requests = random_requests(random.Random(7), 400)
    path = written(tmp_path / "ledger.db", requests)
    paid = Counter[str]()
    for owner in ("gazette", "chancery", "academy"):
        account = account_of(path, owner)
        found = {(line.agreement, line.expert): line.amount and line.amount[0] for line in account.lines}
        assert found == recounted(requests, owner)
        paid.update(line.amount[1] for line in account.lines if line.amount)
        for currency, total in account.totals.items():
            exact = sum(line.amount[0] for line in account.lines if line.amount and line.amount[1] == currency)
            with localcontext(prec=200):
                scaled = Decimal(exact.numerator) / Decimal(exact.denominator)
                assert total == Fraction(scaled.quantize(Decimal(MINOR[currency]), ROUND_HALF_EVEN))
    assert min(paid[currency] for currency in MINOR) > 0


def test_who_revises_an_agreement_after_each_request_is_owed_no_more(tmp_path: Path) -> None:
    """A rate of 0.005001 would be 0.01 for each version."""
    requests = [
        Request(f"dec_{n}", "t", NOVEMBER.start + n, 10, {"news": (("gazette-0", n + 1), 5, 5)}) for n in range(1000)
    ]
    found = owner_uses(written(tmp_path / "ledger.db", requests), "gazette", NOVEMBER)
    duty = {"kind": "compensate", "rate": "0.005001", "currency": "EUR", "unit": "request"}
    fields = {"id": "gazette-0", "owner": "gazette", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
    terms = Agreement.model_validate({**fields, "duties": [duty]})
    account = found.account(dict.fromkeys((one.version for one in found.counted_under), terms))
    assert len(account.lines) == 1000
    assert {line.amount for line in account.lines} == {(Fraction("0.005001"), "EUR")}
    assert account.totals == {"EUR": Fraction(5)}


@settings(max_examples=15, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_all_owners_and_the_common_experts_used_is_what_all_requests_used(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    requests = random_requests(random.Random(seed), 60)
    path = written(tmp_path_factory.mktemp("ledger") / "ledger.db", requests)
    inside = [one for one in requests if NOVEMBER.start <= one.ended_at < NOVEMBER.end]
    accounts = [account_of(path, owner) for owner in ("gazette", "chancery", "academy")]
    with closing(sqlite3.connect(path)) as connection:
        common = connection.execute(
            "SELECT coalesce(sum(share_ppm * (prompt_tokens + completion_tokens)), 0), "
            "coalesce(sum(prompt_positions), 0) FROM parts JOIN usage USING (sequence) "
            "WHERE owner IS NULL AND ended_at >= ? AND ended_at < ?",
            (NOVEMBER.start * 10**6, NOVEMBER.end * 10**6),
        ).fetchone()
    used = [one for one in inside if any(mass for _, mass, _ in one.parts.values())]
    weighted = sum(account.uses.share_weighted_ppm for account in accounts)
    assert weighted + common[0] == sum(one.tokens for one in used) * 1_000_000
    positions = sum(positions for one in inside for _, _, positions in one.parts.values())
    assert sum(account.uses.tokens for account in accounts) + common[1] == positions
    for account in accounts:
        for of_one in (account.tenants.values(), [day.uses for day in account.days]):
            assert sum(one.share_weighted_ppm for one in of_one) == account.uses.share_weighted_ppm
            assert sum(one.requests for one in of_one) == account.uses.requests


def test_a_request_counts_once_however_many_experts_of_the_owner_took_part(tmp_path: Path) -> None:
    both = {"news": (("gazette-0", 1), 5, 5), "sport": (("gazette-0", 1), 5, 5)}
    requests = [Request(f"dec_{n}", "t", NOVEMBER.start + 86_400 * n, 10, both) for n in range(3)]
    account = account_of(written(tmp_path / "ledger.db", requests), "gazette")
    assert (account.requests, account.uses.requests) == (3, 6)
    assert [(day.start - NOVEMBER.start, day.requests) for day in account.days] == [(86_400 * n, 1) for n in range(3)]


def test_all_sums_of_a_reading_are_of_one_moment(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.db", random_requests(random.Random(1), 5))
    with Reading(path) as reading, closing(sqlite3.connect(path)) as other:
        before = reading.rows("SELECT count(*) FROM usage", ())
        with other:
            other.execute("DELETE FROM counts")
            other.execute("DELETE FROM usage")
        assert reading.rows("SELECT count(*) FROM usage", ()) == before == [(5,)]


@pytest.mark.parametrize(
    ("name", "days"), [("2026-11", 30), ("2026-12", 31), ("2024-02", 29), ("2026-11-30", 1), ("2024-02-29", 1)]
)
def test_a_period_is_a_day_or_a_month_in_utc(name: str, days: int) -> None:
    period = Period.of(name)
    assert period is not None
    assert (period.end - period.start, period.start % 86_400) == (86_400 * days, 0)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "2026",
        "2026-13",
        "2026-00",
        "2026-02-30",
        "2026-1",
        "26-11",
        "2026-11-",
        "2026-11-3",
        "0000-01",
        "٢٠٢٦-11",
        "9999-12",
    ],
)
def test_what_is_no_period_is_none(name: str) -> None:
    assert Period.of(name) is None
