"""Requests in progress: a caller has so many at once, whatever they wait for, so that others have connections left."""

from __future__ import annotations

import resource
from collections import Counter
from typing import Final

from flexgate.server.http.errors import ApiError, TooMany

MOST_OF_ONE: Final = 1024
"""Of one project or owner, where the process may have many descriptors; a quarter of them elsewhere."""


class InProgress:
    """How many requests of each caller are in progress, by `Principal.limited_with`."""

    def __init__(self) -> None:
        self._most = min(MOST_OF_ONE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._of: Counter[str] = Counter()

    def enter(self, caller: str) -> None:
        """Count one more request; `leave` must follow. Raises `ApiError` (429) if the caller has as many as it may."""
        if self._of[caller] >= self._most:
            raise _too_many(self._most)
        self._of[caller] += 1

    def leave(self, caller: str) -> None:
        """Count one request less."""
        self._of[caller] -= 1
        if not self._of[caller]:
            del self._of[caller]


def _too_many(most: int) -> ApiError:
    return TooMany(
        f"{most} requests of this project or owner are in progress, which is the limit. "
        "Try again when one has finished.",
        code="rate_limit_exceeded",
        type_="requests",
        headers={"retry-after": "1"},
    )
