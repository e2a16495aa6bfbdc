"""What a response used is in the ledger before any of it leaves, and nothing leaves that is not."""

from __future__ import annotations

import asyncio
import hashlib
import operator
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx
import pytest
from generating import PATH, Generating, refuse
from vllm.v1.engine.exceptions import EngineGenerateError

from flexgate.policies.agreements import duties_sha256
from flexgate.server.engine.frontend.calls import GatedCall
from flexgate.server.http.connections import EventStream
from flexgate.server.inference import generation
from flexgate.server.ledger.entries import Registration
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.exclusion import excluded_of
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio


def rows(ledger: Journal, table: str = "usage") -> list[dict[str, Any]]:
    connection = sqlite3.connect(ledger.path)
    try:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
    finally:
        connection.close()


async def ended(ledger: Journal, count: int = 1) -> list[dict[str, Any]]:
    """The rows, once there are so many; ends are written after the response."""
    while len(found := rows(ledger)) < count:
        await asyncio.sleep(0.001)
    return found


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_response_is_recorded_with_what_each_expert_did(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, streamed: bool
) -> None:
    generating(Generating(3, streamed=streamed))
    response = await client.post(PATH, json={"prompt": "x", "stream": streamed})
    assert response.status_code == 200
    (row,) = await ended(ledger)
    assert row["request"] in response.text
    wanted = {
        "outcome": "completed",
        "tenant": "t",
        "key_id": "key_sk-t",
        "endpoint": PATH,
        "model": "tiny",
        "weights_epoch": 3,
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "completion_tokens": 3,
    }
    assert {name: row[name] for name in wanted} == wanted
    news, public = sorted(rows(ledger, "parts"), key=lambda part: part["expert"])
    assert (news["owner"], news["prompt_positions"], news["completion_positions"] > 0) == ("gazette", 0, True)
    assert (public["owner"], public["prompt_mass"], public["prompt_positions"]) == ("commons", 5, 5)
    agreement = operator.itemgetter("agreement", "agreement_version", "duties_sha256")
    assert (agreement(news), agreement(public)) == (("a-news", 1, duties_sha256(())), (None, None, None))
    assert news["share_ppm"] + public["share_ppm"] == 1_000_000
    assert rows(ledger, "running") == []


async def test_what_the_gate_left_out_is_recorded_with_its_grade_and_apart_what_the_tenant_does_not_see(
    client: httpx.AsyncClient, generating: Any, ledger: Journal
) -> None:
    generating(Generating(3))
    said = (await client.post(PATH, json={"prompt": "x"})).json()["flexgate"]
    (row,) = await ended(ledger)
    (catalogue,) = rows(ledger, "catalogues")
    assert row["catalogue"] == catalogue["number"]
    listed, hidden = excluded_of(catalogue["experts"], row["excluded"])
    assert listed == [(one["expert"], one["grade"]) for one in said["excluded"]] == [("math", "router")]
    assert hidden == [("secret", "unknown")]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_without_a_ledger_no_response_begins(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    refuse(ledger, monkeypatch, after=0)
    handler = generating(Generating(3, streamed=streamed))
    response = await client.post(PATH, json={"prompt": "x", "stream": streamed})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert handler.sent == []


async def test_the_engine_works_while_a_stream_is_registered_and_nothing_is_sent_before(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(EventStream, "stream_response", seen(EventStream.stream_response, sent))
    handler = generating(Generating(3, streamed=True))
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        asked = asyncio.create_task(client.post(PATH, json={"prompt": "x", "stream": True}))
        async with asyncio.timeout(4):
            await handler.begun.wait()
        await asyncio.sleep(0.05)
        assert (sent, handler.sent, asked.done()) == ([], [], False)
    response = await asked
    assert (response.status_code, handler.sent) == (200, [0, 1, 2])
    assert sent[0] == "http.response.start"


def seen(stream_response: Any, sent: list[str]) -> Any:
    """`stream_response` of a response, which notes what it sends."""

    async def respond(response: Any, send: Any) -> None:
        async def note(message: Any) -> None:
            sent.append(message["type"])
            await send(message)

        await stream_response(response, note)

    return respond


async def test_a_stream_whose_tokens_cannot_be_recorded_ends_with_the_reason(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(ledger, monkeypatch, after=2)
    handler = generating(Generating(9, streamed=True))
    response = await client.post(PATH, json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    assert len(handler.sent) < 3
    assert "ledger_unavailable" in response.text.splitlines()[-4]
    monkeypatch.undo()
    (row,) = await ended(ledger)
    assert (row["outcome"], row["completion_tokens"] >= len(handler.sent)) == ("ledger_unavailable", True)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_ledger_that_hangs_ends_requests_after_the_deadline_and_readiness_at_once(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr("flexgate.server.ledger.journal.ANSWER_SECONDS", 0.2)
    assert (await client.get("/ready")).status_code == 200
    generating(Generating(3, streamed=streamed))
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(10):
            for _ in range(2):
                response = await client.post(PATH, json={"prompt": "x", "stream": streamed})
                assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert (await client.get("/ready")).status_code == 503
    async with asyncio.timeout(10):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
    generating(Generating(3, streamed=streamed))
    assert (await client.post(PATH, json={"prompt": "x", "stream": streamed})).status_code == 200
    found = await ended(ledger, 2)
    assert sorted(row["outcome"] for row in found) == ["completed", "ledger_unavailable"]


async def test_a_request_that_is_refused_before_the_engine_is_not_in_the_ledger(
    client: httpx.AsyncClient, ledger: Journal
) -> None:
    response = await client.post(PATH, json={"prompt": "x", "flexgate": {"experts": {"only": ["math"]}}})
    assert response.status_code == 403
    other = ledger.register(Registration("other", 1, "t", "k", PATH, "m", 1, 1, ()))
    await other.registered()
    assert [row["request"] for row in rows(ledger, "running")] == ["other"]
    assert rows(ledger) == []


async def test_a_request_that_fails_is_recorded_as_stopped(
    client: httpx.AsyncClient, services: Any, handler: Any, ledger: Journal
) -> None:
    handler.result = RuntimeError("inside")
    response = await client.post(PATH, json={"prompt": "x"})
    assert response.status_code == 500
    (row,) = await ended(ledger)
    assert (row["outcome"], row["completion_tokens"], row["answer_sha256"]) == ("stopped", 0, None)


async def test_tokens_of_a_prompt_that_the_engine_has_not_come_to_are_not_recorded(
    client: httpx.AsyncClient, generating: Any, ledger: Journal
) -> None:
    class Ended(Generating):
        """The engine ends the request in the middle of its prompt."""

        async def _output(self, call: GatedCall, tokens: int) -> None:
            call.count_usage("r", "0_r", [3, 2, [3, 0, 0, 0, 3, 0, 0, 0], [0] * 8])
            call.failed = "expert_revoked"
            raise EngineGenerateError("the request was ended: expert_revoked")

    generating(Ended(3))
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "expert_revoked")
    (row,) = await ended(ledger)
    found = {name: row[name] for name in ("outcome", "prompt_tokens", "cached_tokens", "completion_tokens")}
    assert found == {"outcome": "expert_revoked", "prompt_tokens": 3, "cached_tokens": 2, "completion_tokens": 0}
    assert [(part["expert"], part["prompt_positions"]) for part in rows(ledger, "parts")] == [("public", 3)]


async def test_a_stopping_server_takes_no_request(client: httpx.AsyncClient, handler: Any, ledger: Journal) -> None:
    ledger.close()
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert not handler.seen
    with pytest.raises(LedgerError):
        ledger.register(Registration("other", 1, "t", "k", PATH, "m", 1, 1, ()))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_digests_are_those_of_both_bodies_byte_for_byte(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, streamed: bool
) -> None:
    generating(Generating(3, streamed=streamed))
    response = await client.post(PATH, json={"prompt": "x", "stream": streamed, "metadata": {"é": "😀"}})
    (row,) = await ended(ledger)
    assert row["prompt_sha256"] == hashlib.sha256(response.request.content).hexdigest()
    assert row["answer_sha256"] == hashlib.sha256(response.content).hexdigest()


async def test_an_answer_that_an_error_replaced_has_no_digest(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generation.headers

    def revoked_meanwhile(request: Any) -> Any:
        request.call.failed = "expert_revoked"
        return made(request)

    monkeypatch.setattr(generation, "headers", revoked_meanwhile)
    generating(Generating(3))
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "expert_revoked")
    (row,) = await ended(ledger)
    assert (row["outcome"], row["answer_sha256"]) == ("expert_revoked", None)


async def test_parts_name_the_packages_that_were_served(
    client: httpx.AsyncClient, services: Any, generating: Any, ledger: Journal
) -> None:
    services.client.refs = {name: replace(ref, package="a" * 64) for name, ref in services.client.refs.items()}
    generating(Generating(3))
    await client.post(PATH, json={"prompt": "x"})
    await ended(ledger)
    assert {part["package"] for part in rows(ledger, "parts")} == {"a" * 64}
