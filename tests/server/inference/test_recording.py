"""What a response used is in the ledger before any of it leaves, and nothing leaves that is not."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.v1.engine.exceptions import EngineGenerateError

from flexgate.server.engine.frontend.calls import CURRENT_CALL, GatedCall
from flexgate.server.ledger.entries import Registration
from flexgate.server.ledger.errors import LedgerError
from flexgate.server.ledger.journal import Journal

pytestmark = pytest.mark.asyncio

PATH = "/v1/completions"
SLOTS = 4


class Generating:
    """Stands for vLLM's handlers over an engine: each output is recorded before it goes on, as the client does it."""

    def __init__(self, tokens: int, *, streamed: bool = False) -> None:
        self.tokens = tokens
        self.streamed = streamed
        self.sent: list[int] = []

    async def __call__(self, *_: Any) -> Any:
        call = CURRENT_CALL.get()
        assert call is not None
        call._names = call.name_slots((None,) * SLOTS)
        call.count_prompt("r", 5)
        if self.streamed:
            return self._events(call)
        await self._output(call, self.tokens)
        choice = CompletionResponseChoice(index=0, text="hi", finish_reason="length")
        return CompletionResponse(model="tiny", choices=[choice], usage=UsageInfo())

    async def _output(self, call: GatedCall, tokens: int) -> None:
        call.count_new(tokens)
        completion = [tokens, tokens, 0, 0] * 2
        call.count_usage("r", "0_r", [5, 2, [5, 0, 0, 0, 5, 0, 0, 0], completion])
        assert call.record is not None
        if not await call.record():
            call.failed = "ledger_unavailable"
            raise EngineGenerateError("the request was ended: ledger_unavailable")

    async def _events(self, call: GatedCall) -> AsyncIterator[str]:
        for number in range(self.tokens):
            try:
                await self._output(call, 1)
            except EngineGenerateError:
                error = create_error_response("inside", status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
                yield f"data: {error.model_dump_json()}\n\n"
                yield "data: [DONE]\n\n"
                return
            self.sent.append(number)
            yield f'data: {{"choices":[{{"index":0,"text":"{number}","finish_reason":null}}]}}\n\n'
        yield 'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n'
        yield "data: [DONE]\n\n"


@pytest.fixture
def generating(services: Any) -> Any:
    """Install a handler for completions, and return it."""

    def answer(handler: Generating) -> Generating:
        services.handlers.completion = SimpleNamespace(create_completion=handler)
        return handler

    return answer


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
    assert [(part["agreement"], part["agreement_version"]) for part in (news, public)] == [("a-news", 1), (None, None)]
    assert news["share_ppm"] + public["share_ppm"] == 1_000_000
    assert rows(ledger, "running") == []


def refuse(ledger: Journal, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the journal write so many batches more."""
    real, left = ledger._insert, [None] * after

    def insert(batch: Any) -> None:
        if not left:
            raise sqlite3.OperationalError("database or disk is full")
        left.pop()
        real(batch)

    monkeypatch.setattr(ledger, "_insert", insert)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_without_a_ledger_no_response_begins(
    client: httpx.AsyncClient, generating: Any, ledger: Journal, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    refuse(ledger, monkeypatch, after=0)
    handler = generating(Generating(3, streamed=streamed))
    response = await client.post(PATH, json={"prompt": "x", "stream": streamed})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert handler.sent == []


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
    assert (row["outcome"], row["completion_tokens"]) == ("stopped", 0)


async def test_a_stopping_server_takes_no_request(client: httpx.AsyncClient, handler: Any, ledger: Journal) -> None:
    ledger.close()
    response = await client.post(PATH, json={"prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert not handler.seen
    with pytest.raises(LedgerError):
        ledger.register(Registration("other", 1, "t", "k", PATH, "m", 1, 1, ()))
