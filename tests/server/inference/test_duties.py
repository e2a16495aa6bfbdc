"""Duties of agreements in a response: credits that are always there, and none without a ledger."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from generating import PATH, Generating, refuse

from flexgate.policies.agreements import Agreement
from flexgate.policies.documents import Expert
from flexgate.policies.snapshot import Snapshot
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio

CREDIT = {"kind": "attribute", "credit": "News by the Gazette, all rights reserved"}
PAID = {"kind": "compensate", "rate": "0.01", "currency": "EUR", "unit": "request"}


@pytest.fixture
def duties() -> list[dict[str, Any]]:
    """Those of the agreement on `news`."""
    return [CREDIT]


@pytest.fixture
def snapshot(snapshot: Snapshot, world: Any, duties: list[dict[str, Any]]) -> Snapshot:
    """`t` may use news, under an agreement with duties."""
    tenants, agreements = world
    terms = {"id": "a-news", "owner": "gazette", "experts": ["news"], "assignee": "everyone", "effect": "permit"}
    news = Agreement.model_validate({**terms, "version": 3, "duties": duties})
    return Snapshot.build(
        policy_version=7,
        experts=[Expert.model_validate(dict(expert)) for expert in snapshot.experts.values()],
        tenants=tenants,
        agreements=[news, *(one for one in agreements if one.id != "a-news")],
        keys=snapshot.keys.values(),
    )


def credits_of(response: httpx.Response) -> Any:
    """Of the `flexgate` object, wherever it is."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["flexgate"].get("credits")
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    (report,) = [chunk["flexgate"] for chunk in chunks if "flexgate" in chunk]
    return report.get("credits")


@pytest.mark.parametrize("explain", ["reasons", "none"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_response_has_the_credit_that_an_agreement_demands(
    client: httpx.AsyncClient,
    generating: Any,
    streamed: bool,
    explain: str,
) -> None:
    generating(Generating(3, streamed=streamed))
    response = await client.post(PATH, json={"prompt": "x", "stream": streamed, "flexgate": {"explain": explain}})
    assert response.headers["x-flexgate-credits"] == "gazette"
    assert credits_of(response) == [{"owner": "gazette", "credit": CREDIT["credit"], "experts": ["news"]}]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_an_expert_that_the_request_left_out_is_not_credited(
    client: httpx.AsyncClient,
    generating: Any,
    streamed: bool,
) -> None:
    class Public(Generating):
        async def _output(self, call: Any, tokens: int) -> None:
            call.count_new(tokens)
            call.count_usage("r", "0_r", [5, 2, [5, 0, 0, 0, 5, 0, 0, 0], [tokens, 0, 0, 0] * 2])
            assert await call.record()

    generating(Public(3, streamed=streamed))
    asked = {"prompt": "x", "stream": streamed, "flexgate": {"experts": {"only": []}}}
    response = await client.post(PATH, json=asked)
    assert "x-flexgate-credits" not in response.headers
    assert credits_of(response) is None


@pytest.mark.parametrize("duties", [[{"kind": "attribute"}]])
async def test_a_credit_without_a_line_of_its_own_is_the_owners_name(
    client: httpx.AsyncClient,
    generating: Any,
) -> None:
    generating(Generating(3))
    response = await client.post(PATH, json={"prompt": "x"})
    assert credits_of(response) == [{"owner": "gazette", "credit": "gazette", "experts": ["news"]}]


@pytest.mark.parametrize("duties", [[CREDIT], [PAID]], ids=["attribute", "compensate"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("after", [0, 2])
async def test_without_a_ledger_a_request_under_an_agreement_with_duties_is_refused_whatever_the_operator_chose(
    client: httpx.AsyncClient,
    generating: Any,
    services: Any,
    ledger: Journal,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
    after: int,
) -> None:
    services.ledger_failure = "serve"
    handler = generating(Generating(9, streamed=streamed))
    refuse(ledger, monkeypatch, after=after if streamed else 0)
    response = await client.post(PATH, json={"prompt": "x", "stream": streamed})
    assert "ledger_unavailable" in response.text
    assert len(handler.sent) < 3


@pytest.mark.parametrize("duties", [[]])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("after", [0, 2])
async def test_without_a_ledger_other_requests_are_served_where_the_operator_chose_so(
    client: httpx.AsyncClient,
    generating: Any,
    services: Any,
    ledger: Journal,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
    after: int,
) -> None:
    services.ledger_failure = "serve"
    handler = generating(Generating(9, streamed=streamed))
    refuse(ledger, monkeypatch, after=after)
    for _ in range(2):  # the first finds it out, the second knows it
        response = await client.post(PATH, json={"prompt": "x", "stream": streamed})
        assert (response.status_code, "ledger_unavailable" in response.text) == (200, False)
        assert '"finish_reason":"length"' in response.text.replace(" ", "")
        assert (await client.get("/ready")).status_code == 200
    assert len(handler.sent) == (18 if streamed else 0)
    monkeypatch.undo()
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 200


@pytest.mark.parametrize("duties", [[]])
async def test_a_stopping_server_serves_nothing_unrecorded(
    client: httpx.AsyncClient, services: Any, ledger: Journal
) -> None:
    services.ledger_failure = "serve"
    ledger.close()
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unavailable")
