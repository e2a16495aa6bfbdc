"""Leave-one-out on demand, with a client that stands for the engine's and scores by the gate of the current call."""

from __future__ import annotations

import asyncio
import math
import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from inferencekit import PATH, completion
from vllm.v1.engine.exceptions import EngineGenerateError

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Tenant
from flexgate.policies.snapshot import Snapshot
from flexgate.server.engine.frontend.calls import CURRENT_CALL, GatedCall
from flexgate.server.engine.protocol.endings import EXPERT_REVOKED
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.ledger.costs import uses_by_agreement
from flexgate.server.ledger.reading import Local
from flexgate.server.ledger.receipts.verify import RECEIPT
from flexgate.server.ledger.statements import DAY
from flexgate.server.ledger.usage import Sought, sums

pytestmark = pytest.mark.asyncio

PROMPT, RESPONSE = [7, 8], [9, 10, 11]
ASKED = {"prompt": "x", "max_tokens": 3, "flexgate": {"explain": "counterfactual"}}
LOGPROBS = {("public", "news"): -0.5, ("public",): -2.0}


class Scoring:
    """What was scored, under which call; `fails` is the gate whose call is ended instead."""

    def __init__(self) -> None:
        self.calls: list[GatedCall] = []
        self.begun: list[GatedCall] = []
        self.ended: list[GatedCall] = []
        self.fails: tuple[str, ...] | None = None

    async def generate(self, prompt: Any, params: Any, _id: str) -> AsyncIterator[Any]:
        call = CURRENT_CALL.get()
        assert call is not None
        self.calls.append(call)
        gate = tuple(ref.expert for ref in call.experts)
        if gate == self.fails:
            call.failed = EXPERT_REVOKED
            raise EngineGenerateError("the request was ended")
        assert (prompt["prompt_token_ids"], params.max_tokens, params.prompt_logprobs) == (PROMPT + RESPONSE, 1, 0)
        call._names = call.name_slots((None,) * 4)
        call.count_prompt("r", 5)
        call.count_new(1)
        call.count_usage("r", "0_r", [5, 0, [5, 0, 0, 0, 5, 0, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0]])
        assert call.record is not None
        assert await call.record()
        scored = [LOGPROBS[gate] if place >= len(PROMPT) else -9.0 for place in range(1, len(PROMPT + RESPONSE))]
        yield SimpleNamespace(prompt_logprobs=SimpleNamespace(of_prompt=lambda: scored))


@pytest.fixture
def scoring(services: Any, handler: Any) -> Scoring:
    """The client, and a handler whose response both experts took part in."""
    made = Scoring()

    def respond() -> Any:
        call = CURRENT_CALL.get()
        assert call is not None
        call._names = call.name_slots((None,) * 4)
        call.count_prompt("r", len(PROMPT))
        call.count_new(len(RESPONSE))
        call.count_usage("r", "0_r", [2, 0, [2, 2, 0, 0, 2, 2, 0, 0], [3, 3, 0, 0, 3, 3, 0, 0]])
        if call.keep_answers:
            call.answers.append((PROMPT, RESPONSE))
        return completion()

    handler.result = respond
    services.client.generate = made.generate
    services.client.begin, services.client.end = made.begun.append, made.ended.append
    return made


@pytest.fixture(params=["an agreement requires it", "the server requires it", "its grade is too low"])
def with_news(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How a policy keeps `news` in the gate of project t."""
    ways: dict[str, dict[str, Any]] = {
        "an agreement requires it": {"requires": {}},
        "the server requires it": {"required": True},
        "its grade is too low": {"min_grade": "router"},
    }
    return ways[request.param]


def _policy(
    snapshot: Snapshot,
    world: tuple[list[Tenant], list[Agreement]],
    *,
    requires: dict[str, Any] | None = None,
    required: bool = False,
    min_grade: Any = None,
) -> Snapshot:
    """A policy in which `news` is required, or of a grade below what project t demands."""
    tenants, agreements = world
    grades = {"news": "shared"} if min_grade else {}
    experts = [
        expert.model_copy(
            update={"grade": grades.get(id_, "removed"), "required": (required and id_ == "news") or expert.required}
        )
        for id_, expert in snapshot.experts.items()
    ]
    fields = {"id": "must", "owner": "gazette", "experts": ["news"], "assignee": "everyone", "effect": "require"}
    extra = [] if requires is None else [Agreement.model_validate({**fields, **requires})]
    return Snapshot.build(
        policy_version=snapshot.policy_version + 1,
        experts=experts,
        tenants=[tenant.model_copy(update={"min_grade": min_grade}) for tenant in tenants],
        agreements=[*agreements, *extra],
        keys=snapshot.keys.values(),
    )


async def test_each_expert_that_took_part_is_left_out_once(
    client: httpx.AsyncClient, services: Any, scoring: Scoring
) -> None:
    response = await client.post(PATH, json={**ASKED, "cache_salt": "pepper"})
    assert response.status_code == 200, response.text
    attribution = response.json()["flexgate"]["attribution"]
    assert attribution["counterfactual"] == {"logprob": -1.5, "passes": 2, "tokens": 12}
    deltas = {part["id"]: part["delta_logprob"] for part in attribution["experts"]}
    assert deltas["news"] == 4.5
    assert deltas["public"] is None, "the anchor cannot be left out"
    gates = [tuple(ref.expert for ref in call.experts) for call in scoring.calls]
    assert gates == [("public", "news"), ("public",)]
    salts = {call.client_salt for call in scoring.calls}
    assert len(salts) == 2
    assert salts.isdisjoint({None, "pepper"}), "a pass reads no cache, and leaves nothing in one that others read"
    assert len(scoring.begun) == 3
    assert set(scoring.begun) == set(scoring.ended)
    assert not services.running._rights


async def test_an_expert_that_a_layer_cannot_do_without_is_not_left_out(
    client: httpx.AsyncClient, services: Any, scoring: Scoring
) -> None:
    services.client.slot_map = SlotMap(4, (bytes(range(4)), bytes([1]) * 4))  # the second layer is `news` alone
    response = await client.post(PATH, json=ASKED)
    attribution = response.json()["flexgate"]["attribution"]
    assert attribution["counterfactual"]["passes"] == 1
    assert {part["id"]: part["delta_logprob"] for part in attribution["experts"]}["news"] is None
    assert [tuple(ref.expert for ref in call.experts) for call in scoring.calls] == [("public", "news")]


async def test_an_expert_that_the_project_may_not_leave_out_is_not_left_out(
    client: httpx.AsyncClient, services: Any, store: Any, world: Any, scoring: Scoring, with_news: dict[str, Any]
) -> None:
    """Such a request would be refused, and what it would have said is nobody's to be told."""
    store.answer = _policy(store.answer, world, **with_news)
    services.policy.confirm()
    response = await client.post(PATH, json=ASKED)
    attribution = response.json()["flexgate"]["attribution"]
    assert attribution["counterfactual"]["passes"] == 1
    assert {part["id"]: part["delta_logprob"] for part in attribution["experts"]}["news"] is None
    assert [tuple(ref.expert for ref in call.experts) for call in scoring.calls] == [("public", "news")]


async def test_a_pass_is_judged_by_what_it_leaves_out(
    client: httpx.AsyncClient, services: Any, store: Any, world: Any, handler: Any, scoring: Scoring
) -> None:
    """It ends when what it leaves out begins to be required, and goes on where a new policy changes nothing for it."""
    coming = datetime.fromtimestamp(2**31, UTC)
    store.answer = _policy(store.answer, world, requires={"not_before": coming})
    services.policy.confirm()
    respond = handler.result

    def moved() -> Any:
        store.answer = replace(store.answer, policy_version=store.answer.policy_version + 1)
        services.policy.confirm()
        return respond()

    handler.result = moved
    response = await client.post(PATH, json=ASKED)
    assert response.status_code == 200, response.text
    ends = {tuple(ref.expert for ref in call.experts): call.gate_until for call in scoring.calls}
    assert ends == {("public", "news"): math.inf, ("public",): 2.0**31}


async def test_passes_count_against_the_limits(
    client: httpx.AsyncClient, handler: Any, scoring: Scoring, limit: Any
) -> None:
    limit(tokens_per_minute=100)
    response = await client.post(PATH, json=ASKED)
    assert response.headers["x-ratelimit-remaining-tokens"] == str(100 - 5 - 12)
    respond = handler.result

    def reserved() -> Any:
        call = CURRENT_CALL.get()
        assert call is not None
        assert call.reserve is not None
        call.reserve(least=30, most=30)  # ninety with two passes, and eighty-three are left
        return respond()

    handler.result = reserved
    response = await client.post(PATH, json=ASKED)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    response = await client.post(PATH, json={**ASKED, "flexgate": {}})
    assert response.status_code == 200


async def test_passes_of_a_client_that_left_count_for_what_they_computed(
    services: Any, scoring: Scoring, handler: Any, limit: Any, make_client: Any
) -> None:
    limit(tokens_per_minute=100)
    one = scoring.generate

    async def hang(prompt: Any, params: Any, id_: str) -> AsyncIterator[Any]:
        async for output in one(prompt, params, id_):
            if len(scoring.calls) == 2:
                asking.cancel()
                await asyncio.Event().wait()
            yield output

    services.client.generate = hang
    async with make_client() as http:
        asking = asyncio.ensure_future(http.post(PATH, json=ASKED))
        with suppress(asyncio.CancelledError):
            await asking
        response = await http.post(PATH, json={"prompt": "x", "max_tokens": 3})
    assert response.headers["x-ratelimit-remaining-tokens"] == str(100 - 5 - 12 - 5)


async def test_passes_are_recorded_apart(client: httpx.AsyncClient, services: Any, scoring: Scoring) -> None:
    response = await client.post(PATH, json=ASKED)
    id_ = response.json()["flexgate"]["decision_id"]
    services.ledger.close()
    with sqlite3.connect(services.ledger.path) as connection:
        rows = connection.execute(
            "SELECT request, endpoint, outcome, prompt_tokens, completion_tokens FROM usage ORDER BY request"
        ).fetchall()
    assert rows == [
        (id_, PATH, "completed", 2, 3),
        (f"{id_}_counterfactual", f"{PATH}#counterfactual", "completed", 10, 2),
    ]
    assert all(re.fullmatch(RECEIPT, row[0]) for row in rows)  # or no verifier takes their receipts


async def test_passes_are_paid_as_an_entry_of_their_own(
    client: httpx.AsyncClient, services: Any, scoring: Scoring
) -> None:
    """By what experts did in them: in none of these did news take part."""
    assert (await client.post(PATH, json=ASKED)).status_code == 200
    services.ledger.close()
    now = int(time.time())
    source = Local(services.ledger.path)
    (paid,) = uses_by_agreement(source, Sought(now - DAY, now + DAY, DAY))
    assert (paid.terms.version[0], paid.uses.requests, paid.uses.tokens) == ("a-news", 1, 5)
    assert paid.uses.share_weighted_ppm == 500_000 * 5
    by_expert = sums(source, Sought(now - DAY, now + DAY, DAY, groups=("expert_id",)))
    assert {one.group["expert_id"]: one.requests for one in by_expert} == {"news": 1, "public": 2}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"stream": True}, "not streamed"),
        ({"n": 2}, "one response"),
        ({"prompt": ["x", "y"]}, "one response"),
        ({"max_tokens": 0, "echo": True}, "no response to score"),
    ],
    ids=str,
)
async def test_what_cannot_be_scored_is_refused_before_anything_is_generated(
    client: httpx.AsyncClient, services: Any, handler: Any, more: dict[str, Any], words: str
) -> None:
    response = await client.post(PATH, json={**ASKED, **more})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "flexgate.explain"), error
    assert words in error["message"]
    assert not handler.seen
    assert not services.running._rights


async def test_a_response_that_fills_the_models_length_is_not_scored(
    client: httpx.AsyncClient, services: Any, scoring: Scoring
) -> None:
    services.limits = replace(services.limits, prompt_tokens=len(PROMPT + RESPONSE))
    response = await client.post(PATH, json=ASKED)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "flexgate.explain")
    assert not scoring.calls


@pytest.mark.parametrize("gate", [("public", "news"), ("public",)], ids=str)
async def test_an_expert_that_is_revoked_during_a_pass_ends_the_request(
    client: httpx.AsyncClient, services: Any, scoring: Scoring, gate: tuple[str, ...]
) -> None:
    scoring.fails = gate
    response = await client.post(PATH, json=ASKED)
    assert response.json()["error"]["code"] == "expert_revoked", response.text
    services.ledger.close()
    with sqlite3.connect(services.ledger.path) as connection:
        assert {outcome for (outcome,) in connection.execute("SELECT outcome FROM usage")} == {"expert_revoked"}
    assert set(scoring.begun) == set(scoring.ended)
    assert not services.running._rights
