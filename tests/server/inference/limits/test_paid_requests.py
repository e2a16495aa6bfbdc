"""What requests that cost money reserve and use of a budget, from HTTP to the ledger."""

from __future__ import annotations

import asyncio
import sqlite3
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from generating import PATH, Generating

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import BILLION, Cost
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import Store, budgets
from flexgate.server.engine.frontend.calls import CURRENT_CALL

PAID = [("0.004", "request"), ("1.5", "million_share_weighted_tokens")]


@pytest.fixture
def snapshot(snapshot: Snapshot, world: Any) -> Snapshot:
    """`t` may use news, which is paid."""
    tenants, agreements = world
    duties = [{"kind": "compensate", "rate": rate, "currency": "EUR", "unit": unit} for rate, unit in PAID]
    terms = {"id": "a-news", "owner": "gazette", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
    return Snapshot.build(
        policy_version=7,
        experts=snapshot.experts.values(),
        tenants=tenants,
        agreements=[
            Agreement.model_validate({**terms, "duties": duties}),
            *(one for one in agreements if one.id != "a-news"),
        ],
        keys=snapshot.keys.values(),
    )


class Waiting(Generating):
    """Reserves 1,000 tokens as the client does, or what it gets, and generates all of them once the test lets it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.go = asyncio.Event()
        self.granted: list[int] = []

    async def _output(self, call: Any, tokens: int) -> None:
        granted = call.reserve(least=6, most=1_000)
        self.granted.append(granted)
        await self.go.wait()
        await super()._output(call, granted - 5)


class Reserving(Generating):
    """Reserves for 1,000 tokens, as the client does before the engine has them."""

    async def __call__(self, *arguments: Any) -> Any:
        call = CURRENT_CALL.get()
        assert call is not None
        call.reserve(least=6, most=1_000)
        return await super().__call__(*arguments)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("stated", "granted", "says"),
    [
        ({}, [1_000, 1_000, 400], "has nothing left of its budget of 0.0156 EUR per day"),
        ({"max_tokens": 995}, [1_000, 1_000], "may cost 0.0055 EUR"),
    ],
    ids=["no length", "stated"],
)
async def test_six_requests_at_once_do_not_overspend(
    client: httpx.AsyncClient,
    services: Any,
    limit: Any,
    real_store: Store,
    stated: dict[str, int],
    granted: list[int],
    says: str,
) -> None:
    """Each may cost 0.0055 EUR, one of 1,000 tokens that all are news's; what is left serves a third one in part."""
    limit(cost_per_day=Cost.model_validate({"amount": "0.0156", "currency": "EUR"}))
    handler = Waiting()
    services.handlers.completion = SimpleNamespace(create_completion=handler)
    asked = [asyncio.create_task(client.post(PATH, json={"prompt": "x", **stated})) for _ in range(6)]
    while len(handler.granted) + sum(one.done() for one in asked) < 6:
        await asyncio.sleep(0.001)
    handler.go.set()
    answers = [await one for one in asked]
    assert handler.granted == granted
    assert sorted(answer.status_code for answer in answers) == [200] * len(granted) + [429] * (6 - len(granted))
    refused = next(answer for answer in answers if answer.status_code == 429).json()["error"]
    assert refused["code"] == "insufficient_quota"
    assert says in refused["message"]
    services.ledger.close()
    with sqlite3.connect(services.ledger.path) as connection:
        rows = connection.execute(
            "SELECT share_ppm * (prompt_tokens + completion_tokens) FROM usage JOIN parts USING (sequence) "
            "WHERE agreement = 'a-news'"
        ).fetchall()
    worth = sum(Fraction("0.004") + Fraction("1.5") * Fraction(weighted, 10**12) for (weighted,) in rows)
    services.budget_usage.refresh()
    ((name, used),) = budgets.read_use(real_store.engine).used.items()
    assert name.startswith("t/EUR@")
    assert len(rows) == len(granted)
    assert 0 <= used - worth * BILLION < len(granted)


@pytest.mark.asyncio
async def test_what_is_refused_is_no_request_of_the_day(client: httpx.AsyncClient, generating: Any, limit: Any) -> None:
    cost = Cost.model_validate({"amount": "0.001", "currency": "EUR"})
    limit(requests_per_day=2, cost_per_day=cost, requests_per_minute=100)
    generating(Reserving(1))
    for _ in range(3):
        refused = await client.post(PATH, json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
        assert "0.001 EUR" in refused.json()["error"]["message"]
    free = {"prompt": "x", "flexgate": {"experts": {"only": []}}}
    served = [await client.post(PATH, json=free) for _ in range(3)]
    assert [response.status_code for response in served] == [200, 200, 429]
    assert served[1].headers["x-ratelimit-remaining-requests"] == "95"


@pytest.mark.asyncio
async def test_a_free_request_is_served_once_a_budget_of_money_is_used_up(
    client: httpx.AsyncClient, generating: Any, limit: Any
) -> None:
    limit(cost_per_month=Cost.model_validate({"amount": "0", "currency": "EUR"}))
    generating(Generating(1))
    refused = await client.post(PATH, json={"prompt": "x"})
    assert refused.status_code == 429
    assert "has nothing left of its budget of 0 EUR per month" in refused.json()["error"]["message"]
    free = {"prompt": "x", "flexgate": {"experts": {"only": []}}}
    assert (await client.post(PATH, json=free)).status_code == 200
