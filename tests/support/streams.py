"""A load of streams on a server of this machine: so many are open at any time, until it is left."""

import json
import selectors
import socket
import threading
from collections import Counter
from typing import Any, Self
from urllib.parse import urlsplit

MOST = 200


class Streams:
    """Keeps `count` streamed answers open, and asks anew where one has ended; use it as a context manager."""

    def __init__(self, url: str, key: str, path: str, body: dict[str, Any], *, count: int = MOST) -> None:
        assert count <= MOST
        parts = urlsplit(url)
        assert parts.hostname == "127.0.0.1"
        assert parts.port is not None
        self._address = parts.hostname, parts.port
        self._count = count
        content = json.dumps({**body, "stream": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        self._request = head.encode() + content
        self._ended = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.statuses: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._open()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _open(self) -> None:
        sock = socket.create_connection(self._address, timeout=60)
        sock.sendall(self._request)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, [False])

    def _run(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(0.1):
                self._read(key)

    def _read(self, key: selectors.SelectorKey) -> None:
        sock, begun = key.fileobj, key.data
        assert isinstance(sock, socket.socket)
        try:
            data = sock.recv(1 << 16)
        except OSError:
            data = b""
        if data and not begun[0]:
            begun[0] = True
            self.statuses[data[9:12].decode()] += 1
        if not data:
            self._selector.unregister(sock)
            sock.close()
            self._open()
