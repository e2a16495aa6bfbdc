"""Nothing comes into a closed month, whatever the clock says, and no month blocks the closing of those after it."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from closingkit import (
    DECEMBER,
    FEBRUARY,
    JANUARY,
    NEWS,
    START,
    close,
    correct,
    payout,
    requests_of,
    use,
)
from typer.testing import CliRunner

from flexgate.policies.store import Store
from flexgate.server.cli.main import app
from flexgate.server.ledger import statements
from flexgate.server.ledger.entries import Registration, microseconds
from flexgate.server.ledger.errors import TooMuchAsked
from flexgate.server.ledger.journal import Journal

PARTS_SECONDS = "flexgate.server.admin.statements.account.PARTS_SECONDS"


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
    months = (await call("sk-owner", "GET", "/v1/statements")).json()["data"]
    assert [(one["id"], one["open"]) for one in months] == [("2026-12", True), ("2026-11", False)]
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
    assert len(asked) == 31
    for name, value in ((f"{statements.__name__}.LEAST_SECONDS", 86_400 * 31), (PARTS_SECONDS, 0.0)):
        with monkeypatch.context() as patched:
            patched.setattr(name, value)
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
    await correct(call, "5.00")  # of December, which is left out, and stays where usage is deleted
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
    assert closed.json()["payouts"] == [payout("5.38", "0.00", "5.38", "0.00")]
    assert (await call("sk-owner", "GET", "/v1/statements/2027-02/closing")).json() == closed.json()
    assert (await close(call, "2027-03")).json()["left_out"] == []
    newest, *_ = [one for one in real_store.audit_log(limit=1000) if one.detail.get("period") == "2027-02"]
    assert newest.detail["left_out"] == ["2026-12", "2027-01"]
    words = ["statements", "due", "2027-02", "--key", "sk-owner", "--url", urls[1]]
    said = (await asyncio.to_thread(CliRunner().invoke, app, words)).output
    assert "left out, since their usage had been deleted: 2026-12, 2027-01" in said


@pytest.mark.asyncio
async def test_no_closing_begins_with_a_month_before_all_usage(call: Any, clock_of: list[float]) -> None:
    refused = await close(call, "2006-11")
    assert refused.json()["error"]["code"] == "closing_refused"
    assert "begin with a month that has some" in refused.json()["error"]["message"]
    assert (await close(call, "2026-11")).status_code == 201
