"""Threads for blocking work, so that no caller waits behind what others read.

Changes, and all that administrators and auditors do, have threads of their own. What tenants and owners read has
others, and of one key of theirs only so much may be waiting.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Final

from flexgate.policies.tenants import Role
from flexgate.server.auth import Principal
from flexgate.server.errors import ApiError

MOST_OF_ONE: Final = 8
"""Reads, and changes, of one tenant's or owner's key that run or wait at once."""
_OPERATORS: Final = frozenset({Role.ADMIN, Role.AUDITOR})
_THREADS: Final = ThreadPoolExecutor(4, "admin")
_READERS: Final = ThreadPoolExecutor(2, "admin-readers")
_under_way: Final[Counter[tuple[str, bool]]] = Counter()


async def in_turn(principal: Principal, writes: bool, work: Callable[..., Any], *arguments: Any) -> Any:
    """Blocking work for a caller, in its turn; raises `ApiError` (429) when too much of its key is under way."""
    if principal.role in _OPERATORS:
        return await in_thread(work, *arguments)
    key = principal.key_id, writes
    if _under_way[key] >= MOST_OF_ONE:
        raise _too_many()
    _under_way[key] += 1
    try:
        return await _run(_THREADS if writes else _READERS, work, *arguments)
    finally:
        _under_way[key] -= 1
        if not _under_way[key]:
            del _under_way[key]


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Blocking work, away from the loop and from the threads that keep the policy fresh."""
    return await _run(_THREADS, work, *arguments)


async def _run(threads: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def _too_many() -> ApiError:
    return ApiError(
        f"This key may have {MOST_OF_ONE} such requests to the administration under way at once. "
        "Try again once one of them has been answered.",
        status=HTTPStatus.TOO_MANY_REQUESTS,
        code="rate_limit_exceeded",
        type_="requests",
        headers={"retry-after": "1"},
    )
