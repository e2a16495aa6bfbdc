"""Work that grows with a request's body, away from the event loop.

Every request shares the loop: a callback that takes long holds up all of them. What is made of a body of more than
`ON_LOOP_BYTES` is made in a few threads, one piece of work at a time for each project, so that a project's large bodies
wait for one another.

Small bodies take the same way and are worked on at once, but no more than `PIECES_AT_ONCE` in one pass of the loop: of
a hundred requests that come together, not all are worked on before what came next.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar, overload
from weakref import WeakValueDictionary

from flexgate.server.http.errors import ApiError

ON_LOOP_BYTES: Final = 4 * 1024
"""The largest body of which all that is made takes the loop a few milliseconds."""
PIECES_AT_ONCE: Final = 32
THREADS: Final = 2
OPERATORS: Final = "(operators)"
"""Owner of the bodies that operators send to change the policy: they wait for each other alone."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arrived:
    """A body's size in bytes, and its owner."""

    size: int
    owner: str


_arrived: contextvars.ContextVar[Arrived | None] = contextvars.ContextVar("flexgate_arrived_body", default=None)
_serving: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar(
    "flexgate_serving_loop", default=None
)


class Offload:
    """Runs work on the current request's body: in a thread if it is large, else on the event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "bodies")
        self._operators = ThreadPoolExecutor(1, "operators-bodies")
        self._lanes: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._begun: list[str] = []  # in this pass of the loop, by owner

    def arrived(self, size: int, owner: str) -> None:
        """Note the size in bytes and the owner of the body of the current task's request."""
        _arrived.set(Arrived(size, owner))

    @overload
    async def run(self, work: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **options: P.kwargs) -> T: ...
    @overload
    async def run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T: ...
    async def run(self, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What `work` returns or raises. It must not touch the event loop.

        A coroutine function may wait, but for nothing that belongs to the server's loop.
        """
        body = _arrived.get()
        if body is not None and body.size <= ON_LOOP_BYTES:
            await self._turn(body.owner)
            made = work(*args, **options)
            return await made if asyncio.iscoroutine(made) else made
        return await self.run_for("" if body is None else body.owner, partial(_finished, work, *args, **options))

    @staticmethod
    def arrived_bytes() -> int:
        """The size of the current request's body, which its response may repeat."""
        body = _arrived.get()
        return 0 if body is None else body.size

    @staticmethod
    def holds_up(size: int) -> bool:
        """Whether work on so many bytes would block the event loop for too long."""
        return size > ON_LOOP_BYTES

    async def run_for(self, owner: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises, in a thread; one piece at a time for each owner."""
        lane = self._lanes.setdefault(owner, asyncio.Semaphore(1))
        await lane.acquire()
        context, loop = contextvars.copy_context(), asyncio.get_running_loop()
        context.run(_serving.set, loop)
        threads = self._operators if owner == OPERATORS else self._threads
        running = threads.submit(context.run, _shedding, work)
        running.add_done_callback(lambda _: _release(lane, loop))
        return await asyncio.wrap_future(running)

    async def _turn(self, owner: str) -> None:
        while len(self._begun) >= PIECES_AT_ONCE and owner != OPERATORS:
            await asyncio.sleep(0)
        if not self._begun:
            asyncio.get_running_loop().call_soon(self._begun.clear)
        self._begun.append(owner)


def _finished(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `work` returns, in a thread, where a coroutine gets a loop of its own."""
    made = work(*args, **options)
    return asyncio.run(made) if asyncio.iscoroutine(made) else made


def _shedding(work: Callable[[], T]) -> T:
    """What `work` returns; a refusal drops its cause, which is freed here, not on the loop."""
    try:
        return work()
    except ApiError as error:
        if error.server_fault:
            raise  # with its cause, for the log
        error.__context__ = error.__cause__ = None
        refusal = error.with_traceback(None)
    raise refusal


def on_loop(work: Callable[[], T]) -> T:
    """Run `work` on the event loop, from a thread of an `Offload`; returns or raises what it does."""
    loop = _serving.get()
    if loop is None or asyncio._get_running_loop() is loop:
        return work()

    async def run() -> T:
        return work()

    return asyncio.run_coroutine_threadsafe(run(), loop).result()


def _release(lane: asyncio.Semaphore, loop: asyncio.AbstractEventLoop) -> None:
    """Let the next piece begin. The work of a cancelled request keeps the lane to its end."""
    with suppress(RuntimeError):  # the server has ended meanwhile
        loop.call_soon_threadsafe(lane.release)
