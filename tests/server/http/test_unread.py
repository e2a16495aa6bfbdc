"""A client that takes nothing of what waits for it is cut off, whatever it sends; one that reads slowly is not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from flexgate.server.http import connections
from flexgate.server.http.connections import KNOWN, BoundedProtocol

SECONDS = 20
LARGE = 8 << 20
LOW_WATER = 16 << 10
"""A transport resumes writing when no more than this waits."""
Runner = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.3)
    return request.param


async def respond(scope: Any, receive: Any, send: Any) -> None:
    """As many bytes as the path says, at once; without end for ``/0``; ``?known`` stands for a known caller's key."""
    size = int(scope["path"][1:])
    if scope["query_string"]:
        scope[KNOWN] = True
    length = [(b"content-length", b"%d" % size)] if size else []
    await send({"type": "http.response.start", "status": 200, "headers": length})
    while not size and not scope["state"]["lost"].is_set():
        await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"x" * size})


class Server:
    """Serves connections with small send buffers, or with those that the system gives."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.lost = asyncio.Event()
        self.protocol: BoundedProtocol

    @property
    def waits(self) -> int:
        """Bytes that wait in the transport of the last connection."""
        return self.protocol.transport.get_write_buffer_size()


@asynccontextmanager
async def served(*, small: bool) -> AsyncIterator[Server]:
    config = uvicorn.Config(respond, http=BoundedProtocol, ws="none", log_config=None, lifespan="off")
    state = ServerState()

    class Told(BoundedProtocol):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            server.lost.set()

    def connect() -> BoundedProtocol:
        server.protocol = Told(config, state, {"lost": server.lost})
        return server.protocol

    with socket.create_server(("127.0.0.1", 0)) as listening:
        if small:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener = await asyncio.get_running_loop().create_server(connect, sock=listening)
        server = Server(listening.getsockname())
        try:
            async with asyncio.timeout(SECONDS):
                yield server
        finally:
            listener.close()
            if not server.lost.is_set():
                server.protocol.transport.abort()
                await server.lost.wait()


@contextmanager
def connected(server: Server, *, buffer: int = 4096) -> Iterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.connect(server.address)
        client.setblocking(False)
        yield client


def get(size: int, *, close: bool = False, known: bool = False) -> bytes:
    query, end = "?known" if known else "", "connection: close\r\n" if close else ""
    return f"GET /{size}{query} HTTP/1.1\r\nhost: localhost\r\n{end}\r\n".encode()


async def begun(server: Server, client: socket.socket, request: bytes) -> None:
    """Ask; come back when bytes wait."""
    await asyncio.get_running_loop().sock_sendall(client, request)
    await asyncio.get_running_loop().sock_recv(client, 1)
    while not server.waits:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("size", [0, LARGE], ids=["under way", "written"])
def test_a_client_that_sends_more_requests_and_takes_nothing_is_cut_off(run: Runner, size: int) -> None:
    async def scenario() -> None:
        async with served(small=True) as server:
            with connected(server) as client:
                await begun(server, client, get(size))
                while not server.lost.is_set():
                    with suppress(BlockingIOError, ConnectionError):
                        client.send(get(1))
                    await asyncio.sleep(0.01)

    run(scenario())


@pytest.mark.parametrize("close", [True, False], ids=["close", "keep alive"])
def test_a_client_that_leaves_the_last_bytes_of_a_response_is_cut_off(run: Runner, close: bool) -> None:
    async def scenario() -> None:
        async with served(small=True) as server:
            with connected(server) as client:
                await begun(server, client, get(1 << 18, close=close))
                while server.waits > LOW_WATER:
                    await asyncio.get_running_loop().sock_recv(client, 512)
                    await asyncio.sleep(0)  # the server sends what there is room for now
                assert server.waits
                await server.lost.wait()

    run(scenario())


def test_a_client_that_reads_less_than_the_kernel_holds_is_not_cut_off(run: Runner) -> None:
    async def scenario() -> None:
        async with served(small=False) as server:
            with connected(server, buffer=1 << 15) as client:
                await begun(server, client, get(4 * LARGE))
                for _ in range(30):
                    await asyncio.sleep(connections.UNREAD_SECONDS / 6)
                    read = 0
                    while read < 1 << 15:
                        read += len(await asyncio.get_running_loop().sock_recv(client, (1 << 15) - read))
                assert not server.lost.is_set()
                assert server.waits

    run(scenario())


def test_of_many_idle_connections_one_whose_response_is_unread_makes_room(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", SECONDS * 10)
    monkeypatch.setattr(connections, "MOST_IDLE", 1)

    async def scenario() -> None:
        async with served(small=True) as server:
            with connected(server) as client:
                await begun(server, client, get(LARGE))
                with connected(server):
                    await server.lost.wait()

    run(scenario())


@pytest.mark.parametrize(
    ("requests", "known"),
    [
        (get(0), False),
        (get(LARGE, known=True) + get(0), False),
        (get(0, known=True), True),
        (get(LARGE) + get(0, known=True), True),
    ],
    ids=["no key", "no key after a key", "a key", "a key after no key"],
)
def test_of_many_idle_connections_one_that_leaves_a_response_without_a_key_unread_makes_room(
    run: Runner, monkeypatch: pytest.MonkeyPatch, requests: bytes, known: bool
) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", SECONDS * 10)
    monkeypatch.setattr(connections, "MOST_IDLE", 1)

    async def scenario() -> None:
        async with served(small=True) as server:
            with connected(server) as client:
                await begun(server, client, requests)
                held = server.protocol
                while not held.flow.write_paused or len(held._cycles) > 1 or held.is_counted() != known:
                    await asyncio.sleep(0.001)
                client.send(get(1))
                while len(held._cycles) < 2:
                    await asyncio.sleep(0.001)
                with connected(server), connected(server):
                    await server.lost.wait()
                    assert held.transport.is_closing() != known

    run(scenario())
