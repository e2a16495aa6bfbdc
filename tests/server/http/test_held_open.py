"""What clients hold open is bounded: neither strangers nor one caller leave others, or an emergency, no connection."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from flexgate.server.experts import jobs
from flexgate.server.http import auth, connections
from flexgate.server.http.connections import BoundedProtocol

pytestmark = pytest.mark.asyncio

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
EVENT = b'data: {"choices":[{"index":0,"text":"' + b"x" * 50_000 + b'"}]}\n\n'
SECONDS = 20
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def completion(key: str, body: Any, *, sent: bool = True) -> bytes:
    """A request for tokens, with or without its body."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + (content if sent else b"")


async def connected(stack: AsyncExitStack, url: str, *, small: bool = False) -> Connection:
    """A connection; with a small buffer, the server learns soon how much of a response was read."""
    sock = socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
    sock.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    reader, writer = await asyncio.open_connection(sock=sock)
    stack.callback(writer.close)
    return reader, writer


async def asked(connection: Connection, request: bytes) -> tuple[int, bytes]:
    """Status and body of a response."""
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low bounds; before `urls`, whose server reads them."""
    monkeypatch.setattr(connections, "MOST_IDLE", 8)
    monkeypatch.setattr(auth, "MOST_IN_PROGRESS", 4)


class Waiting:
    """Stands for vLLM's handler: answers once it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = 0

    async def __call__(self, *_: Any) -> Any:
        self.begun += 1
        await self.go.wait()
        raise ValueError("answered")


@pytest.fixture
def waiting(services: Any) -> Waiting:
    services.handlers.completion.create_completion = handler = Waiting()
    return handler


@pytest.mark.parametrize("first", [b"", HEALTH[:20], HEALTH], ids=["silent", "half a head", "after a request"])
async def test_of_many_idle_connections_the_longest_idle_make_room(
    few: None, urls: tuple[str, str], waiting: Waiting, first: bytes
) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        busy = await connected(stack, urls[0])
        busy[1].write(completion("sk-t", {"prompt": "x"}))
        while not waiting.begun:
            await asyncio.sleep(0.001)
        idle = []
        for _ in range(20):
            idle.append(connection := await connected(stack, urls[0]))
            if first == HEALTH:
                assert (await asked(connection, HEALTH))[0] == 200
            connection[1].write(b"" if first == HEALTH else first)
        assert (await asked(await connected(stack, urls[1]), HEALTH))[0] == 200
        for reader, _ in idle[:12]:
            assert await reader.read() == b""
        assert (await asked(idle[-1], HEALTH[len(first) % len(HEALTH) :]))[0] == 200
        waiting.go.set()
        head = await busy[0].readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [True, False], ids=["waits for the engine", "its body does not come"])
async def test_one_caller_has_so_many_requests_in_progress_and_takes_nobody_elses(
    few: None, urls: tuple[str, str], waiting: Waiting, sent: bool
) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        held = [await connected(stack, urls[0]) for _ in range(4)]
        for _, writer in held:
            writer.write(completion("sk-t", {"prompt": "x"}, sent=sent))
        while True:  # those four may be on their way still
            status, body = await asked(await connected(stack, urls[0]), completion("sk-t", {"nonsense": 1}))
            if status == 429:
                break
            assert status == 400
        error = json.loads(body)["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
        assert (await asked(await connected(stack, urls[0]), completion("sk-u", {"nonsense": 1})))[0] == 400
        for reader, writer in held:
            if not sent:
                writer.write(completion("sk-t", {"prompt": "x"}).rpartition(b"\r\n\r\n")[2])
            waiting.go.set()
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        assert (await asked(await connected(stack, urls[0]), completion("sk-t", {"nonsense": 1})))[0] == 400


class Endless:
    """Stands for vLLM's handler: streams large events without end."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.made = 0

    async def __call__(self, *_: Any) -> Any:
        return self._events()

    async def _events(self) -> AsyncIterator[str]:
        try:
            while True:
                self.made += 1
                yield EVENT.decode()
                await asyncio.sleep(0)
        finally:
            self.closed.set()


@pytest.fixture
def endless(services: Any, monkeypatch: pytest.MonkeyPatch) -> Endless:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.3)
    services.handlers.completion.create_completion = handler = Endless()
    return handler


async def test_a_client_that_reads_nothing_any_more_is_cut_off(urls: tuple[str, str], endless: Endless) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        reader, writer = await connected(stack, urls[0])
        writer.write(completion("sk-t", {"prompt": "x", "stream": True}))
        await reader.readuntil(b'"text"')
        await endless.closed.wait()


@pytest.mark.parametrize("next_request", [b"", HEALTH], ids=["alone", "before another request"])
async def test_a_stream_ends_with_its_connection(urls: tuple[str, str], endless: Endless, next_request: bytes) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        reader, writer = await connected(stack, urls[0])
        writer.write(completion("sk-t", {"prompt": "x", "stream": True}) + next_request)
        await reader.readuntil(b'"text"')
        writer.close()
        await endless.closed.wait()


async def test_a_client_that_reads_slowly_is_not_cut_off(
    urls: tuple[str, str], endless: Endless, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [], BoundedProtocol._look

    def noted(connection: BoundedProtocol, taken: int | None = None) -> None:
        looks.append(taken is not None)
        look(connection, taken)

    monkeypatch.setattr(BoundedProtocol, "_look", noted)
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        reader, writer = await connected(stack, urls[0], small=True)
        writer.write(completion("sk-t", {"prompt": "x", "stream": True}))
        while looks.count(True) < 3:  # bytes have waited since the look before
            await asyncio.sleep(connections.UNREAD_SECONDS / 5)
            await reader.readexactly(len(EVENT))
        assert not endless.closed.is_set()


async def test_a_stream_that_its_client_leaves_unread_is_not_taken_for_idle(
    few: None, urls: tuple[str, str], endless: Endless, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", SECONDS * 10)
    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        reader, writer = await connected(stack, urls[0])
        writer.write(completion("sk-t", {"prompt": "x", "stream": True}))
        await reader.readuntil(b'"text"')
        made = 0
        while endless.made > made:  # until nothing more is taken from it
            made = endless.made
            await asyncio.sleep(0.1)
        idle = [await connected(stack, urls[0]) for _ in range(20)]
        assert await idle[0][0].read() == b""
        for _ in range(made + 10):
            await reader.readexactly(len(EVENT))


async def test_a_caller_has_so_many_streams_of_jobs_and_another_caller_has_its_own(
    urls: tuple[str, str], services: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MOST_WATCHED", 2)
    job = services.experts.jobs.open("package", "key_sk-owner", "owner gazette")

    def request(key: str) -> bytes:
        head = f"GET /v1/expert_jobs/{job.id}?stream=true HTTP/1.1\r\nhost: localhost\r\n"
        return f"{head}authorization: Bearer {key}\r\n\r\n".encode()

    async with AsyncExitStack() as stack, asyncio.timeout(SECONDS):
        streams = [await connected(stack, urls[1]) for _ in range(2)]
        for reader, writer in streams:
            writer.write(request("sk-owner"))
            await reader.readuntil(b"running")
        status, body = await asked(await connected(stack, urls[1]), request("sk-owner"))
        assert (status, json.loads(body)["error"]["code"]) == (429, "rate_limit_exceeded")
        admin = await connected(stack, urls[1])
        admin[1].write(request("sk-admin"))
        await admin[0].readuntil(b"running")
        streams[0][1].close()
        while True:
            reader, writer = await connected(stack, urls[1])
            writer.write(request("sk-owner"))
            if b" 200 " in await reader.readuntil(b"\r\n"):
                break
            await asyncio.sleep(0.01)
