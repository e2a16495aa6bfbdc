"""Streams of vLLM's handlers, whose events are made away from the event loop where the engine's outputs are long.

One event can be as long as the whole response: the first of a stream that echoes its prompt, the last of a Responses
stream, and any that is asked for seldom (`stream_interval`) or left unread for a while, with twenty log-probabilities
of each token. So a stream is advanced by hand: between two outputs of the engine its generators, vLLM's and ours around
them, run as pieces of work, each where the size of the output belongs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Final

from anyio import CancelScope

from flexgate.server.http.offload import Offload

END: Final = object()


class Outputs:
    """The engine's outputs for a handler's generator, which `in_pieces` waits for in its stead."""

    def __init__(self, source: AsyncGenerator[Any, None]) -> None:
        self.source = source
        self._brought: Any = None

    def __aiter__(self) -> Outputs:
        return self

    async def __anext__(self) -> Any:
        await self
        if self._brought is END:
            raise StopAsyncIteration
        if isinstance(self._brought, Exception):
            raise self._brought
        return self._brought

    def __await__(self) -> Generator[Outputs, None, None]:
        yield self

    async def bring(self) -> Any:
        """Wait for the next output, `END`, or an exception, which the generator then gets."""
        try:
            self._brought = await anext(self.source, END)
        except Exception as error:
            self._brought = error
        return self._brought


class Sizes:
    """Count the tokens that a handler writes: each output's, and at the end all once more."""

    def __init__(self) -> None:
        self._total = 0
        self._echoed: set[tuple[Any, int]] = set()

    def tokens(self, brought: Any) -> int:
        """New tokens, and those of the prompt with the first output of each choice that has their log-probabilities."""
        if brought is END:
            return self._total
        if isinstance(brought, Exception):
            return 0
        prompt, context = brought if isinstance(brought, tuple) else (0, brought)
        output: Any = getattr(context, "last_output", context)  # a Responses context has it
        count = 0
        for part in output.outputs:
            count += len(part.token_ids)
        if output.prompt_logprobs:
            echoing = {(prompt, part.index) for part in output.outputs} - self._echoed
            self._echoed |= echoing
            count += len(echoing) * len(output.prompt_logprobs)
        self._total += count
        return count


async def in_pieces(
    events: AsyncGenerator[str, None], offload: Offload, owner: str, bytes_of: Callable[[int], int]
) -> AsyncGenerator[str, None]:
    """`events`, each made where its size belongs; the first ones and the last may repeat the request's body.

    Args:
        events: a generator around a handler's, which reads `Outputs`.
        owner: whose long events wait for one another.
        bytes_of: about how much is made of so many tokens.
    """
    repeated = about = offload.arrived_bytes()
    sizes = Sizes()
    async with aclosing(events):
        while True:
            step = events.__anext__()
            try:
                made = await _made(step, offload, owner) if offload.holds_up(about) else _advance(step)
                while not isinstance(made, str):
                    if isinstance(made, Outputs):
                        brought = await _brought(made, step)
                        about = bytes_of(sizes.tokens(brought)) + repeated * (brought is END)
                        made = await _made(step, offload, owner) if offload.holds_up(about) else _advance(step)
                    else:
                        made = await _Waiting(step, made)
            except StopAsyncIteration:
                return
            yield made


def _advance(step: Any) -> Any:
    """The next event, or what the generator waits for before that."""
    try:
        return step.send(None)
    except StopIteration as made:
        return made.value


async def _brought(outputs: Outputs, step: Any) -> Any:
    """What the generator gets next; a cancelled wait is one for the generator as well."""
    try:
        return await outputs.bring()
    except BaseException as error:
        await _throw(step, error)
        raise


async def _throw(step: Any, error: BaseException) -> None:
    with suppress(StopIteration), CancelScope(shield=True):
        await _Waiting(step, step.throw(error))


async def _made(step: Any, offload: Offload, owner: str) -> Any:
    """The same in a thread, where a generator may wait for nothing but the engine."""
    advancing = asyncio.ensure_future(offload.run_for(owner, partial(_advance_alone, step)))
    try:
        return await asyncio.shield(advancing)
    except asyncio.CancelledError as error:
        with CancelScope(shield=True):  # Starlette cancels again and again where a client left
            await asyncio.wait({advancing})  # a generator that is at work cannot be closed
        if advancing.exception() is None and isinstance(advancing.result(), Outputs):
            await _throw(step, error)
        raise


def _advance_alone(step: Any) -> Any:
    made = _advance(step)
    if isinstance(made, str | Outputs):
        return made
    try:
        return step.throw(TypeError(f"a stream that is made off the event loop waits for {made!r}"))
    except StopIteration as event:
        return event.value


class _Waiting:
    """A generator's wait for something else than the engine, on the event loop, until it gives or wants something."""

    def __init__(self, step: Any, waits: Any) -> None:
        self._step = step
        self._waits = waits

    def __await__(self) -> Generator[Any, None, Any]:
        waits = self._waits
        while not isinstance(waits, Outputs):
            try:
                yield waits
                resume = partial(self._step.send, None)
            except BaseException as error:  # such as the task's cancellation
                resume = partial(self._step.throw, error)
            try:
                waits = resume()
            except StopIteration as made:
                return made.value
        return waits
