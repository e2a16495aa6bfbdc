"""Statements at the wire: what an owner reads of its experts, and of no other owner's."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import rfc8785
from typer.testing import CliRunner

from flexgate.policies.audit import DENIED, Event
from flexgate.policies.documents import Expert, Tenant
from flexgate.policies.errors import ChangeRefused
from flexgate.policies.store import Store
from flexgate.policies.store.agreements import create_agreement, revise_agreement, terminate_agreement
from flexgate.server.admin.statements import asked
from flexgate.server.cli.main import app
from flexgate.server.ledger.entries import COMPLETED, MICROSECONDS, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts import verify
from flexgate.server.ledger.receipts.verify_owners import verify_owners
from flexgate.server.ledger.receipts.verify_statement import parse_proof, verify_statement, verify_statements

pytestmark = pytest.mark.asyncio

DAY = 86_400
START = 1_793_491_200  # 2026-11-01
MONTH = "/v1/statements/2026-11"
NEWS = RegisteredExpert(0, "news", "gazette", "a-news", 2)
MATH = RegisteredExpert(1, "math", "academy", "a-math", 1)
PAID = [
    {"kind": "compensate", "rate": "0.1", "currency": "EUR", "unit": "request"},
    {"kind": "report", "period": "month"},
]


def registration(name: str, tenant: str = "t", *, at: float = 0.0) -> Registration:
    return Registration(name, round(at * MICROSECONDS), tenant, "k", "/v1/x", "tiny", 1, 1, (NEWS, MATH))


@pytest_asyncio.fixture
async def recorded(ledger: Journal, real_store: Store, services: Any) -> Journal:
    """Three requests with news, one of them also with math, in two days of November 2026; then news' agreement ends."""
    terms = {"experts": ["news"], "assignee": "everyone", "effect": "permit", "duties": PAID}
    revise_agreement(real_store, "a-news", terms, actor="test", at=START + 5.0)
    at, ledger._clock = [0.0], lambda: at[0]
    for number, (tenant, day) in enumerate((("t", 0), ("u", 0), ("t", 2))):
        at[0] = START + DAY * day + 60.0 + number
        math = 10 * (number == 1)
        entry = ledger.register(registration(f"dec_{number}", tenant))
        entry.end(COMPLETED, Used(10, 4, 2, [30, math, 10, math], [0] * 4))
        await entry.registered()
    await ledger.register(registration("last", at=START + 90.0 * DAY)).registered()
    terminate_agreement(real_store, "a-news", actor="test", at=START + 3.0 * DAY)
    rules = [["news", "prohibited", "agreement/b@1"], ["math", "no_agreement", "default_deny"]]
    for requests in (2, 5):
        detail = {"tenant_id": "t", "route": "/", "status": 403, "code": "expert_policy_denied", "param": None}
        denied = {**detail, "rules": rules, "requests": requests, "request_ids": [], "last": START + 9.0}
        real_store.record([Event(at=START + 9.0, actor="key_1", action=DENIED, detail=denied)])
    services.clock = lambda: START + 4.0 * DAY
    return ledger


async def test_an_owner_reads_what_its_experts_did_and_what_is_owed(call: Any, recorded: Journal) -> None:
    response = await call("sk-owner", "GET", MONTH)
    assert response.status_code == 200, response.text
    found = response.json()
    assert (found["owner_id"], found["period"], found["open"]) == ("gazette", "month", True)
    assert (found["start_time"], found["end_time"]) == (START, START + 30 * DAY)
    assert (found["requests"], found["tokens"], found["share_weighted_tokens"]) == (3, 30, "33")
    (line,) = found["lines"]
    assert {name: line[name] for name in ("expert_id", "agreement_id", "agreement_version", "currency", "amount")} == {
        "expert_id": "news",
        "agreement_id": "a-news",
        "agreement_version": 2,
        "currency": "EUR",
        "amount": "0.3",
    }
    assert found["totals"] == [{"currency": "EUR", "amount": "0.30"}]
    assert [(day["start_time"], day["requests"]) for day in found["days"]] == [(START, 2), (START + 2 * DAY, 1)]
    assert found["denials"] == [{"expert_id": "news", "code": "prohibited", "requests": 7}]


async def test_tenants_are_pseudonyms_and_no_other_owner_is_named(call: Any, recorded: Journal) -> None:
    own = await call("sk-owner", "GET", MONTH)
    tenants = {one["tenant"]: one["requests"] for one in own.json()["tenants"]}
    assert sorted(tenants.values()) == [1, 2]
    assert all(name.startswith("anon-") for name in tenants)
    assert "math" not in own.text
    assert "academy" not in own.text
    others = await call("sk-admin", "GET", f"{MONTH}?owner_id=academy")
    assert {one["tenant"] for one in others.json()["tenants"]}.isdisjoint(tenants)


async def test_denials_are_counted_in_bounded_time(
    call: Any, recorded: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "MOST_SECONDS", -1.0)
    refused = await call("sk-owner", "GET", MONTH)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "query_too_large"), refused.text
    assert "Counting denied requests took longer than" in refused.json()["error"]["message"]


async def test_rights_that_were_given_and_taken_away_are_listed_with_their_times(call: Any, recorded: Journal) -> None:
    changes = (await call("sk-owner", "GET", MONTH)).json()["changes"]
    given, taken = START + 5.0, START + 3.0 * DAY
    names = ("kind", "id", "version", "requested_at", "effective_at", "last_used_at")
    assert [tuple(change[name] for name in names) for change in changes] == [
        ("agreement.revised", "a-news", 2, given, given, None),
        ("agreement.terminated", "a-news", 2, taken, None, START + 2.0 * DAY + 62.0),
    ]


async def test_a_period_that_has_ended_is_not_open_and_has_its_own_requests_alone(call: Any, recorded: Journal) -> None:
    found = (await call("sk-admin", "GET", "/v1/statements/2026-11-01?owner_id=gazette")).json()
    assert (found["period"], found["open"], found["requests"]) == ("day", False, 2)
    assert found["totals"] == [{"currency": "EUR", "amount": "0.20"}]


async def test_a_period_is_open_until_its_ends_are_on_disk(
    call: Any, recorded: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = recorded.register(registration("late", at=recorded._clock()))
    await late.registered()

    def refused(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as full:
        full.setattr(recorded, "_insert", refused)
        late.end(COMPLETED, Used(1, 0, 1, [], []))  # on the third
        days = ("2026-11-02", "2026-11-03")
        opened = [(await call("sk-owner", "GET", f"/v1/statements/{day}")).json()["open"] for day in days]
        assert opened == [False, True]
    while not recorded.has_written(START + 3 * DAY):
        await asyncio.sleep(0.01)
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11-03")).json()["open"] is False


async def test_whose_expert_it_was_then_reads_its_denials_and_weights(
    call: Any, recorded: Journal, real_store: Store
) -> None:
    """news goes from gazette to academy, so that neither reads what was of the other's time."""
    with real_store.change(actor="test", at=START + 10.0) as change:
        change.add_weights("news", slot=1, package="p", detail={})
    with real_store.change(actor="test", at=START + 3.5 * DAY) as change:
        for tenant in change.all(Tenant):
            change.put(tenant.model_copy(update={"expert_ids": frozenset(), "default_experts": None}))
        news = change.get(Expert, "news")
        assert news is not None
        change.put(news.model_copy(update={"owner": "academy"}))
    at = START + 3.75 * DAY
    with real_store.change(actor="test", at=at) as change:
        change.revoke_weights("news", slot=1, detail={})
    detail = {"tenant_id": "t", "route": "/", "status": 403, "code": "expert_policy_denied", "param": None}
    denied = {**detail, "rules": [["news", "no_agreement", "x"]], "requests": 3, "request_ids": [], "last": at}
    real_store.record([Event(at=at, actor="key_1", action=DENIED, detail=denied)])
    former = (await call("sk-owner", "GET", MONTH)).json()
    present = (await call("sk-admin", "GET", f"{MONTH}?owner_id=academy")).json()
    weights = [
        [one["kind"] for one in statement["changes"] if one["kind"].startswith("expert")]
        for statement in (former, present)
    ]
    assert weights == [["expert.added"], ["expert.revoked"]]
    assert [(one["code"], one["requests"]) for one in former["denials"]] == [("prohibited", 7)]
    of_news = [one for one in present["denials"] if one["expert_id"] == "news"]
    assert [(one["code"], one["requests"]) for one in of_news] == [("no_agreement", 3)]


async def test_a_period_whose_usage_was_deleted_has_no_statement(
    call: Any, recorded: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexgate.server.ledger.reading.Local.whole_since", lambda _: START + DAY)
    response = await call("sk-owner", "GET", MONTH)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "usage_deleted")
    assert "it is whole since 2026-11-02" in response.json()["error"]["message"]
    assert (await call("sk-owner", "GET", "/v1/statements/2026-11-02")).status_code == 200
    costs = f"/v1/organization/costs?start_time={START}&end_time={START + DAY}"
    assert (await call("sk-admin", "GET", costs)).json()["incomplete_before"] == START + DAY


async def test_a_statement_is_also_a_table_and_a_page(call: Any, recorded: Journal) -> None:
    table = await call("sk-owner", "GET", f"{MONTH}?format=csv")
    assert table.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(table.text))
    wanted = {"owner_id": "gazette", "id": "2026-11", "open": "True", "expert_id": "news", "amount": "0.3"}
    assert {name: row[name] for name in wanted} == wanted
    page = await call("sk-owner", "GET", f"{MONTH}?format=html")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for said in ("0.30 EUR", "still open", "a-news, version 2", "<rect", "agreement.terminated"):
        assert said in page.text
    assert "<script" not in page.text


@pytest.mark.parametrize("period", ["2026-11", "2026-11-01"])
async def test_a_statement_of_too_much_says_what_to_ask_for_instead(
    call: Any, recorded: Journal, monkeypatch: pytest.MonkeyPatch, period: str
) -> None:
    monkeypatch.setattr("flexgate.server.ledger.statements.MOST_ROWS", 0)
    refused = await call("sk-owner", "GET", f"/v1/statements/{period}")
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "period", "query_too_large")
    advice = "ask an administrator for its costs" if len(period) > 7 else "ask for its days"
    assert advice in error["message"]


async def test_an_owner_reads_no_statement_of_another(call: Any, recorded: Journal) -> None:
    refused = await call("sk-owner", "GET", f"{MONTH}?owner_id=academy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
    assert (await call("sk-owner", "GET", f"{MONTH}?owner_id=gazette")).status_code == 200


@pytest.mark.parametrize(
    ("key", "path", "said"),
    [
        ("sk-owner", "/v1/statements/2026-13", "The period is a day or a month"),
        ("sk-owner", "/v1/statements/2026-12", "The period '2026-12' has not begun"),
        ("sk-admin", MONTH, "Name the owner in 'owner_id'"),
        ("sk-admin", f"{MONTH}?owner_id=nobody", "No expert of this server has the owner 'nobody'"),
        ("sk-owner", f"{MONTH}?format=pdf", "format"),
    ],
)
async def test_a_statement_that_there_is_none_of_is_refused(
    call: Any, recorded: Journal, key: str, path: str, said: str
) -> None:
    refused = await call(key, "GET", path)
    assert refused.status_code == 400
    assert said in refused.json()["error"]["message"]


@pytest.mark.parametrize(("key", "status"), [("sk-t", 403), ("sk-auditor", 200)])
async def test_auditors_read_statements_and_tenants_do_not(call: Any, recorded: Journal, key: str, status: int) -> None:
    assert (await call(key, "GET", f"{MONTH}?owner_id=gazette")).status_code == status


async def test_the_command_prints_a_statement(urls: tuple[str, str], recorded: Journal) -> None:
    async def run(*arguments: str) -> Any:
        asked = ["statements", "show", *arguments, "--url", urls[1]]
        return await asyncio.to_thread(CliRunner().invoke, app, asked)

    shown = await run("2026-11", "--key", "sk-owner")
    assert shown.exit_code == 0, shown.output
    first, _, line, total = shown.output.splitlines()
    assert first == "gazette, 2026-11, still open: provisional: 3 requests, 30 tokens"
    assert line.split() == ["a-news@2", "news", "3", "30", "33", "0.3", "EUR"]
    assert total == "total 0.30 EUR"
    table = await run("2026-11", "--key", "sk-admin", "--owner", "gazette", "--format", "csv")
    assert table.output.startswith("owner_id,period,id,open,")
    refused = await run("2026-13", "--key", "sk-owner")
    assert (refused.exit_code, "The period is a day or a month" in refused.output) == (1, True)


@pytest_asyncio.fixture
async def receipted(recorded: Journal, services: Any, real_store: Store) -> Any:
    """Two requests with receipts, with news in the first and math in both, and an agreement that math counts under."""
    terms = {"id": "a-math", "experts": ["math"], "assignee": "everyone", "effect": "permit", "duties": PAID[:1]}
    with suppress(ChangeRefused):
        create_agreement(real_store, {**terms, "owner": "academy"}, actor="test", at=START + 5.0)
    for number, experts in ((1, (NEWS, MATH)), (2, (MATH,))):
        name = f"dec_{number:032x}"
        made = Registration(name, 1, "t", "k", "/v1/x", "tiny", 1, 1, experts)
        recorded.register(made).end(COMPLETED, Used(10, 4, 2, [30, 10, 10, 10], [0] * 4))
    await recorded.register(registration("end", at=START + 90.0 * DAY)).registered()
    await asyncio.to_thread(services.receipts.maker.work)
    assert services.receipts.maker.waiting is None
    return services


def receipt(number: int) -> str:
    return f"dec_{number:032x}"


async def test_an_owner_checks_alone_that_its_receipts_are_in_its_signed_statement(call: Any, receipted: Any) -> None:
    keys = verify.parse_keys((await call(None, "GET", "/.well-known/jwks.json")).content)
    signed = await call("sk-owner", "GET", f"{MONTH}/signed")
    assert signed.status_code == 200, signed.text
    statement = verify_statement(signed.content, keys)
    assert (statement.owner, statement.provisional, statement.totals) == ("gazette", True, (("EUR", "0.40"),))
    page = (await call("sk-owner", "GET", f"{MONTH}/receipts")).json()
    copies = [verify.verify_receipt(rfc8785.dumps(one), keys) for one in page["data"] if one["number"] == "4"]
    assert [leaf["owner"] for copy in copies for leaf in copy.leaves] == ["gazette"]
    proof = await call("sk-owner", "GET", f"{MONTH}/receipts/{receipt(1)}?last={statement.last}")
    (said,) = verify_statements([statement], copies, [parse_proof(proof.content)])
    assert said == "it counts the 1 receipts that were given, of 4; its figures were not made again: 3 are missing"


async def test_an_owner_gets_neither_receipts_nor_proofs_of_others(call: Any, receipted: Any) -> None:
    pages = [(await call("sk-owner", "GET", f"{MONTH}/receipts{query}")).json() for query in ("", "?limit=2")]
    assert [len(page["data"]) for page in pages] == [4, 2]
    assert [page["has_more"] for page in pages] == [False, True]
    assert "academy" not in str(pages)
    absent = await call("sk-owner", "GET", f"{MONTH}/receipts/{receipt(9)}")
    others = await call("sk-owner", "GET", f"{MONTH}/receipts/{receipt(2)}")
    assert (absent.status_code, absent.content) == (others.status_code, others.content)
    assert absent.status_code == 404
    for path in ("signed", "receipts", f"receipts/{receipt(1)}"):
        assert (await call("sk-owner", "GET", f"{MONTH}/{path}?owner_id=academy")).status_code == 404
        assert (await call("sk-t", "GET", f"{MONTH}/{path}")).status_code == 403
    other_day = await call("sk-owner", "GET", f"/v1/statements/2026-11-02/receipts/{receipt(1)}")
    assert (other_day.status_code, other_day.json()["error"]["code"]) == (400, "not_in_statement")


async def test_a_proof_of_deleted_usage_is_refused_as_that(
    call: Any, receipted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a receipt that there is none of, which would speak against an honest server."""
    monkeypatch.setattr("flexgate.server.ledger.reading.Local.whole_since", lambda _: START + DAY)
    for one in (receipt(1), receipt(9)):
        refused = await call("sk-owner", "GET", f"{MONTH}/receipts/{one}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "usage_deleted")


async def test_a_statement_is_not_sent_unsigned(call: Any, receipted: Any) -> None:
    receipted.receipts.maker.signer.path.unlink()
    refused = await call("sk-owner", "GET", f"{MONTH}/signed")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "statement_unsigned")
    assert "receipts.pem" not in refused.text
    told = await call("sk-admin", "GET", f"{MONTH}/signed?owner_id=gazette")
    assert "receipts.pem" in told.json()["error"]["message"]


async def test_periods_are_listed_with_those_that_are_still_open(
    call: Any, recorded: Journal, services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.clock = lambda: START + 62.0 * DAY
    listed = (await call("sk-owner", "GET", "/v1/statements")).json()["data"]
    assert [(one["id"], one["open"]) for one in listed] == [("2027-01", True), ("2026-12", False), ("2026-11", False)]
    monkeypatch.setattr("flexgate.server.ledger.reading.Local.whole_since", lambda _: START + DAY)
    assert [one["id"] for one in (await call("sk-admin", "GET", "/v1/statements")).json()["data"]] == [
        "2027-01",
        "2026-12",
    ]


async def test_the_commands_print_what_the_verifier_takes(
    urls: tuple[str, str], receipted: Any, tmp_path: Path
) -> None:
    async def run(*words: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, list(words))

    async def kept(name: str, *words: str) -> str:
        found = await run("statements", *words, "--key", "sk-owner", "--url", urls[1])
        assert found.exit_code == 0, found.output
        (tmp_path / name).write_text(found.output)
        return str(tmp_path / name)

    jwks = tmp_path / "jwks.json"
    jwks.write_text((await run("receipts", "keys", "--url", urls[0])).output)
    statement = await kept("statement.json", "sign", "2026-11")
    receipts = await kept("receipts.jsonl", "receipts", "2026-11")
    last = json.loads(Path(statement).read_text())["statement"]["last"]
    proof = await kept("proof.json", "prove", "2026-11", receipt(1), "--last", last)
    one = tmp_path / "one.json"
    one.write_text((await run("receipts", "show", receipt(1), "--key", "sk-owner", "--url", urls[1])).output)

    proved = await run("receipts", "verify", statement, str(one), proof, "--jwks", str(jwks))
    assert proved.exit_code == 0, proved.output
    said = proved.output.splitlines()
    assert said[0].endswith("OK: a provisional statement of '2026-11' for 'gazette', which counts 4 receipts")
    assert said[-1].endswith("of 4; its figures were not made again: 3 are missing")
    unproved = await run("receipts", "verify", statement, str(one), "--jwks", str(jwks))
    assert (unproved.exit_code, "the receipt was left out" in unproved.output) == (1, True)
    named = [line for line in Path(receipts).read_text().splitlines() if receipt(1) in line]
    assert named == [one.read_text().strip()]
    months = await run("statements", "list", "--key", "sk-owner", "--url", urls[1])
    assert "2026-11  open, provisional" in months.output


async def test_a_statement_that_would_leave_changes_out_is_refused(
    call: Any, recorded: Journal, real_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real_store.change(actor="test", at=START + 10.0) as change:
        change.add_weights("news", slot=1, package="p", detail={})
    monkeypatch.setattr("flexgate.server.admin.statements.changes.MOST", 0)
    refused = await call("sk-owner", "GET", MONTH)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "period", "query_too_large")
    assert "weights changed more than 0 times" in error["message"].lower()


async def test_the_sums_of_all_owners_are_for_operators_alone(call: Any, receipted: Any) -> None:
    """Sums over all, less its own part, would tell an owner what its neighbour is owed."""
    path = f"{MONTH}/owners"
    refused = [await call("sk-owner", "GET", f"{path}{query}") for query in ("", "?owner_id=gazette")]
    assert [(one.status_code, "owners" in one.text) for one in refused] == [(403, False)] * 2
    keys = verify.parse_keys((await call(None, "GET", "/.well-known/jwks.json")).content)
    for key in ("sk-auditor", "sk-admin"):
        found = verify_owners((await call(key, "GET", path)).content, keys)
        assert set(found.parts) == {"gazette", "academy"}
