"""Months that are closed: what is due, and what is carried over because it is less than a minimum."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
from closingkit import (
    BODY,
    DECEMBER,
    FEBRUARY,
    JANUARY,
    MINIMUM,
    RECEIPT,
    START,
    close,
    correct,
    payout,
    requests_of,
    use,
)
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store
from flexgate.server.cli.main import app
from flexgate.server.ledger.closings import Closing, Closings, Month, Payout, Summed, payouts_of
from flexgate.server.ledger.statements import Period


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
async def test_the_command_closes_a_month(urls: tuple[str, str], clock_of: list[float]) -> None:
    words = ["statements", "close", "2026-11", "--owner", "gazette", "--url", urls[1], "--key", "sk-admin"]
    done = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--minimum", "1 EUR"])
    assert done.output == (
        "due 0.00 EUR: 0.00 carried over and 0.38 of 2026-11, less 0.38 carried on; the least that is paid is 1 EUR\n"
    )
    wrong = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--minimum", "1EUR"])
    assert wrong.exit_code == 2


@pytest.mark.asyncio
async def test_a_preview_shows_what_would_be_closed_and_closes_nothing(
    call: Any, clock_of: list[float], real_store: Store, urls: tuple[str, str]
) -> None:
    async def preview(month: str, **changes: Any) -> Any:
        return await call("sk-admin", "POST", f"/v1/statements/{month}/closing/preview", json={**BODY, **changes})

    shown = await preview("2026-11")
    assert (shown.status_code, shown.json()["closed_at"]) == (200, None)
    assert shown.json()["payouts"] == [payout("0.00", "0.38", "0.00", "0.38")]
    words = ["statements", "close", "2026-11", "--owner", "gazette", "--url", urls[1], "--key", "sk-admin"]
    said = (await asyncio.to_thread(CliRunner().invoke, app, [*words, "--dry-run"])).output
    assert said == (
        "2026-11 would be closed:\n"
        "due 0.38 EUR: 0.00 carried over and 0.38 of 2026-11, less 0.00 carried on; the least that is paid is 0 EUR\n"
    )
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()["closing"] is None
    assert not [one for one in real_store.audit_log(limit=1000) if one.action == "statement.closed"]
    closed = (await close(call, "2026-11")).json()
    assert closed | {"closed_at": None} == shown.json()
    assert (await preview("2026-11")).json() == closed
    for month, changes, code in (
        ("2026-11", {"minimums": []}, "closing_refused"),
        ("2026-12", {}, "invalid_value"),
        ("2026-11", {"owner_id": "ghost"}, "invalid_value"),
    ):
        wrong = await preview(month, **changes)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, code)
    refused = await call("sk-auditor", "POST", "/v1/statements/2026-11/closing/preview", json=BODY)
    assert refused.status_code == 403


@pytest.mark.asyncio
async def test_a_preview_lets_usage_into_the_month_that_it_is_of(
    call: Any, clock_of: list[float], services: Any
) -> None:
    shown = await call("sk-admin", "POST", "/v1/statements/2026-11/closing/preview", json=BODY)
    assert shown.status_code == 200
    clock_of[0] = START + 120  # it was ahead
    await use(services, 4)
    assert await requests_of(call, "2026-11") == 4


def test_two_that_close_at_once_close_once(clock_of: list[float], services: Any) -> None:
    audited = []

    def audit(closing: Closing) -> None:
        audited.append(closing)
        time.sleep(0.1)  # the others are at it meanwhile

    closings = Closings(services.ledger.corrections)
    month, summed = Month("gazette", Period.at("month", START), {}), Summed({"EUR": Fraction(1)}, int(START), 0)
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(closings.close, month, summed, at=DECEMBER, actor="a", audit=audit) for _ in range(4)]
    assert [one.result() for one in made] == audited * 4


@pytest.mark.asyncio
async def test_each_currency_is_carried_over_on_its_own(call: Any, clock_of: list[float]) -> None:
    dollars = {"amount": "0.30", "currency": "USD"}
    yen = {"kind": "correction", "id": "y", "owner_id": "gazette", "receipt_id": RECEIPT, "reason": "r"}
    for amount, currency, id_ in (("0.20", "USD", "d"), ("7.5", "JPY", "y")):
        body = {**yen, "id": id_, "amount": amount, "currency": currency}
        assert (await call("sk-admin", "POST", "/v1/corrections", json=body)).status_code == 201
    minimums = [MINIMUM, dollars]
    assert [one["currency"] for one in (await close(call, "2026-11", minimums=minimums)).json()["payouts"]] == ["EUR"]
    clock_of[0] = JANUARY
    closed = (await close(call, "2026-12", minimums=minimums)).json()["payouts"]
    assert [(one["currency"], one["due"], one["carried_on"]) for one in closed] == [
        ("EUR", "0.00", "0.38"),
        ("JPY", "8", "0"),
        ("USD", "0.00", "0.20"),
    ]


CENTS = st.integers(-10_000, 10_000).map(lambda cents: Fraction(cents, 100))


@given(st.lists(st.tuples(CENTS, st.integers(0, 5_000)), min_size=1, max_size=12))
def test_whatever_is_owed_is_paid_or_carried_over_to_the_cent(months: list[tuple[Fraction, int]]) -> None:
    before: tuple[Payout, ...] = ()
    paid = owed = Fraction()
    for total, minimum in months:
        carried = {one.currency: Fraction(one.carried_on) for one in before}
        before = payouts_of({"EUR": total}, carried, {"EUR": Fraction(minimum)})
        (one,) = before
        due, paid, owed = Fraction(one.due), paid + Fraction(one.due), owed + total
        assert due == 0 or due >= max(minimum, Fraction(1, 100))
        assert Fraction(one.carried_on) < max(minimum, Fraction(1, 100))
        assert paid + Fraction(one.carried_on) == owed
