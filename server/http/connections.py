"""Close connections whose clients do not finish a request's head, or do not read its response.

uvicorn reads a head of any length, for as long as it takes, before anything else sees the request: its timer for idle
connections starts with the first response (uvicorn/protocols/http/httptools_impl.py). It has no bound on connections,
none on how long a client may leave a response unread, and none on how many requests it may send before: it reads on
after each response, however many requests still wait for theirs.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import sys
from collections import deque
from http import HTTPStatus
from typing import Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from flexgate.server.http.errors import ApiError

MAX_HEAD_BYTES: Final = 64 * 1024
HEAD_SECONDS = 30.0
PROBE_SECONDS = 1.0
UNREAD_SECONDS = 60.0
"""How long a client may take nothing of what waits to be sent to it; it is cut off within twice as long."""
MOST_IDLE: Final = 4096
"""Connections without a request, where the process may have many descriptors; a quarter of them elsewhere."""
MOST_PIPELINED: Final = 16
"""Requests of one connection that wait until an earlier one has its response; a client that sends more is cut off."""
KNOWN: Final = "flexgate.known"
"""The scope's key of a request whose caller is known, and whose requests are counted."""
EVENT_STREAM: Final = "flexgate.event_stream"
"""The scope's key of a response whose body is server-sent events."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT: Final = b"9\r\n: probe\n\n\r\n"


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, their source is closed."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        scope[EVENT_STREAM] = True
        try:
            await super().__call__(scope, receive, send)
        finally:
            close = getattr(self.body_iterator, "aclose", None)
            if close is not None:
                await close()


class Idle:
    """A server's connections without a request, the longest idle first. Where there are too many, it is aborted.

    One whose response has not been read is among them, and also before the response is written if its caller is not
    known. So it is not closed: that would keep it until the client reads.
    """

    def __init__(self) -> None:
        self._most = min(MOST_IDLE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._connections: dict[BoundedProtocol, None] = {}

    def add(self, connection: BoundedProtocol) -> None:
        """Count a connection as idle from now on."""
        self._connections[connection] = None
        while len(self._connections) > self._most:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            if not oldest.is_counted():
                oldest.transport.abort()

    def discard(self, connection: BoundedProtocol) -> None:
        """Count a connection as idle no more, if it was."""
        self._connections.pop(connection, None)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with limits on the size and time of a head, and on the time of a response.

    A head, the trailers of a body, and whatever else is neither a head nor a part of a body may have ``MAX_HEAD_BYTES``
    and as much again. While no response is under way, a whole head has to come within ``HEAD_SECONDS``.
    A client that takes nothing for ``UNREAD_SECONDS`` while bytes wait for it is cut off, whatever it sends, and so is
    one that sends more than ``MOST_PIPELINED`` requests before it has the first response.
    """

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _idle: Idle
    _pending = 0  # bytes since the last head, or the last part of a body
    _got_on = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._idle = self.server_state.__dict__.setdefault("idle", Idle())
        self._cycles: deque[RequestResponseCycle] = deque()  # without a whole response, the one under way first
        self._await_head()
        self._idle.add(self)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        self._idle.discard(self)
        if self._unread is not None:
            self._unread.cancel()
        for cycle in self._cycles:  # uvicorn tells the last one
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Send the response that is under way, though the client has closed its sending side; close after it.

        A client that disconnected altogether looks the same, but a write to it is answered with a reset.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.pipeline:
            return False
        if self.scope["http_version"] != "1.1":
            return False  # nothing can be sent between the parts of its response
        cycle.keep_alive = False
        self._probe(cycle)
        return True

    def _probe(self, cycle: RequestResponseCycle) -> None:
        """Find out whether a half-closed client still reads: the write after a reset fails."""
        if cycle.response_complete or self.transport.is_closing():
            return
        if not cycle.response_started:
            self.transport.write(_CONTINUE)
        elif cycle.chunked_encoding and EVENT_STREAM in cycle.scope:
            self.transport.write(_COMMENT)
        self.loop.call_later(PROBE_SECONDS, self._probe, cycle)

    def data_received(self, data: bytes) -> None:
        """Parse it piece by piece, and count what was neither a head nor a part of a body."""
        for start in range(0, len(data), MAX_HEAD_BYTES):
            piece = data[start : start + MAX_HEAD_BYTES]
            self._got_on = False
            super().data_received(piece)
            if self.transport.is_closing():
                return
            self._pending = 0 if self._got_on else self._pending + len(piece)
            if self._pending > MAX_HEAD_BYTES:
                self._refuse()
            elif self._is_idle():
                self._await_head()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        if len(self.pipeline) >= MOST_PIPELINED:
            self.transport.abort()
        if self.transport.is_closing():
            return
        self._got_on = True
        self._stop_waiting()
        if not self._cycles and not self.flow.write_paused:
            self._idle.discard(self)
        super().on_headers_complete()
        self._cycles.append(self.cycle)

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to read the responses before it."""
        self._cycles.popleft()
        super().on_response_complete()
        if self._is_idle() or self.flow.write_paused:
            self._idle.add(self)

    def pause_writing(self) -> None:
        """Count a connection as idle whose client does not read the response, unless its caller's are counted."""
        super().pause_writing()
        if not self.is_counted():
            self._idle.add(self)

    def is_counted(self) -> bool:
        """Whether the request whose response is under way is counted for its caller."""
        return bool(self._cycles) and KNOWN in self._cycles[0].scope

    def on_body(self, body: bytes) -> None:
        """A part of a body came."""
        self._got_on = True
        super().on_body(body)

    def _look(self, taken: int | None = None) -> None:
        """Cut off a client that has taken nothing since the last look; ``taken`` is None if nothing waited then."""
        now = _acknowledged(self.transport) if self.transport.get_write_buffer_size() else None
        if now is not None and now == taken:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(UNREAD_SECONDS, self._look, now)

    def _is_idle(self) -> bool:
        return not self._cycles

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self) -> None:
        if self._is_idle():
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            error = ApiError(
                f"The head of a request may have at most {MAX_HEAD_BYTES} bytes.", status=status, code="head_too_large"
            )
            body = json.dumps(error.body()).encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


def _acknowledged(transport: asyncio.Transport) -> int:
    """How many bytes the other side has acknowledged: ``tcpi_bytes_acked`` (linux/tcp.h).

    The buffers of this side do not tell: the kernel takes more only once a third of its own, of megabytes, is free.
    """
    info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    return int.from_bytes(info[120:128], sys.byteorder)
