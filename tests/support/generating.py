"""A handler that generates as vLLM's do over an engine, and a ledger that stops to take anything."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import pytest
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.v1.engine.exceptions import EngineGenerateError

from flexgate.server.engine.frontend.calls import CURRENT_CALL, GatedCall
from flexgate.server.ledger.journal import Journal

PATH = "/v1/completions"
SLOTS = 4


class Generating:
    """Stands for vLLM's handlers over an engine: each output is recorded before it goes on, as the client does it."""

    def __init__(self, tokens: int, *, streamed: bool = False) -> None:
        self.tokens = tokens
        self.streamed = streamed
        self.begun = asyncio.Event()
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
        self.begun.set()
        call.count_new(tokens)
        completion = [tokens, tokens, 0, 0] * 2
        call.count_usage("r", "0_r", [5, 2, [5, 0, 0, 0, 5, 0, 0, 0], completion])
        if call.record is not None and not await call.record():
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


def refuse(ledger: Journal, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the journal write so many batches more."""
    real, left = ledger._insert, [None] * after

    def insert(*batch: Any) -> None:
        if not left:
            raise sqlite3.OperationalError("database or disk is full")
        left.pop()
        real(*batch)

    monkeypatch.setattr(ledger, "_insert", insert)
