"""Requests that take long: their key is checked again while they go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final, TypeVar

from starlette.requests import Request

from flexgate.server.http.auth import NO_KEY, Callers, context_of, current_snapshot, recognise

CHECK_SECONDS: Final = 0.5
"""How long a request may go on whose key was revoked."""
T = TypeVar("T")


async def identify_again(request: Request, services: Callers) -> None:
    """Raise `ApiError` if the key that `identify` found is no longer valid; for requests that take long."""
    context, snapshot = context_of(request), await current_snapshot(services)
    digest = NO_KEY if context.principal is None else context.principal.digest
    context.principal = recognise(snapshot, digest, services.clock(), context.roles)


async def while_identified(request: Request, services: Callers, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """`items` as they come, while the caller's key is valid; raises `ApiError` at most `CHECK_SECONDS` after that."""
    end = object()
    async with aclosing(items):  # type: ignore[type-var]
        while True:
            upcoming = asyncio.ensure_future(_next(items, end))
            try:
                while not upcoming.done():
                    await asyncio.wait({upcoming}, timeout=CHECK_SECONDS)
                    await identify_again(request, services)
            finally:
                if not upcoming.done():
                    upcoming.cancel()
                    await asyncio.wait({upcoming})
            item = upcoming.result()
            if item is end:
                return
            yield item  # type: ignore[misc]


async def _next(items: AsyncIterator[T], end: object) -> T | object:
    return await anext(items, end)
