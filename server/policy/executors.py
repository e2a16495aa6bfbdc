"""Threads for blocking work, by who waits for it: what takes a right away waits for nothing but its own kind.

`CHANGES` is for operators' changes, revocations, and what confirms them. Everything else that blocks has other threads,
asyncio's own among them, and may fill those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

CHANGES: Final = ThreadPoolExecutor(4, "changes")
READS: Final = ThreadPoolExecutor(4, "reads")
"""What administrators and auditors read."""
USAGE: Final = ThreadPoolExecutor(2, "usage")
"""Sums over the ledger, which take seconds where much is asked for."""
OTHERS_CHANGES: Final = ThreadPoolExecutor(2, "others-changes")
"""Changes by tenants' and owners' keys."""
OTHERS_READS: Final = ThreadPoolExecutor(2, "others-reads")
UPLOADS: Final = ThreadPoolExecutor(2, "uploads")
"""What reads and writes files of uploads: a disk that halts must not halt what waits for the store."""
STATEMENTS: Final = ThreadPoolExecutor(2, "statements")
"""Statements and costs, which take up to a minute; one key fills one of them."""
METRICS: Final = ThreadPoolExecutor(1, "metrics")
"""What writes metrics down, which must work while others wait for a disk."""
REMOVALS: Final = ThreadPoolExecutor(1, "removals")
"""What removes uploads and private copies, which takes the disk seconds where they are large."""


async def run_in(threads: ThreadPoolExecutor, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What blocking `work` returns or raises, once one of `threads` was free for it."""
    return await asyncio.wrap_future(threads.submit(work, *arguments, **options))
