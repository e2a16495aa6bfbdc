"""Months that are closed: what is due, and what is carried over because it is less than a minimum."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
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
from flexgate.server.ledger import statements
from flexgate.server.ledger.closings import Payout, payouts_of
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used, microseconds
from flexgate.server.ledger.errors import TooMuchAsked
from flexgate.server.ledger.journal import Journal

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


async def use(services: Any, number: int, expert: RegisteredExpert = NEWS) -> None:
    """One request more, which begins and ends now."""
    now = microseconds(services.ledger._clock())
    made = Registration(f"dec_{number:032x}", now, "t", "k", "/v1/x", "tiny", 1, 1, (expert,))
    entry = services.ledger.register(made)
    await entry.registered()
    entry.end(COMPLETED, Used(10, 4, 2, [30, 10], [0] * 2))
    while made.request in services.ledger._running:
        await asyncio.sleep(0.001)


async def requests_of(call: Any, month: str) -> int:
    return (await call("sk-owner", "GET", f"/v1/statements/{month}")).json()["requests"]


@pytest.mark.asyncio
async def test_usage_comes_into_no_closed_month_whatever_the_clock_says(
    call: Any, clock_of: list[float], services: Any
) -> None:
    await close(call, "2026-11")
    before = (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()
    clock_of[0] = START + 120
    await use(services, 4)
    while_behind = (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()
    assert while_behind | {"made_at": 0} == before | {"made_at": 0}
    assert services.ledger.state().behind_seconds == pytest.approx(DECEMBER - START - 120)
    clock_of[0] = JANUARY
    assert await requests_of(call, "2026-11") == 3
    assert await requests_of(call, "2026-12") == 1
    assert (await close(call, "2026-12")).json()["payouts"] == [payout("0.38", "0.12", "0.00", "0.50")]


@pytest.mark.asyncio
async def test_usage_comes_into_no_closed_month_after_a_restart_with_the_clock_behind(
    call: Any, clock_of: list[float], services: Any
) -> None:
    await close(call, "2026-11")
    cut_off = Registration("dec_cut_off", microseconds(START + 90), "t", "k", "/v1/x", "tiny", 1, 1, (NEWS,))
    await services.ledger.register(cut_off).registered()
    killed = services.ledger
    killed._connection.execute("DELETE FROM running WHERE request = 'end'")
    services.ledger = Journal(killed.path, clock=lambda: START + 120)
    try:
        with closing(sqlite3.connect(killed.path)) as ledger:
            ended = ledger.execute("SELECT ended_at FROM usage WHERE request = 'dec_cut_off'").fetchall()
        assert ended == [(microseconds(DECEMBER),)]
        await use(services, 4)
        clock_of[0] = JANUARY
        assert await requests_of(call, "2026-11") == 3
        assert await requests_of(call, "2026-12") == 1
    finally:
        services.ledger.close()
        services.ledger = killed


@pytest.mark.asyncio
async def test_a_month_without_usage_of_an_owner_that_the_policy_does_not_know_is_closed(
    call: Any, clock_of: list[float], services: Any
) -> None:
    clock_of[0] = START + 100
    await use(services, 4, NEWS._replace(owner="former"))
    for month, now, owed in (
        ("2026-11", DECEMBER, ("0.00", "0.12")),
        ("2026-12", JANUARY, ("0.12", "0.00")),
        ("2027-01", FEBRUARY, ("0.12", "0.00")),
    ):
        clock_of[0] = now
        closed = await close(call, month, owner_id="former")
        assert (closed.status_code, closed.json()["payouts"]) == (201, [payout(*owed, "0.00", "0.12")]), closed.text
    shown = await call("sk-admin", "GET", "/v1/statements/2026-12?owner_id=former")
    assert shown.json()["closing"]["payouts"] == [payout("0.12", "0.00", "0.00", "0.12")]


@pytest.mark.asyncio
async def test_a_month_that_is_too_much_to_sum_at_once_is_closed(
    call: Any, clock_of: list[float], services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_of[0] = START + 20 * 86_400
    await use(services, 4)
    clock_of[0] = START + 25 * 86_400
    await correct(call, "1.00")
    clock_of[0] = DECEMBER
    read, asked = statements.uses_read, []

    def bounded(reading: Any, owner: str, period: Any, **more: Any) -> Any:
        asked.append(period)
        if period.end - period.start > 8 * 86_400:
            raise TooMuchAsked("the sums took longer than 30 seconds")
        return read(reading, owner, period, **more)

    monkeypatch.setattr(statements, "uses_read", bounded)
    assert (await close(call, "2026-11")).json()["payouts"] == [payout("0.00", "1.50", "1.50", "0.00")]
    assert len(asked) == 7
    monkeypatch.setattr(statements, "LEAST_SECONDS", 15 * 86_400)
    refused = await close(call, "2026-11", owner_id="academy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "query_too_large")


@pytest.mark.asyncio
async def test_a_closing_is_read_and_repeated_after_its_usage_was_deleted(
    call: Any, clock_of: list[float], urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = await call("sk-owner", "GET", "/v1/statements/2026-11/closing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_closed")
    closed = await close(call, "2026-11")
    monkeypatch.setattr("flexgate.server.ledger.reading.Local.whole_since", lambda _: int(DECEMBER))
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11")).json()["error"]["code"] == "usage_deleted"
    for key, query in (("sk-owner", ""), ("sk-admin", "?owner_id=gazette"), ("sk-auditor", "?owner_id=gazette")):
        shown = await call(key, "GET", f"/v1/statements/2026-11/closing{query}")
        assert (shown.status_code, shown.json()) == (200, closed.json())
    assert (await close(call, "2026-11")).json() == closed.json()
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11/closing?owner_id=academy")).status_code == 404
    assert (await call("sk-t", "GET", "/v1/statements/2026-11/closing")).status_code == 403
    words = ["statements", "due", "2026-11", "--key", "sk-owner", "--url", urls[1]]
    said = (await asyncio.to_thread(CliRunner().invoke, app, words)).output
    assert said.startswith("due 0.00 EUR: 0.00 carried over and 0.38 of 2026-11")


@pytest.mark.asyncio
async def test_months_that_were_deleted_before_they_were_closed_are_left_out_when_that_is_said(
    call: Any, clock_of: list[float], real_store: Store, urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await close(call, "2026-11")
    clock_of[0] = START + 123 * 86_400
    monkeypatch.setattr("flexgate.server.ledger.reading.Local.whole_since", lambda _: int(JANUARY) + 86_400)
    for month, changes in (("2027-02", {}), ("2027-03", {"leave_out_deleted": True})):
        clock_of[0] = START + 160 * 86_400
        refused = await close(call, month, **changes)
        assert refused.json()["error"]["code"] == "closing_refused"
        assert "close 2027-02 next with 'leave_out_deleted'" in refused.json()["error"]["message"]
    assert (await close(call, "2027-01", leave_out_deleted=True)).json()["error"]["code"] == "usage_deleted"
    closed = await close(call, "2027-02", leave_out_deleted=True)
    assert closed.json()["left_out"] == ["2026-12", "2027-01"]
    assert closed.json()["payouts"] == [payout("0.38", "0.00", "0.00", "0.38")]
    assert (await call("sk-owner", "GET", "/v1/statements/2027-02/closing")).json() == closed.json()
    assert (await close(call, "2027-03")).json()["left_out"] == []
    newest, *_ = [one for one in real_store.audit_log(limit=1000) if one.detail.get("period") == "2027-02"]
    assert newest.detail["left_out"] == ["2026-12", "2027-01"]
    words = ["statements", "due", "2027-02", "--key", "sk-owner", "--url", urls[1]]
    said = (await asyncio.to_thread(CliRunner().invoke, app, words)).output
    assert "left out, since their usage had been deleted: 2026-12, 2027-01" in said


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
async def test_no_closing_begins_with_a_month_before_all_usage(call: Any, clock_of: list[float]) -> None:
    refused = await close(call, "2006-11")
    assert refused.json()["error"]["code"] == "closing_refused"
    assert "begin with a month that has some" in refused.json()["error"]["message"]
    assert (await close(call, "2026-11")).status_code == 201


@pytest.mark.asyncio
async def test_two_that_close_at_once_close_once(call: Any, clock_of: list[float], real_store: Store) -> None:
    same = await asyncio.gather(*(close(call, "2026-11") for _ in range(4)))
    assert {(one.status_code, one.text) for one in same} == {(201, same[0].text)}
    entries = [one for one in real_store.audit_log(limit=1000) if one.action == "statement.closed"]
    assert len(entries) == 1
    clock_of[0] = JANUARY
    other = await asyncio.gather(close(call, "2026-12"), close(call, "2026-12", minimums=[]))
    assert sorted(one.status_code for one in other) == [201, 400]


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
        before = payouts_of({"EUR": total}, before, {"EUR": Fraction(minimum)})
        (one,) = before
        due, paid, owed = Fraction(one.due), paid + Fraction(one.due), owed + total
        assert due == 0 or due >= max(minimum, Fraction(1, 100))
        assert Fraction(one.carried_on) < max(minimum, Fraction(1, 100))
        assert paid + Fraction(one.carried_on) == owed
