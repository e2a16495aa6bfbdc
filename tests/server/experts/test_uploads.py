"""Packages on their way in: one writer, the announced bytes, each caller's own."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flexgate.server.experts import uploads as uploads_module
from flexgate.server.experts.uploads import FREE_BYTES, KEPT_FREE_SECONDS, KEPT_SECONDS, MOST_UPLOADS, Uploads
from flexgate.server.http.errors import ApiError, Invalid, NotFound, TooLarge
from flexgate.server.policy.executors import REMOVALS

SIZES = {"manifest.json": 4, "expert.safetensors": 8}
SIZE = sum(SIZES.values())


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "uploads", most_bytes=100, clock=time.time)


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.asyncio
async def test_a_complete_upload_becomes_a_folder_with_the_package_alone(uploads: Uploads) -> None:
    upload = uploads.open("key_a", SIZES)
    for name, size in SIZES.items():
        await uploads.write(upload, name, 0, chunks(bytes(size)))
    taken = uploads.take(uploads.get(upload.id, "key_a"))
    assert sorted(path.name for path in taken.iterdir()) == sorted(SIZES)
    with pytest.raises(NotFound):
        uploads.get(upload.id, "key_a")


def test_an_upload_is_nobody_elses(uploads: Uploads) -> None:
    upload = uploads.open("key_a", SIZES)
    for id_, caller in ((upload.id, "key_b"), ("upload_" + "0" * 24, "key_a"), ("../" + upload.id, "key_a")):
        with pytest.raises(NotFound) as refused:
            uploads.get(id_, caller)
        assert str(refused.value) == "There is no such upload."


@pytest.mark.asyncio
async def test_who_stops_sending_gives_the_upload_back(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield b"12"
        await asyncio.Event().wait()

    monkeypatch.setattr(uploads_module, "IDLE_SECONDS", 0.05)
    upload = uploads.open("key_a", SIZES)
    with pytest.raises(ApiError) as refused:
        await asyncio.wait_for(uploads.write(upload, "manifest.json", 0, silent()), 10)
    assert (refused.value.status, refused.value.code) == (408, "request_timeout")
    assert await uploads.write(upload, "manifest.json", 2, chunks(b"34")) == 4


@pytest.mark.asyncio
async def test_what_is_more_than_announced_is_refused_and_what_fits_is_kept(uploads: Uploads) -> None:
    upload = uploads.open("key_a", SIZES)
    with pytest.raises(TooLarge):
        await uploads.write(upload, "manifest.json", 0, chunks(b"123", b"456"))
    assert upload.received("manifest.json") == 3
    assert await uploads.write(upload, "manifest.json", 3, chunks(b"4")) == 4


@pytest.mark.asyncio
async def test_two_writers_at_once_cannot_write_more_than_one(uploads: Uploads) -> None:
    upload = uploads.open("key_a", SIZES)
    waiting = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"12"
        await waiting.wait()
        yield b"34"

    first = asyncio.ensure_future(uploads.write(upload, "manifest.json", 0, slow()))
    async with asyncio.timeout(10):
        while upload.received("manifest.json") < 2:
            await asyncio.sleep(0.001)
    with pytest.raises(ApiError) as refused:
        await uploads.write(upload, "manifest.json", 2, chunks(b"xx"))
    assert refused.value.code == "upload_busy"
    waiting.set()
    assert await first == 4


@pytest.mark.asyncio
async def test_an_upload_that_is_being_written_is_neither_removed_nor_taken(uploads: Uploads) -> None:
    upload = uploads.open("key_a", SIZES)
    waiting = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield bytes(8)
        await waiting.wait()

    await uploads.write(upload, "manifest.json", 0, chunks(bytes(4)))
    writing = asyncio.ensure_future(uploads.write(upload, "expert.safetensors", 0, slow()))
    async with asyncio.timeout(10):
        while upload.received("expert.safetensors") < 8:
            await asyncio.sleep(0.001)
    for change in (uploads.remove, uploads.take):
        with pytest.raises(ApiError) as refused:
            change(upload)
        assert (refused.value.status, refused.value.code) == (409, "upload_busy")
    assert upload.received("expert.safetensors") == 8
    waiting.set()
    await writing
    uploads.remove(upload)
    assert not upload.directory.exists()


@pytest.mark.asyncio
async def test_a_client_that_leaves_while_its_part_is_written_leaves_the_upload_idle(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, closing, closed = (threading.Event() for _ in range(4))
    close = uploads_module._Writer.close

    def halt(descriptor: int, data: bytes) -> None:
        begun.set()
        assert go.wait(20)
        os.write(descriptor, data)  # to a file that is still open

    def told(writer: Any) -> bool:
        closing.set()
        had = close(writer)
        closed.set()
        return had

    upload = uploads.open("key_a", SIZES)
    with monkeypatch.context() as patched:
        patched.setattr(uploads_module, "_write_all", halt)
        patched.setattr(uploads_module._Writer, "close", told)
        writing = asyncio.create_task(uploads.write(upload, "manifest.json", 0, chunks(b"12")))
        async with asyncio.timeout(10):
            while not begun.is_set():
                await asyncio.sleep(0.001)
        writing.cancel()
        async with asyncio.timeout(10):
            while not closing.is_set():
                await asyncio.sleep(0.001)
        assert not closed.wait(0.1)
        with pytest.raises(ApiError):
            uploads.remove(upload)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
    assert await uploads.write(upload, "manifest.json", 2, chunks(b"34")) == 4


def leave(monkeypatch: pytest.MonkeyPatch, root: Path, room: int) -> None:
    """A disk with room for so many bytes beside what stays free; what is written under `root` takes of it."""

    def usage(_: object) -> object:
        used = sum(path.stat().st_size for path in root.rglob("*") if path.name in SIZES)
        return shutil._ntuple_diskusage(1 << 60, 0, FREE_BYTES + room - used)  # type: ignore[attr-defined]

    monkeypatch.setattr(uploads_module.shutil, "disk_usage", usage)


@pytest.mark.asyncio
async def test_a_package_needs_room_for_its_private_copy_too(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, tmp_path, 2 * SIZE - 1)
    with pytest.raises(ApiError) as refused:
        uploads.open("key_a", SIZES)
    assert (refused.value.status, refused.value.code) == (507, "disk_full")
    assert f"need {2 * SIZE} bytes" in str(refused.value)
    leave(monkeypatch, tmp_path, 4 * SIZE - 1)
    first = uploads.open("key_a", SIZES)
    for name, size in SIZES.items():
        with pytest.raises(ApiError):
            uploads.open("key_b", SIZES)
        await uploads.write(first, name, 0, chunks(bytes(size)))
    uploads.take(first)  # its private copy is still to come
    with pytest.raises(ApiError):
        uploads.open("key_b", SIZES)
    leave(monkeypatch, tmp_path, 4 * SIZE)
    uploads.open("key_b", SIZES)


@pytest.mark.asyncio
async def test_a_part_that_the_disk_has_no_room_for_is_refused_and_what_fits_is_kept(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = uploads.open("key_a", SIZES)
    leave(monkeypatch, tmp_path, 3)
    with pytest.raises(ApiError) as refused:
        await uploads.write(upload, "manifest.json", 0, chunks(b"12", b"34"))
    assert (refused.value.status, refused.value.code) == (507, "disk_full")
    leave(monkeypatch, tmp_path, 4)
    assert await uploads.write(upload, "manifest.json", 2, chunks(b"34")) == 4


def test_one_caller_cannot_take_every_place(uploads: Uploads) -> None:
    for _ in range(MOST_UPLOADS):
        uploads.open("key_a", SIZES)
    with pytest.raises(ApiError) as refused:
        uploads.open("key_a", SIZES)
    assert refused.value.code == "too_many_uploads"
    uploads.open("key_b", SIZES)


def test_what_would_fill_the_disk_is_refused_before_a_byte_arrives(tmp_path: Path) -> None:
    large = Uploads(tmp_path, most_bytes=1 << 62, clock=time.time)
    with pytest.raises(ApiError) as refused:
        large.open("key_a", {"manifest.json": 1, "expert.safetensors": 1 << 60})
    assert (refused.value.status, refused.value.code) == (507, "disk_full")


@pytest.mark.parametrize("sizes", [{}, {"manifest.json": 4}, {**SIZES, "run.sh": 1}, {**SIZES, "../x": 1}])
def test_files_that_are_no_package_are_refused(uploads: Uploads, sizes: dict[str, int]) -> None:
    with pytest.raises(Invalid):
        uploads.open("key_a", sizes)


def test_a_package_beyond_the_limit_is_refused(uploads: Uploads) -> None:
    with pytest.raises(TooLarge):
        uploads.open("key_a", {**SIZES, "expert.safetensors": 100})


def test_uploads_that_nobody_goes_on_with_are_forgotten(uploads: Uploads) -> None:
    old, written = uploads.open("key_a", SIZES), uploads.open("key_a", SIZES)
    past = time.time() - KEPT_SECONDS - 60
    for upload in (old, written):
        for path in (*upload.directory.iterdir(), upload.directory):
            os.utime(path, (past, past))
    (written.directory / "manifest.json").write_bytes(b"12")
    uploads.open("key_b", SIZES)
    REMOVALS.submit(lambda: None).result(10)
    assert not old.directory.exists()
    assert written.directory.exists()


@pytest.mark.asyncio
async def test_no_room_is_kept_for_who_announces_and_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.time()]
    uploads = Uploads(tmp_path / "uploads", most_bytes=100, clock=lambda: now[0])
    room = shutil.disk_usage(tmp_path)._replace(free=FREE_BYTES + 3 * SIZE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    uploads.open("key_a", SIZES)
    with pytest.raises(ApiError) as refused:
        uploads.open("key_b", SIZES)
    assert refused.value.code == "disk_full"
    now[0] += KEPT_FREE_SECONDS + 1
    uploads.open("key_b", SIZES)
