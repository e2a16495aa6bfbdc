"""Corrections and disputes: rows that are added, audited, and shown in the statement of the period they are made in."""

from __future__ import annotations

import asyncio
import csv
import io
import sqlite3
from contextlib import closing
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store
from flexgate.policies.store.agreements import revise_agreement
from flexgate.server.cli.main import app
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.receipts import verify
from flexgate.server.ledger.receipts.verify_statement import verify_statement

pytestmark = pytest.mark.asyncio

DAY = 86_400
START = 1_793_491_200  # 2026-11-01
ALL = "/v1/corrections"
NEWS = RegisteredExpert(0, "news", "gazette", "a-news", 2)
MATH = RegisteredExpert(1, "math", "academy", "a-math", 1)
PAID = [{"kind": "compensate", "rate": "0.125", "currency": "EUR", "unit": "request"}]
RECEIPT, OTHERS = f"dec_{1:032x}", f"dec_{2:032x}"
CORRECTION = {
    "kind": "correction",
    "id": "credit-0",
    "owner_id": "gazette",
    "receipt_id": RECEIPT,
    "reason": "counted twice",
    "amount": "-0.25",
    "currency": "EUR",
}
DISPUTE = {"kind": "dispute", "receipt_id": RECEIPT, "reason": "never used"}


@pytest_asyncio.fixture
async def month(services: Any, real_store: Store) -> Any:
    """A request of November with news, and one with math, with receipts; it is December then."""
    terms = {"experts": ["news"], "assignee": "everyone", "effect": "permit", "duties": PAID}
    revise_agreement(real_store, "a-news", terms, actor="test", at=START + 5.0)
    now = [START + 60.0]
    services.ledger._clock = services.clock = lambda: now[0]
    for name, expert in ((RECEIPT, NEWS), (OTHERS, MATH)):
        entry = services.ledger.register(Registration(name, 1, "t", "k", "/v1/x", "tiny", 1, 1, (NEWS, MATH)))
        entry.end(COMPLETED, Used(10, 4, 2, [30, 0, 10, 0] if expert is NEWS else [0, 30, 0, 10], [0] * 4))
    await services.ledger.register(Registration("end", 1 << 60, "t", "k", "/v1/x", "tiny", 1, 1, ())).registered()
    await asyncio.to_thread(services.receipts.maker.work)
    now[0] = START + 31.0 * DAY
    return services


async def statement(call: Any, period: str) -> Any:
    return (await call("sk-owner", "GET", f"/v1/statements/{period}")).json()


async def test_a_correction_is_in_the_statement_of_the_month_it_is_made_in_and_changes_no_other(
    call: Any, month: Any, real_store: Store
) -> None:
    before = await statement(call, "2026-11")
    added = await call("sk-admin", "POST", ALL, json=CORRECTION)
    assert added.status_code == 201, added.text
    assert (await statement(call, "2026-11")) | {"made_at": 0} == before | {"made_at": 0}
    december = await statement(call, "2026-12")
    assert december["totals"] == [{"currency": "EUR", "amount": "-0.25"}]
    (shown,) = december["corrections"]
    assert (shown["receipt_id"], shown["reason"], shown["amount"]) == (RECEIPT, "counted twice", "-0.25")
    signed = await call("sk-owner", "GET", "/v1/statements/2026-12/signed")
    keys = verify.parse_keys((await call(None, "GET", "/.well-known/jwks.json")).content)
    assert verify_statement(signed.content, keys).totals == (("EUR", "-0.25"),)
    (entry,) = [one for one in real_store.audit_log(limit=1000) if one.action == "correction.added"]
    assert entry.actor.startswith("key_")
    assert {name: entry.detail[name] for name in ("owner", "request", "reason", "amount", "currency")} == {
        "owner": "gazette",
        "request": RECEIPT,
        "reason": "counted twice",
        "amount": "-0.25",
        "currency": "EUR",
    }


async def test_a_statement_shows_corrections_in_every_form(call: Any, month: Any, urls: tuple[str, str]) -> None:
    await call("sk-admin", "POST", ALL, json=CORRECTION)
    table = (await call("sk-owner", "GET", "/v1/statements/2026-12?format=csv")).text
    (row,) = csv.DictReader(io.StringIO(table))
    assert (row["amount"], row["currency"], row["receipt_id"], row["expert_id"]) == ("-0.25", "EUR", RECEIPT, "")
    assert "counted twice" in (await call("sk-owner", "GET", "/v1/statements/2026-12?format=html")).text
    words = ["statements", "show", "2026-12", "--key", "sk-owner", "--url", urls[1]]
    shown = await asyncio.to_thread(CliRunner().invoke, app, words)
    assert ": -0.25 EUR, counted twice" in shown.output


async def test_what_was_added_is_not_added_again(call: Any, month: Any, real_store: Store) -> None:
    named = {**CORRECTION, "id": "credit-1"}
    first, again = [await call("sk-admin", "POST", ALL, json=named) for _ in range(2)]
    assert (first.status_code, again.json()) == (201, first.json())
    refused = await call("sk-admin", "POST", ALL, json={**named, "amount": "9"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "id")
    assert len((await call("sk-admin", "GET", ALL)).json()["data"]) == 1
    assert len([one for one in real_store.audit_log(limit=1000) if one.action == "correction.added"]) == 1


async def test_an_id_is_free_whatever_other_rows_have_it(call: Any, month: Any) -> None:
    """An owner's disputes neither tell it of another owner's rows, nor take ids that corrections will have."""
    others = {**CORRECTION, "owner_id": "academy", "receipt_id": OTHERS}
    rows = [("sk-admin", others), ("sk-owner", {**DISPUTE, "id": "credit-0"})]
    rows += [("sk-admin", {**CORRECTION, "dispute_id": "credit-0"})]
    assert [(await call(key, "POST", ALL, json=row)).status_code for key, row in rows] == [201] * 3
    assert [(await call(key, "POST", ALL, json=row)).json()["number"] for key, row in rows] == [1, 2, 3]
    mine = (await call("sk-owner", "GET", ALL)).json()["data"]
    assert [(one["id"], one["kind"], one["state"]) for one in mine] == [
        ("credit-0", "dispute", "accepted"),
        ("credit-0", "correction", None),
    ]


async def test_a_dispute_is_decided_also_after_its_usage_was_deleted(call: Any, month: Any) -> None:
    opened = (await call("sk-owner", "POST", ALL, json=DISPUTE)).json()
    with closing(sqlite3.connect(month.ledger.path)) as connection, connection:
        connection.execute("DELETE FROM counts")
        connection.execute("DELETE FROM usage")
    assert (await call("sk-admin", "POST", ALL, json=CORRECTION)).status_code == 400
    rejection = {**DISPUTE, "kind": "rejection", "owner_id": "gazette", "dispute_id": opened["id"]}
    decided = await call("sk-admin", "POST", ALL, json=rejection)
    assert decided.status_code == 201, decided.text


async def test_no_correction_is_written_into_another_file_than_the_ledgers(call: Any, month: Any) -> None:
    path = month.ledger.path
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM INTO ?", (str(path.with_suffix(".copy")),))
    path.with_suffix(".copy").rename(path)
    asked = [await call("sk-admin", "GET", ALL), await call("sk-admin", "POST", ALL, json=CORRECTION)]
    assert [one.status_code for one in asked] == [503, 503]
    assert "was replaced or deleted" in asked[1].json()["error"]["message"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM corrections").fetchone() == (0,)


async def test_a_disk_that_is_nearly_full_takes_ends_and_no_corrections(
    call: Any, month: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexgate.policies.store.reserve.RESERVED_BYTES", 1 << 62)
    refused = await call("sk-admin", "POST", ALL, json=CORRECTION)
    assert refused.status_code == 503
    assert "free some space" in refused.json()["error"]["message"]
    monkeypatch.undo()
    assert (await call("sk-admin", "GET", ALL)).json()["data"] == []


async def test_a_period_is_open_while_a_correction_is_being_written_and_nothing_waits_for_it(
    call: Any, month: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexgate.server.ledger.corrections.SETTLED_SECONDS", 0.01)
    with month.ledger.corrections.lock:
        async with asyncio.timeout(5):
            shown = await statement(call, "2026-11")
    assert (shown["open"], (await statement(call, "2026-11"))["open"]) == (True, False)


async def test_a_correction_that_is_dated_ahead_of_the_clock_is_logged(
    call: Any, month: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await call("sk-admin", "POST", ALL, json=CORRECTION)
    assert "behind the newest correction" not in caplog.text
    month.clock, month.ledger._clock = [lambda: START + 3_600.0] * 2
    added = await call("sk-admin", "POST", ALL, json={**CORRECTION, "id": "credit-9"})
    assert added.status_code == 201
    behind = 31 * DAY - 3_600
    assert f"the clock is {behind} seconds behind the newest correction or closed month: credit-9" in caplog.text


async def test_asking_for_corrections_makes_no_ledger_where_it_was_moved_away(call: Any, month: Any) -> None:
    path = month.ledger.path
    path.rename(path.with_suffix(".away"))
    asked = [await call("sk-admin", "GET", ALL), await call("sk-admin", "POST", ALL, json=CORRECTION)]
    assert ([one.status_code for one in asked], path.exists()) == ([503, 503], False)


async def test_a_correction_that_cannot_be_audited_is_not_made(
    call: Any, month: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the database is away")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "record", away)
        assert (await call("sk-admin", "POST", ALL, json=CORRECTION)).status_code == 503
    assert (await call("sk-admin", "GET", ALL)).json()["data"] == []


async def test_an_owner_opens_a_dispute_and_an_administrator_decides_it_once(call: Any, month: Any) -> None:
    opened = (await call("sk-owner", "POST", ALL, json=DISPUTE)).json()
    assert (opened["kind"], opened["state"], opened["owner_id"]) == ("dispute", "open", "gazette")
    twice = await call("sk-owner", "POST", ALL, json=DISPUTE)
    assert "is open: wait until it is decided" in twice.json()["error"]["message"]
    accepted = await call("sk-admin", "POST", ALL, json={**CORRECTION, "dispute_id": opened["id"]})
    assert accepted.status_code == 201
    rejection = {**DISPUTE, "kind": "rejection", "owner_id": "gazette", "dispute_id": opened["id"]}
    late = await call("sk-admin", "POST", ALL, json=rejection)
    assert "was accepted already" in late.json()["error"]["message"]
    again = (await call("sk-owner", "POST", ALL, json=DISPUTE)).json()
    await call("sk-admin", "POST", ALL, json={**rejection, "dispute_id": again["id"]})
    listed = (await call("sk-owner", "GET", ALL)).json()["data"]
    assert [(one["kind"], one["state"]) for one in listed] == [
        ("dispute", "accepted"),
        ("correction", None),
        ("dispute", "rejected"),
        ("rejection", None),
    ]
    page = (await call("sk-owner", "GET", f"{ALL}?after=1&limit=1")).json()
    assert ([one["number"] for one in page["data"]], page["has_more"]) == ([2], True)


async def test_an_owner_has_its_own_disputes_alone(call: Any, month: Any) -> None:
    others = {**CORRECTION, "owner_id": "academy", "receipt_id": OTHERS}
    assert (await call("sk-admin", "POST", ALL, json=others)).status_code == 201
    assert (await call("sk-owner", "GET", ALL)).json()["data"] == []
    absent = await call("sk-owner", "POST", ALL, json={**DISPUTE, "receipt_id": f"dec_{9:032x}"})
    foreign = await call("sk-owner", "POST", ALL, json={**DISPUTE, "receipt_id": OTHERS})
    assert (absent.status_code, foreign.status_code) == (400, 400)
    assert foreign.json()["error"]["message"].replace(OTHERS, "") == absent.json()["error"]["message"].replace(
        f"dec_{9:032x}", ""
    )
    for method, path, body in (
        ("GET", f"{ALL}?owner_id=academy", None),
        ("POST", ALL, {**DISPUTE, "owner_id": "academy"}),
    ):
        assert (await call("sk-owner", method, path, json=body)).status_code == 404
    assert (await call("sk-owner", "POST", ALL, json={**CORRECTION})).status_code == 403
    assert (await call("sk-admin", "POST", ALL, json={**DISPUTE, "owner_id": "gazette"})).status_code == 403
    assert (await call("sk-t", "GET", ALL)).status_code == 403
    assert (await call("sk-auditor", "POST", ALL, json=CORRECTION)).status_code == 403


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"amount": "0.00"}, "amount", "'0.00' is no amount"),
        ({"amount": "1e3"}, "amount", "'1e3' is no amount"),
        ({"amount": "NaN"}, "amount", "'NaN' is no amount"),
        ({"id": None}, "id", "Give the correction an 'id'"),
        ({"amount": None}, "amount", "A correction has 'amount' and 'currency'"),
        ({"currency": None}, "amount", "A correction has 'amount' and 'currency'"),
        ({"currency": "EUX"}, "currency", "is not a currency"),
        ({"reason": ""}, "reason", ""),
        ({"reason": "a\nb"}, "reason", ""),
        ({"reason": "x" * 501}, "reason", ""),
        ({"kind": "gift"}, "kind", ""),
        ({"kind": "rejection", "amount": None, "currency": None}, "dispute_id", "names the dispute"),
        ({"dispute_id": "none"}, "dispute_id", "There is no dispute 'none' of this receipt"),
        ({"owner_id": None}, "owner_id", "Name the owner"),
        ({"owner_id": "academy"}, "receipt_id", "No expert of 'academy' took part"),
        ({"receipt_id": "dec 1"}, "receipt_id", ""),
        ({"paid": True}, "paid", ""),
    ],
)
async def test_a_correction_that_is_wrong_is_refused_with_what_is_wrong(
    call: Any, month: Any, change: dict[str, Any], param: str, said: str
) -> None:
    body = {name: value for name, value in {**CORRECTION, **change}.items() if value is not None}
    refused = await call("sk-admin", "POST", ALL, json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param), error
    assert said in error["message"]


async def test_the_commands_add_and_list(urls: tuple[str, str], month: Any) -> None:
    async def run(*words: str, key: str = "sk-admin") -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, ["corrections", *words, "--url", urls[1], "--key", key])

    opened = await run("add", "dispute", RECEIPT, "--reason", "never used", key="sk-owner")
    assert opened.exit_code == 0, opened.output
    given = ("--owner", "gazette", "--amount", "-0.25", "--currency", "EUR", "--reason", "right", "--id", "credit-1")
    added = await run("add", "correction", RECEIPT, *given, "--dispute", opened.output.strip())
    assert added.output == "credit-1\n"
    listed = (await run("list", key="sk-owner")).output.splitlines()
    assert listed[1].split() == [opened.output.strip(), "dispute", "gazette", RECEIPT, "accepted", "never", "used"]
    assert f"-0.25 EUR  decides {opened.output.strip()}" in listed[2]
    unnamed = await run("add", "correction", RECEIPT, *given[:-2])
    assert unnamed.stderr == (
        f"flexgate: if no answer comes, repeat this with --id {unnamed.stdout.strip()}, so that it is added once\n"
    )
    refused = await run("add", "correction", RECEIPT, "--reason", "x", "--owner", "gazette")
    assert (refused.exit_code, "has 'amount' and 'currency'" in refused.output) == (1, True)
