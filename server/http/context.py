"""Who calls: the request's own id, its principal, and what its log line will say."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeVar

from starlette.requests import Request

from flexgate.policies.documents import Role
from flexgate.policies.errors import PolicyError
from flexgate.policies.snapshot import Snapshot
from flexgate.server.http.auth import EVERY_ROLE, AuthError, Principal, authenticate, recognise, require_role
from flexgate.server.http.errors import ApiError
from flexgate.server.http.refusals import from_auth, from_policy
from flexgate.server.policy.live import PolicySource

STATE = "flexgate"
CHECK_SECONDS: Final = 0.5
"""How long a request may go on whose key was revoked."""
T = TypeVar("T")
CHANGE_PATIENCE_S: Final = 10.0
"""How long who changes the policy or revokes an expert may have to wait for a confirmed policy, on a busy machine."""


class Callers(Protocol):
    """What tells who calls: the live policy, and the time by which keys expire."""

    @property
    def policy(self) -> PolicySource: ...
    @property
    def clock(self) -> Callable[[], float]: ...


class Context:
    """Kept in a request's scope by the outermost layer; `noted` becomes part of the log line, and
    `error` is what the request is answered with, if it is answered with one.
    """

    __slots__ = ("error", "noted", "principal", "request_id", "roles", "route")

    def __init__(self, roles: Collection[Role] = EVERY_ROLE) -> None:
        """`roles` are those whose keys are known where the request came in."""
        self.roles = roles
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.route = "unmatched"
        self.noted: dict[str, Any] = {}
        self.error: ApiError | None = None
        self.principal: Principal | None = None

    def fail(self, error: ApiError) -> None:
        """Note what the request is answered with."""
        self.error = error
        self.noted["code"] = error.code


def context_of(request: Request) -> Context:
    """The context of a request."""
    context: Context = request.scope[STATE]
    return context


async def identify(
    request: Request, services: Callers, roles: Collection[Role] = EVERY_ROLE, *, patience: float | None = None
) -> tuple[Principal, Snapshot]:
    """The caller by its key, which must have one of `roles`, and the snapshot that knows it; raises `ApiError`.

    `patience` is in seconds; see `PolicySource.current`.
    """
    context = context_of(request)
    try:
        snapshot = await services.policy.current(patience)
        principal = authenticate(snapshot, request.headers.get("authorization"), services.clock(), context.roles)
        context.principal = principal
        context.noted |= {"key": principal.key_id, "tenant": principal.tenant_id}
        require_role(principal, *roles)
    except AuthError as error:
        raise from_auth(error) from error
    except PolicyError as error:
        raise from_policy(error) from error
    return principal, snapshot


async def identify_again(request: Request, services: Callers) -> None:
    """Raise `ApiError` when the key that `identify` found is good no more; what takes long must not outlive it."""
    context = context_of(request)
    if context.principal is None:
        return
    try:
        snapshot = await services.policy.current()
        recognise(snapshot, context.principal.digest, services.clock(), context.roles)
    except AuthError as error:
        raise from_auth(error) from error
    except PolicyError as error:
        raise from_policy(error) from error


async def while_identified(request: Request, services: Callers, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """`items` as they come, for as long as the caller's key is good; raises `ApiError` `CHECK_SECONDS` later."""
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
