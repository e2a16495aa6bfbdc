"""Reading a request's body."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.policies.documents import Role
from flexgate.policies.ids import OwnerId, TenantId
from flexgate.server.http.auth import Principal
from flexgate.server.http.body import AT_ONCE, MAX_KEYS, Arriving, parse_object, read_json
from flexgate.server.http.errors import ApiError, Invalid, TooLarge
from flexgate.server.http.offload import Offload

JSON_TYPE = {"content-type": "application/json; charset=utf-8"}


async def chunks(*parts: bytes, wait: float = 0) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(wait)
        yield part


def whose() -> dict[str, Any]:
    return {"offload": Offload(), "owner": "k"}


async def read(*parts: bytes, limit: int = 100, wait: float = 0, **headers: str) -> object:
    return await read_json(
        chunks(*parts, wait=wait), JSON_TYPE | headers, Arriving().place("k"), limit=limit, seconds=0.2, **whose()
    )


@pytest.mark.asyncio
async def test_a_body_in_pieces_is_one_object() -> None:
    assert await read(b'{"a"', b": 1}") == {"a": 1}


@pytest.mark.asyncio
async def test_a_body_over_the_limit_is_refused_while_it_is_read() -> None:
    seen = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal seen
        while True:
            seen += 10
            yield b" " * 10

    with pytest.raises(TooLarge, match="100 bytes"):
        await read_json(endless(), JSON_TYPE, Arriving().place("k"), limit=100, seconds=5, **whose())
    assert seen == 110


@pytest.mark.asyncio
async def test_of_one_key_only_so_many_bodies_are_in_memory_and_nobody_elses_wait() -> None:
    arriving, begun, go = Arriving(), 0, asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        yield b"{"
        await go.wait()
        yield b"}"

    def asked(key: str, body: AsyncIterator[bytes]) -> Awaitable[object]:
        return read_json(body, JSON_TYPE, arriving.place(key), limit=100, seconds=30, **whose())

    waiting = [asyncio.ensure_future(asked("k", slow())) for _ in range(AT_ONCE + 8)]
    assert await asked("other", chunks(b"{}")) == {}
    assert begun == AT_ONCE
    go.set()
    assert await asyncio.gather(*waiting) == [{}] * (AT_ONCE + 8)
    assert not arriving._places


def test_the_bounds_of_a_body_are_those_of_its_project_or_owner() -> None:
    project = [Principal(f"key_{number}", Role.TENANT, TenantId("t"), None).limited_with for number in range(2)]
    owner = [Principal(f"key_{number}", Role.OWNER, None, OwnerId("t")).limited_with for number in range(2)]
    operators = [Principal(f"key_{number}", Role.ADMIN, None, None).limited_with for number in range(2)]
    assert [len(set(shared)) for shared in (project, owner, operators)] == [1, 1, 2]
    assert len({*project, *owner, *operators}) == 4


@pytest.mark.asyncio
async def test_an_announced_size_over_the_limit_is_refused_before_reading() -> None:
    with pytest.raises(TooLarge):
        await read(b"{}", **{"content-length": "101"})


@pytest.mark.parametrize("length", ["9" * 40, "-1", "x"])
@pytest.mark.asyncio
async def test_an_odd_announced_size_breaks_nothing(length: str) -> None:
    try:
        assert await read(b"{}", **{"content-length": length}) == {}
    except TooLarge:
        assert length.isdigit()


@pytest.mark.asyncio
async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    with pytest.raises(ApiError) as refused:
        await read(b"{", b"}", wait=0.15)
    assert refused.value.status == 408


@pytest.mark.parametrize("media_type", ["", "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.asyncio
async def test_another_media_type_is_refused(media_type: str) -> None:
    with pytest.raises(Invalid, match="application/json"):
        await read(b"{}", **{"content-type": media_type})


@pytest.mark.asyncio
async def test_a_compressed_body_is_refused() -> None:
    with pytest.raises(Invalid, match="Content-Encoding"):
        await read(b"{}", **{"content-encoding": "gzip"})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (rb'{"a": "\ud800"}', "surrogate"),
        (rb'{"\udc00": 1}', "surrogate"),
    ],
)
def test_what_is_no_usable_object_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(Invalid, match=message) as refused:
        parse_object(raw)
    assert refused.value.status == 400


def test_a_whole_surrogate_pair_is_text() -> None:
    assert parse_object(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(raw: bytes) -> None:
    with contextlib.suppress(Invalid):
        assert isinstance(parse_object(raw), dict)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=5))
def test_any_object_survives(value: dict[str, object]) -> None:
    try:
        raw = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    if all(abs(v) < 10**300 for v in value.values() if isinstance(v, int)):
        assert parse_object(raw) == value


def test_an_object_of_very_many_keys_is_refused_wherever_it_stands() -> None:
    most = {f"k{number}": 1 for number in range(MAX_KEYS)}
    assert parse_object(json.dumps({"a": [most]}).encode()) == {"a": [most]}
    with pytest.raises(Invalid, match=f"an object of {MAX_KEYS + 1} keys: at most {MAX_KEYS}"):
        parse_object(json.dumps({"a": [most | {"one": 1}]}).encode())
