"""Read one JSON object from a request, within limits that hold while it is read."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from http import HTTPStatus
from typing import Any, Final, NoReturn, Protocol
from weakref import WeakValueDictionary

from starlette.requests import Request

from flexgate.policies.documents import Role
from flexgate.policies.strict_json import repeated_key
from flexgate.server.http.auth import Callers, Context, context_of
from flexgate.server.http.errors import ApiError, Invalid, TooLarge
from flexgate.server.http.offload import OPERATORS, Offload

AT_ONCE: Final = 64
MAX_KEYS: Final = 4096
"""Of one object: whatever reads it tells of each key that does not belong there."""


class Arriving:
    """The bodies that are being read: of each project ``AT_ONCE`` are in memory, and the next ones wait."""

    def __init__(self) -> None:
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def place(self, owner: str) -> asyncio.Semaphore:
        """The semaphore to hold while a body is read, by `Principal.limited_with`."""
        return self._places.setdefault(owner, asyncio.Semaphore(AT_ONCE))


class Bodies(Callers, Protocol):
    """How bodies are read: beside others of the same project, within bytes and seconds."""

    @property
    def arriving(self) -> Arriving: ...
    @property
    def body_bytes(self) -> int: ...
    @property
    def body_seconds(self) -> float: ...
    @property
    def offload(self) -> Offload: ...


async def read_request(request: Request, services: Bodies, *, optional: bool = False) -> dict[str, Any]:
    """The JSON body of an authenticated request; see `read_json`. Its digest becomes the context's.

    Reading may take long: check the key again before acting on the body.
    """
    context = context_of(request)
    principal = context.principal
    if principal is None:
        raise RuntimeError("a body is read of a request whose key was not looked at")
    return await read_json(
        request.stream(),
        request.headers,
        services.arriving.place(principal.limited_with),
        limit=services.body_bytes,
        seconds=services.body_seconds,
        offload=services.offload,
        owner=OPERATORS if principal.role is Role.ADMIN else principal.limited_with,
        optional=optional,
        parse=partial(_parse_body, context),
    )


def announces_body(headers: Mapping[str, str]) -> bool:
    """Whether a body may come with a request, by its headers with lower-case names."""
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


async def read_json(
    chunks: AsyncIterator[bytes],
    headers: Mapping[str, str],
    place: asyncio.Semaphore,
    *,
    limit: int,
    seconds: float,
    offload: Offload,
    owner: str,
    optional: bool = False,
    parse: Callable[[bytes], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The body as a JSON object.

    Args:
        chunks: the body as it arrives.
        headers: with lower-case names.
        place: see `Arriving`.
        limit: bytes; more are refused without being kept.
        seconds: for the whole body, the wait for a place included.
        offload: parses it; learns its size and owner.
        owner: large bodies of one owner are parsed one at a time.
        optional: an empty body is an object without fields.
        parse: reads it, by default `parse_object`.

    Raises:
        Invalid: not JSON, not UTF-8, not an object, compressed or of another media type.
        TooLarge: more than `limit` bytes are announced or arrive.
        ApiError: 408 when the body does not arrive in time.
    """
    if not optional:
        _check_headers(headers, limit)
    async with AsyncExitStack() as held:
        try:
            async with asyncio.timeout(seconds):
                await held.enter_async_context(place)
                raw = await _read(chunks, limit)
        except TimeoutError:
            raise ApiError(
                f"The body did not arrive within {seconds:g} seconds.",
                status=HTTPStatus.REQUEST_TIMEOUT,
                code="request_timeout",
            ) from None
        if optional:
            if not raw:  # proxies announce a body before they know
                return {}
            _check_headers(headers, limit)
        offload.arrived(len(raw), owner)
        return await offload.run(parse or parse_object, raw)


def _parse_body(context: Context, raw: bytes) -> dict[str, Any]:
    context.body_sha256 = hashlib.sha256(raw).hexdigest()
    return parse_object(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """`raw` as a JSON object of strings that can be tokenized, with no key twice in any object of it."""
    try:
        value = read_json_text(raw.decode("utf-8"))
    except UnicodeDecodeError:
        _refuse("The body is not UTF-8.")
    except NotJson as error:
        _refuse(f"The body {error}.")
    if not isinstance(value, dict):
        _refuse("The body must be a JSON object.")
    return value


class NotJson(ValueError):
    """Text that is no JSON, or that parsers read differently; the message follows a name for the text."""


def read_json_text(text: str) -> Any:
    """A JSON value that every parser reads alike and whose strings can be tokenized; raises `NotJson`."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_key_once)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except NotJson:
        raise
    except UnicodeEncodeError:
        raise NotJson("has an unpaired surrogate (\\ud800 to \\udfff) in a string") from None
    except RecursionError:
        raise NotJson("is nested too deeply") from None
    except ValueError:
        raise NotJson("is not valid JSON") from None
    return value


def _check_headers(headers: Mapping[str, str], limit: int) -> None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        _refuse("Send the body as 'Content-Type: application/json'.")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        _refuse("Send the body without 'Content-Encoding'.")
    announced = headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
        raise _too_large(limit)


async def _read(chunks: AsyncIterator[bytes], limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is larger than the limit of {limit} bytes.")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise NotJson(f"has an object of {len(pairs)} keys: at most {MAX_KEYS} are read")
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotJson(f"has the key '{str(repeated_key(pairs))[:80]}' twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise NotJson(f"is not valid JSON: it has {name}")


def _refuse(message: str) -> NoReturn:
    raise Invalid(message, param=None, code="invalid_body")
