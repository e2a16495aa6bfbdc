"""Months that are closed: what is due, and what is carried over because it is less than a minimum."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store
from flexgate.policies.store.agreements import revise_agreement
from flexgate.server.cli.main import app
from flexgate.server.ledger.closings import Payout, payouts_of
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used

START = 1_793_491_200.0  # 2026-11-01
DECEMBER, JANUARY, FEBRUARY = START + 30 * 86_400, START + 61 * 86_400, START + 92 * 86_400
NEWS = RegisteredExpert(0, "news", "gazette", "a-news", 2)
PAID = [{"kind": "compensate", "rate": "0.125", "currency": "EUR", "unit": "request"}]
RECEIPT = f"dec_{1:032x}"
MINIMUM = {"amount": "1", "currency": "EUR"}
BODY = {"owner_id": "gazette", "minimums": [MINIMUM]}


@pytest_asyncio.fixture
async def clock_of(services: Any, real_store: Store) -> list[float]:
    """Three requests of November, which are worth 0.38 EUR together; what time it is then can be set."""
    terms = {"experts": ["news"], "assignee": "everyone", "effect": "permit", "duties": PAID}
    revise_agreement(real_store, "a-news", terms, actor="test", at=START + 5)
    now = [START + 60]
    services.ledger._clock = services.clock = lambda: now[0]
    for number in (1, 2, 3):
        made = Registration(f"dec_{number:032x}", 1, "t", "k", "/v1/x", "tiny", 1, 1, (NEWS,))
        services.ledger.register(made).end(COMPLETED, Used(10, 4, 2, [30, 10], [0] * 2))
    await services.ledger.register(Registration("end", 1 << 60, "t", "k", "/v1/x", "tiny", 1, 1, ())).registered()
    while not services.ledger.has_written(DECEMBER):
        await asyncio.sleep(0.001)
    now[0] = DECEMBER + 60
    return now


async def close(call: Any, month: str, **changes: Any) -> Any:
    return await call("sk-admin", "POST", f"/v1/statements/{month}/closing", json={**BODY, **changes})


async def correct(call: Any, amount: str, id_: str = "c") -> None:
    body = {"kind": "correction", "id": id_, "owner_id": "gazette", "receipt_id": RECEIPT, "reason": "forgotten"}
    added = await call("sk-admin", "POST", "/v1/corrections", json={**body, "amount": amount, "currency": "EUR"})
    assert added.status_code == 201, added.text


def payout(carried: str, total: str, due: str, carried_on: str, minimum: str = "1") -> dict[str, str]:
    return {
        "currency": "EUR",
        "carried": carried,
        "total": total,
        "minimum": minimum,
        "due": due,
        "carried_on": carried_on,
    }


@pytest.mark.asyncio
async def test_less_than_the_minimum_is_carried_over_until_it_is_enough(
    call: Any, clock_of: list[float], real_store: Store, urls: tuple[str, str]
) -> None:
    assert (await close(call, "2026-11")).json()["payouts"] == [payout("0.00", "0.38", "0.00", "0.38")]
    await correct(call, "0.70")
    clock_of[0] = JANUARY
    closed = await close(call, "2026-12")
    assert (closed.status_code, closed.json()["payouts"]) == (201, [payout("0.38", "0.70", "1.08", "0.00")])
    clock_of[0] = FEBRUARY
    assert (await close(call, "2027-01")).json()["payouts"] == []
    shown = await call("sk-owner", "GET", "/v1/statements/2026-12")
    assert shown.json()["closing"] == closed.json()
    page = (await call("sk-owner", "GET", "/v1/statements/2026-12?format=html")).text
    assert "0.38 EUR" in page
    assert "1.08 EUR" in page
    words = ["statements", "show", "2026-12", "--key", "sk-owner", "--url", urls[1]]
    said = (await asyncio.to_thread(CliRunner().invoke, app, words)).output.splitlines()
    assert said[-1] == (
        "due 1.08 EUR: 0.38 carried over and 0.70 of 2026-12, less 0.00 carried on; the least that is paid is 1 EUR"
    )
    entries = [one for one in real_store.audit_log(limit=1000) if one.action == "statement.closed"]
    assert sorted(entry.detail["period"] for entry in entries) == ["2026-11", "2026-12", "2027-01"]


@pytest.mark.asyncio
async def test_a_month_that_is_not_closed_says_nothing_of_what_is_due(call: Any, clock_of: list[float]) -> None:
    for period in ("2026-11", "2026-12", "2026-11-01"):
        assert (await call("sk-owner", "GET", f"/v1/statements/{period}")).json()["closing"] is None
    await close(call, "2026-11")
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11-01")).json()["closing"] is None


@pytest.mark.asyncio
async def test_more_that_is_taken_off_than_is_owed_is_carried_over(call: Any, clock_of: list[float]) -> None:
    paid = await close(call, "2026-11", minimums=[])
    assert paid.json()["payouts"] == [payout("0.00", "0.38", "0.38", "0.00", minimum="0")]
    await correct(call, "-2")
    clock_of[0] = JANUARY
    assert (await close(call, "2026-12")).json()["payouts"] == [payout("0.00", "-2.00", "0.00", "-2.00")]


@pytest.mark.asyncio
async def test_a_month_is_closed_once_and_in_its_order(call: Any, clock_of: list[float], real_store: Store) -> None:
    first, again = await close(call, "2026-11"), await close(call, "2026-11")
    assert first.json() == again.json()
    other = await close(call, "2026-11", minimums=[])
    assert (other.status_code, other.json()["error"]["code"]) == (400, "closing_refused")
    assert "a closing is never changed" in other.json()["error"]["message"]
    clock_of[0] = FEBRUARY
    for month in ("2027-01", "2026-10"):
        refused = await close(call, month)
        assert refused.status_code == 400
        assert "close 2026-12 next" in refused.json()["error"]["message"]
    assert (await close(call, "2026-12")).status_code == 201
    assert (await close(call, "2026-11")).json() == first.json()
    assert len([one for one in real_store.audit_log(limit=1000) if one.action == "statement.closed"]) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("month", "changes", "param", "said"),
    [
        ("2026-12", {}, "period", "'2026-12' is no month that is over"),
        ("2026-11-01", {}, "period", "'2026-11-01' is no month that is over"),
        ("2027-01", {}, "period", "has not begun"),
        ("2026-11", {"owner_id": "ghost"}, "owner_id", "No expert of this server has the owner 'ghost'"),
        ("2026-11", {"minimums": [MINIMUM, MINIMUM]}, "minimums", "a currency is there twice"),
        ("2026-11", {"minimums": [{**MINIMUM, "amount": "-1"}]}, "minimums[0].amount", ""),
        ("2026-11", {"minimums": [{**MINIMUM, "currency": "EUX"}]}, "minimums[0].currency", ""),
        ("2026-11", {"paid": True}, "paid", ""),
    ],
)
async def test_a_closing_that_is_wrong_is_refused_with_what_is_wrong(
    call: Any, clock_of: list[float], month: str, changes: dict[str, Any], param: str, said: str
) -> None:
    refused = await close(call, month, **changes)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param), error
    assert said in error["message"]
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()["closing"] is None


@pytest.mark.asyncio
@pytest.mark.parametrize("key", ["sk-owner", "sk-auditor", "sk-t"])
async def test_only_administrators_close_months(call: Any, clock_of: list[float], key: str) -> None:
    refused = await call(key, "POST", "/v1/statements/2026-11/closing", json=BODY)
    assert refused.status_code == 403


@pytest.mark.asyncio
async def test_a_closing_that_cannot_be_audited_is_not_made(
    call: Any, clock_of: list[float], real_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(type(real_store), "record", fail)
        assert (await close(call, "2026-11")).status_code == 503
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()["closing"] is None


@pytest.mark.asyncio
async def test_no_correction_comes_into_a_closed_month_whatever_the_clock_says(
    call: Any, clock_of: list[float]
) -> None:
    await close(call, "2026-11")
    before = (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()
    clock_of[0] = START + 120
    await correct(call, "5")
    clock_of[0] = JANUARY
    after = (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()
    assert after | {"made_at": 0} == before | {"made_at": 0}
    assert (await close(call, "2026-12")).json()["payouts"] == [payout("0.38", "5.00", "5.38", "0.00")]


@pytest.mark.asyncio
async def test_the_command_closes_a_month(urls: tuple[str, str], clock_of: list[float]) -> None:
    words = ["statements", "close", "2026-11", "--owner", "gazette", "--url", urls[1], "--key", "sk-admin"]
    done = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--minimum", "1 EUR"])
    assert done.output == (
        "due 0.00 EUR: 0.00 carried over and 0.38 of 2026-11, less 0.38 carried on; the least that is paid is 1 EUR\n"
    )
    wrong = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--minimum", "1EUR"])
    assert wrong.exit_code == 2


CENTS = st.integers(-10_000, 10_000).map(lambda cents: Fraction(cents, 100))


@given(st.lists(st.tuples(CENTS, st.integers(0, 5_000)), min_size=1, max_size=12))
def test_whatever_is_owed_is_paid_or_carried_over_to_the_cent(months: list[tuple[Fraction, int]]) -> None:
    before: tuple[Payout, ...] = ()
    paid = owed = Fraction()
    for total, minimum in months:
        before = payouts_of({"EUR": total}, before, {"EUR": Fraction(minimum)})
        (one,) = before
        due, paid, owed = Fraction(one.due), paid + Fraction(one.due), owed + total
        assert due == 0 or due >= max(minimum, Fraction(1, 100))
        assert Fraction(one.carried_on) < max(minimum, Fraction(1, 100))
        assert paid + Fraction(one.carried_on) == owed
