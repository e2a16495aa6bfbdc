"""`/v1/receipts`: to each party its own, and to all others as if there were none."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from typing import Any

import httpx
import pytest
import pytest_asyncio

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert, Tenant
from flexgate.policies.store import Store
from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal
from flexgate.server.ledger.receipts import verify

pytestmark = pytest.mark.asyncio
EXPERTS = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette", "a-news", 1))
MATH = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "math", "academy", "a-math", 1))
NONSENSE = "dec_" + "f" * 32


async def recorded(ledger: Journal, number: int, tenant: str, experts: Any = EXPERTS, *, end: bool = True) -> str:
    """The id of a request that is in the ledger."""
    name = f"dec_{number:032x}"
    body = "a" * 64
    entry = ledger.register(
        Registration(name, 5, tenant, "key_a", "/v1/completions", "tiny", 1, 3, experts, prompt_sha256=body)
    )
    await entry.registered()
    if end:
        entry.end(COMPLETED, Used(2, 0, 3, [6, 2, 2, 2], [3, 9, 3, 3], "b" * 64))
        await ledger.register(Registration(f"after_{name}", 5, "z", "k", "", "m", 1, 3, ())).registered()
    return name


@pytest_asyncio.fixture
async def made(services: Any) -> list[str]:
    """Two requests with receipts: of tenant `t` with news, of tenant `u` with math."""
    names = [await recorded(services.ledger, 1, "t"), await recorded(services.ledger, 2, "u", MATH)]
    await asyncio.to_thread(services.receipts.maker.work)
    assert services.receipts.maker.waiting is None
    return names


def same(left: httpx.Response, right: httpx.Response) -> bool:
    """Byte for byte, but for the request's own id."""
    heads = [{k: v for k, v in r.headers.items() if k != "x-request-id"} for r in (left, right)]
    return left.status_code == right.status_code and left.content == right.content and heads[0] == heads[1]


@pytest.mark.parametrize(
    ("key", "kinds"),
    [("sk-t", ["request"]), ("sk-owner", ["owner"]), ("sk-admin", ["request", "owner", "owner", "none"])],
)
async def test_each_party_gets_its_own_leaves_and_verifies_what_it_got(
    call: Any, made: list[str], key: str, kinds: list[str]
) -> None:
    response = await call(key, "GET", f"/v1/receipts/{made[0]}")
    keys = await call(None, "GET", "/.well-known/jwks.json")
    verified = verify.verify_receipt(response.content, verify.parse_keys(keys.content))
    assert verified.receipt == made[0]
    assert sorted(leaf["kind"] for leaf in verified.leaves) == sorted(kinds)


async def test_there_is_no_receipt_where_experts_have_no_owners_and_the_reason_is_said(
    call: Any, services: Any, real_store: Store, made: list[str]
) -> None:
    with real_store.change(actor="test", at=2.0) as change:
        for agreement in change.all(Agreement):
            change.remove(Agreement, agreement.id)
        for tenant in change.all(Tenant):
            change.put(tenant.model_copy(update={"expert_ids": frozenset()}))
        for expert in change.all(Expert):
            change.put(expert.model_copy(update={"owner": None}))
    services.policy.confirm()
    unowned = tuple(RegisteredExpert(one.slot, one.expert, None) for one in EXPERTS)
    name = await recorded(services.ledger, 3, "t", unowned)
    await asyncio.to_thread(services.receipts.maker.work)
    for key in ("sk-t", "sk-admin"):
        refused = await call(key, "GET", f"/v1/receipts/{name}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "receipt_without_owners")
        assert "have no owners ('ownership: none')" in refused.json()["error"]["message"]
        assert (await call(key, "GET", f"/v1/receipts/{made[0]}")).status_code == 200, "it is of an owned model"
    others = [await call("sk-u", "GET", f"/v1/receipts/{one}") for one in (name, NONSENSE)]
    assert same(*others)


async def test_the_receipt_names_the_policy_that_the_audit_log_has(call: Any, services: Any, made: list[str]) -> None:
    response = await call("sk-t", "GET", f"/v1/receipts/{made[0]}")
    (leaf,) = response.json()["leaves"]
    entries = [entry for entry in services.store.audit_log(limit=1000) if entry.detail.get("policy_version") == 1]
    assert leaf["content"]["policy_digest"] == entries[-1].hash


@pytest.mark.parametrize("key", ["sk-t", "sk-owner"])
async def test_what_is_anothers_is_like_nothing(call: Any, services: Any, made: list[str], key: str) -> None:
    waiting = await recorded(services.ledger, 3, "u", MATH)
    running = await recorded(services.ledger, 4, "u", MATH, end=False)
    absent = await call(key, "GET", f"/v1/receipts/{NONSENSE}")
    assert absent.status_code == 404
    for name in (made[1], waiting, running):
        assert same(await call(key, "GET", f"/v1/receipts/{name}"), absent)


async def test_a_request_without_a_receipt_is_told_to_its_tenant_and_why_to_the_operator(
    call: Any, services: Any, made: list[str]
) -> None:
    waiting = await recorded(services.ledger, 3, "t")
    running = await recorded(services.ledger, 4, "t", end=False)
    services.receipts.maker.signer.path.unlink()
    await asyncio.to_thread(services.receipts.maker.work)
    for name in (waiting, running):
        response = await call("sk-t", "GET", f"/v1/receipts/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "receipt_pending")
        assert "receipts.pem" not in response.text
    told = await call("sk-admin", "GET", f"/v1/receipts/{waiting}")
    assert "receipts.pem" in told.json()["error"]["message"]
    assert (await call("sk-owner", "GET", f"/v1/receipts/{running}")).status_code == 404


async def test_a_record_that_was_changed_is_told(call: Any, services: Any, made: list[str]) -> None:
    connection = sqlite3.connect(services.ledger.path, isolation_level=None)
    connection.execute("UPDATE counts SET completion_mass = 1")
    connection.close()
    response = await call("sk-owner", "GET", f"/v1/receipts/{made[0]}")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "receipt_damaged")


async def test_the_chain_is_for_auditors_and_is_read_page_by_page(call: Any, services: Any, made: list[str]) -> None:
    await recorded(services.ledger, 3, "t")
    await asyncio.to_thread(services.receipts.maker.work)
    first = (await call("sk-auditor", "GET", "/v1/receipt_batches?limit=1")).json()
    newest = (await call("sk-auditor", "GET", "/v1/receipt_batches?newest=true")).json()
    assert ([one["header"]["number"] for one in newest["data"]], newest["has_more"]) == (["2"], False)
    rest = (await call("sk-auditor", "GET", "/v1/receipt_batches?after=1")).json()
    assert (first["has_more"], rest["has_more"]) == (True, False)
    keys = verify.parse_keys((await call(None, "GET", "/.well-known/jwks.json")).content)
    batches = [verify.verify_batch(one, keys) for one in first["data"] + rest["data"]]
    verify.verify_order(batches)
    assert [batch.number for batch in batches] == [1, 2]
    for key in ("sk-t", "sk-owner"):
        assert (await call(key, "GET", "/v1/receipt_batches")).status_code == 403


async def test_the_key_set_is_sent_as_it_is_verified(call: Any, made: list[str]) -> None:
    response = await call(None, "GET", "/.well-known/jwks.json")
    (key,) = json.loads(response.content)["keys"]
    assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("OKP", "Ed25519", "EdDSA", "sig")
