"""Threads for blocking work, so that no caller waits behind what others read or change.

Changes of administrators have threads of their own, and so has what administrators and auditors read. What tenants and
owners read or change has others, and of one project or owner only so much may be waiting. Sums over the ledger have
threads of their own, too, of which each key takes one at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from flexgate.policies.documents import Role
from flexgate.server.http.auth import Principal
from flexgate.server.http.errors import ApiError, TooMany
from flexgate.server.policy.executors import CHANGES, OTHERS_CHANGES, OTHERS_READS, READS, STATEMENTS, USAGE, run_in

P = ParamSpec("P")
T = TypeVar("T")

AT_ONCE_OF_ONE: Final = 8
MOST_OF_ONE: Final = 64
"""Reads, and changes, of one project or owner that are in the threads at once, and those with what waits for them."""
MOST_SUMS_OF_ONE: Final = 8
"""Sums over the ledger for one key, those that wait included."""
_SUMS: Final = (USAGE, STATEMENTS)
_OPERATORS: Final = frozenset({Role.ADMIN, Role.AUDITOR})
_under_way: Final[Counter[tuple[str, ThreadPoolExecutor]]] = Counter()
_lanes: Final[WeakValueDictionary[tuple[str, ThreadPoolExecutor], asyncio.Semaphore]] = WeakValueDictionary()


def threads_of(principal: Principal, writes: bool) -> ThreadPoolExecutor:
    """The threads in which the store is asked for a caller."""
    if principal.role in _OPERATORS:
        return CHANGES if writes else READS
    return OTHERS_CHANGES if writes else OTHERS_READS


async def in_turn(
    principal: Principal, threads: ThreadPoolExecutor, work: Callable[P, T], *arguments: P.args, **options: P.kwargs
) -> T:
    """Blocking work for a caller, in its turn; raises `ApiError` (429) when too much of the same waits."""
    if principal.role in _OPERATORS and threads not in _SUMS:
        return await run_in(threads, work, *arguments, **options)
    key = principal.limited_with, threads
    at_once, most = (1, MOST_SUMS_OF_ONE) if threads in _SUMS else (AT_ONCE_OF_ONE, MOST_OF_ONE)
    if _under_way[key] >= most:
        raise _too_many(principal, most)
    _under_way[key] += 1
    try:
        async with _lanes.setdefault(key, asyncio.Semaphore(at_once)):
            return await run_in(threads, work, *arguments, **options)
    finally:
        _under_way[key] -= 1
        if not _under_way[key]:
            del _under_way[key]


def _too_many(principal: Principal, most: int) -> ApiError:
    whose = "key" if principal.role in _OPERATORS else "project or owner"
    return TooMany(
        f"{most} such administration requests of this {whose} are in progress, which is the limit. "
        "Try again when one has finished.",
        code="rate_limit_exceeded",
        type_="requests",
        headers={"retry-after": "1"},
    )
