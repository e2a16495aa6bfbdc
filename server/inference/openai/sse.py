"""Add to a stream that vLLM wrote, without adding an event: clients parse each one as a chunk.

The object goes onto the usage chunk when the request has one, else onto the last chunk with
a `finish_reason` (with several choices the last choice's). Chunks that vLLM writes for an error
are given this server's error shape, and fields that only vLLM has are left out where they are null.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final

from anyio import CancelScope

from flexgate.server.inference.openai.foreign import without_nulls

DATA: Final = "data: "
END: Final = "\n\n"
DONE: Final = "data: [DONE]\n\n"
COMMENT: Final = ": waiting\n\n"
SILENT_SECONDS = 15.0
_USAGE_CHUNK: Final = '"choices":[]'
_FINISHED: Final = '"finish_reason":"'
_ERROR: Final = '{"error"'

Report = Callable[[dict[str, Any]], dict[str, Any]]
Reshape = Callable[[dict[str, Any]], dict[str, Any]]


async def with_report(
    events: AsyncIterator[str],
    *,
    choices: int,
    include_usage: bool,
    report: Report,
    reshape_error: Reshape,
) -> AsyncGenerator[str, None]:
    """`events` with what `report` adds on one of them.

    Args:
        choices: how many choices the stream has, over all prompts.
        report: the chunk that carries the report, with it; called once.
        reshape_error: a vLLM error chunk as this server's error body.
    """
    position = _Position(choices, include_usage)
    async for event in events:
        data = event.removeprefix(DATA)
        if data.startswith(_ERROR):
            yield encode(reshape_error(json.loads(data)))
        elif position.is_here(data):
            yield without_nulls(encode(report(json.loads(data))))
        else:
            yield without_nulls(event)


class Begun:
    """A stream whose first event is being made from now on, in the context of now, whether or not it is read yet."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        self._events = events
        self._first = asyncio.ensure_future(anext(events, None))

    async def with_comments(self) -> AsyncGenerator[str, None]:
        """Its events, and comments until the first: proxies close connections that say nothing."""
        while not (await asyncio.wait({self._first}, timeout=SILENT_SECONDS))[0]:
            yield COMMENT
        event = self._first.result()
        if event is None:
            return
        yield event
        async for event in self._events:
            yield event

    async def aclose(self) -> None:
        """Close it, wherever it is."""
        with CancelScope(shield=True):  # where a client left, whatever waits is cancelled again and again
            self._first.cancel()
            await asyncio.wait({self._first})
            if not self._first.cancelled():
                self._first.exception()  # seen, whether or not it was read
            await self._events.aclose()


class _Position:
    """Recognises the one chunk that carries the object."""

    def __init__(self, choices: int, include_usage: bool) -> None:
        self._missing = set(range(choices))
        self._include_usage = include_usage
        self._found = False

    def is_here(self, data: str) -> bool:
        if self._found:
            return False
        if self._include_usage:
            # Text inside a chunk has its quotes escaped, so that this finds the key alone.
            self._found = _USAGE_CHUNK in data
        elif _FINISHED in data:
            chunk = json.loads(data)
            self._missing -= {c["index"] for c in chunk["choices"] if c.get("finish_reason")}
            self._found = not self._missing
        return self._found


def encode(payload: dict[str, Any]) -> str:
    """One event of an OpenAI stream."""
    return DATA + json.dumps(payload, ensure_ascii=False, separators=(",", ":")) + END


def encode_named(payload: dict[str, Any]) -> str:
    """One event of a Responses stream, whose name is its type."""
    return f"event: {payload['type']}\n{encode(payload)}"
