"""SHA-256 of many tensors, computed in a thread beside the reading, checking and writing of them."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

SMALL: Final = 1 << 16
"""Bytes that are hashed sooner than handed to a thread."""


class Digests:
    """Digests by name; without ``enabled`` it does nothing."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._sums: dict[str, Any] = {}
        self._running: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()

    def add(self, key: str, chunk: memoryview) -> None:
        """Begin to take in a chunk, which must not change before the next call returns."""
        self.wait()
        if not self.enabled:
            return
        update = self._sums.setdefault(key, hashlib.sha256()).update
        if len(chunk) < SMALL:
            update(chunk)
        else:
            self._running = self._pool.submit(update, chunk)

    def wait(self) -> None:
        """Until the last chunk is taken in."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def hex(self, key: str) -> str:
        """The digest of one tensor."""
        self.wait()
        digest: str = self._sums[key].hexdigest()
        return digest
