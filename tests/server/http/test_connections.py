"""A client that never comes to the end of a request's head is not waited for, nor kept in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from flexgate.server.http import connections
from flexgate.server.http.connections import MAX_HEAD_BYTES, MOST_PIPELINED

pytestmark = pytest.mark.asyncio

SECONDS = 0.3
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def pour(writer: asyncio.StreamWriter, piece: bytes, pieces: int) -> int:
    """Send ``piece`` over and over; how many went out before the server hung up."""
    for count in range(pieces):
        try:
            writer.write(piece)
            await writer.drain()
        except ConnectionError:
            return count
    return pieces


async def answers(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server hangs up."""
    said = b""
    async with asyncio.timeout(10):
        try:
            while piece := await reader.read(1 << 16):
                said += piece
        except ConnectionResetError:
            pass
    return said


@pytest.mark.parametrize("begin", [HEALTH, b"GET /", b"\r\n"], ids=["headers", "path", "nothing"])
async def test_a_head_without_end_is_refused(urls: tuple[str, str], begin: bytes) -> None:
    async with connected(urls[0]) as (reader, writer):
        writer.write(begin)
        piece = b"\r\n" * 512 if begin == b"\r\n" else b"a: b\r\n" * 170 if begin == HEALTH else b"a" * 1024
        writer.write(piece * (MAX_HEAD_BYTES // 1024 + 8))
        said = await answers(reader)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "head_too_large"


async def test_trailers_without_end_are_cut_off(urls: tuple[str, str]) -> None:
    async with connected(urls[0]) as (reader, writer):
        writer.write(POST + b"1\r\n{\r\n0\r\n")
        pouring = asyncio.ensure_future(pour(writer, b"a: " + b"b" * 1024 + b"\r\n", 100_000))
        await answers(reader)
        assert await asyncio.wait_for(pouring, 10) < 10_000


async def test_who_sends_no_whole_head_in_time_is_hung_up_on(
    urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", SECONDS)
    async with connected(urls[0]) as (reader, _):
        assert await answers(reader) == b""
    async with connected(urls[0]) as (reader, writer):
        pouring = asyncio.ensure_future(drip(writer, HEALTH))
        assert await answers(reader) == b""
        pouring.cancel()
    async with connected(urls[0]) as (reader, writer):  # a first request does not win time for a second
        writer.write(HEALTH + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        pouring = asyncio.ensure_future(drip(writer, HEALTH))
        await answers(reader)
        pouring.cancel()


async def drip(writer: asyncio.StreamWriter, head: bytes) -> None:
    for byte in head * 100:
        writer.write(bytes([byte]))
        await asyncio.sleep(SECONDS / 20)


async def test_what_is_a_request_after_all_is_answered(urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", SECONDS)
    async with connected(urls[0]) as (reader, writer):
        for padding in (b"", b"a: " + b"b" * (MAX_HEAD_BYTES // 2) + b"\r\n"):
            writer.write(HEALTH[:20])
            await asyncio.sleep(SECONDS / 3)
            writer.write(HEALTH[20:] + padding + b"\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert head.startswith(b"HTTP/1.1 200 ")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)


async def test_a_body_may_be_slower_and_longer_than_a_head(
    urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", SECONDS)
    async with connected(urls[0]) as (reader, writer):
        head = b"authorization: Bearer sk-t\r\ncontent-type: application/json\r\n\r\n"
        writer.write(POST[:-2] + head)
        for _ in range(4):
            await asyncio.sleep(SECONDS / 2)
            writer.write(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
        writer.write(b"2\r\n[]\r\n0\r\n\r\n")
        said = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    assert b"HTTP/1.1 400 " in said


ASK = b'{"prompt": "x"}'


@pytest.mark.parametrize("waiting", [MOST_PIPELINED, MOST_PIPELINED + 1])
async def test_so_many_requests_may_wait_for_an_earlier_response(urls: tuple[str, str], waiting: int) -> None:
    async with connected(urls[0]) as (reader, writer):
        writer.write((HEALTH + b"\r\n") * waiting + HEALTH + b"connection: close\r\n\r\n")
        said = await answers(reader)
    assert said.count(b"HTTP/1.1 200 OK") == (waiting + 1 if waiting == MOST_PIPELINED else 0)


async def test_requests_without_end_are_not_kept_until_they_are_answered(urls: tuple[str, str]) -> None:
    async with connected(urls[0]) as (reader, writer):
        writer.write((HEALTH + b"\r\n") * 2000)
        assert (await answers(reader)).count(b"HTTP/1.1 200 OK") <= MOST_PIPELINED


COMPLETION = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer sk-t\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ASK), ASK)
)


class Waiting:
    """Stands for vLLM's handler: answers once it is told to."""

    def __init__(self) -> None:
        self.started, self.go, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, *_: Any) -> Any:
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise ValueError("answered")


@pytest.fixture
def waiting(services: Any) -> Waiting:
    handler = Waiting()
    services.handlers.completion.create_completion = handler
    return handler


async def test_a_half_closed_connection_gets_its_answer_and_ends(urls: tuple[str, str], waiting: Waiting) -> None:
    async with connected(urls[0]) as (reader, writer):
        writer.write(COMPLETION)
        await waiting.started.wait()
        writer.write_eof()
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        waiting.go.set()
        said = await answers(reader)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"answered" in said
    assert not waiting.cancelled.is_set()


async def test_a_client_that_has_gone_altogether_ends_its_request(
    urls: tuple[str, str], waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PROBE_SECONDS", 0.05)
    async with connected(urls[0]) as (_, writer):
        writer.write(COMPLETION)
        await waiting.started.wait()
    async with asyncio.timeout(10):
        await waiting.cancelled.wait()


async def test_a_client_that_closes_before_its_request_is_whole_has_gone(urls: tuple[str, str]) -> None:
    async with connected(urls[0]) as (reader, writer):
        writer.write(COMPLETION[:-4])
        writer.write_eof()
        assert await answers(reader) == b""


STREAM = json.dumps({"prompt": "x", "stream": True}).encode()
STREAMED = COMPLETION.replace(b"-length: %d" % len(ASK), b"-length: %d" % len(STREAM)).replace(ASK, STREAM)


class Streaming:
    """Stands for vLLM's handler: streams an event, and another one once it is told to."""

    def __init__(self) -> None:
        self.go, self.closed = asyncio.Event(), asyncio.Event()

    async def __call__(self, *_: Any) -> Any:
        return self._events()

    async def _events(self) -> AsyncIterator[str]:
        try:
            yield 'data: {"choices":[{"index":0,"text":"first"}]}\n\n'
            await self.go.wait()
            yield 'data: {"choices":[{"index":0,"text":"second","finish_reason":"stop"}]}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            self.closed.set()


@pytest.fixture
def streaming(services: Any, monkeypatch: pytest.MonkeyPatch) -> Streaming:
    monkeypatch.setattr(connections, "PROBE_SECONDS", 0.05)
    handler = Streaming()
    services.handlers.completion.create_completion = handler
    return handler


async def test_a_half_closed_event_stream_goes_on_between_comments_until_its_end(
    urls: tuple[str, str], streaming: Streaming
) -> None:
    async with connected(urls[0]) as (reader, writer), asyncio.timeout(10):
        writer.write(STREAMED)
        await reader.readuntil(b"first")
        writer.write_eof()
        for _ in range(3):
            await reader.readuntil(b"9\r\n: probe\n\n\r\n")
        assert not streaming.closed.is_set()
        streaming.go.set()
        said = await answers(reader)
    assert b"second" in said
    assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_an_event_stream_whose_client_has_gone_between_two_events_is_closed(
    urls: tuple[str, str], streaming: Streaming
) -> None:
    async with connected(urls[0]) as (reader, writer), asyncio.timeout(10):
        writer.write(STREAMED)
        await reader.readuntil(b"first")
    async with asyncio.timeout(10):
        await streaming.closed.wait()


async def test_a_stream_of_a_job_whose_client_has_gone_is_closed(
    urls: tuple[str, str], services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PROBE_SECONDS", 0.05)
    job = services.experts.jobs.open("package", "key_sk-admin", "key_sk-admin")
    ask = f"GET /v1/expert_jobs/{job.id}?stream=true HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-admin\r\n\r\n"
    async with connected(urls[1]) as (reader, writer), asyncio.timeout(10):
        writer.write(ask.encode())
        await reader.readuntil(b"running")
    async with asyncio.timeout(10):
        while job._changed._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
