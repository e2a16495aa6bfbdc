"""Uploads of packages, in a private folder; every write must begin where the file ends.

An upload is a folder of its own with the package's files and `upload.json`, so that it can be gone on
with after a broken connection or a restart. Names and sizes are announced first; nothing a client
sends becomes a path.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexgate.experts.package.files import MANIFEST_NAME, NAMES, WEIGHTS_NAME
from flexgate.server.experts.schemas import ExpertUpload, UploadedFile
from flexgate.server.http.errors import ApiError, Conflict, Invalid, NotFound, OutOfSpace, TimedOut, TooLarge
from flexgate.server.policy.executors import REMOVALS, UPLOADS, run_in

META: Final = "upload.json"
MOST_UPLOADS: Final = 4
"""Of one owner, or one key of an operator."""
FREE_BYTES: Final = 1 << 30
"""What packages must leave free on the disk, which the policy database may be on too."""
KEPT_SECONDS: Final = 24 * 3600.0
KEPT_FREE_SECONDS: Final = 600.0
IDLE_SECONDS: Final = 30.0
"""How long a client may send nothing of a part that it has begun."""
_ID: Final = re.compile(r"upload_[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class Upload:
    """One package that is being received; `sizes` are the announced ones."""

    id: str
    directory: Path
    sizes: Mapping[str, int]

    def received(self, name: str) -> int:
        """Bytes of a file that have arrived."""
        return _size(self.directory / name)

    def shown(self) -> ExpertUpload:
        """As the API shows it."""
        files = {name: UploadedFile(bytes=size, received=self.received(name)) for name, size in self.sizes.items()}
        return ExpertUpload(id=self.id, files=files)


class Uploads:
    """All uploads of one server. Only its own keys see an upload: `caller` is `Principal.limited_with`.

    All methods but `write` block, and are safe from any thread. What takes or removes an upload removes its
    `upload.json` first, and is the only one to do so.
    """

    def __init__(self, root: Path, *, most_bytes: int, clock: Callable[[], float]) -> None:
        self._root = root
        self._most_bytes = most_bytes
        self._clock = clock
        self._lock = threading.Lock()  # between whether an upload is idle, or has room, and what is done with it
        self._writing: set[str] = set()

    def open(self, caller: str, sizes: Mapping[str, int]) -> Upload:
        """Begin an upload; raises `ApiError` for files that are no package, or too much."""
        self._check(sizes)
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock:
            self._forget_stale()
            self._require_place(caller)
            self._require_room(2 * sum(sizes.values()))
            id_ = f"upload_{secrets.token_hex(12)}"
            directory = self._root / id_
            directory.mkdir(mode=0o700)
            (directory / META).write_text(json.dumps({"caller": caller, "sizes": dict(sizes)}))
            return Upload(id_, directory, dict(sizes))

    def get(self, id_: str, caller: str) -> Upload:
        """An upload of this caller; raises `NotFound`."""
        path = self._root / id_ / META
        meta = _read(path) if _ID.fullmatch(id_) else None
        if meta is None or meta["caller"] != caller:
            raise _no_upload()
        return Upload(id_, path.parent, meta["sizes"])

    async def write(self, upload: Upload, name: str, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Append to a file what arrives; returns how much of it there is then.

        Raises:
            NotFound: the upload has no such file.
            ApiError: 408, nothing came for a while; 409, the offset is not where the file ends, and the message says
                where it does, or another part is being written; 507, the disk has no room for more.
            TooLarge: more arrives than was announced; what fits is kept.
        """
        if name not in upload.sizes:
            raise NotFound("The upload has no such file.", code="upload_not_found")
        writer = _Writer(upload, name)
        try:
            await run_in(UPLOADS, self._begin, writer, offset)
            async for chunk in _arriving(chunks):
                await run_in(UPLOADS, writer.write, chunk)
        finally:
            await asyncio.shield(run_in(UPLOADS, self._end, writer))
        return writer.received

    def _begin(self, writer: _Writer, offset: int) -> None:
        """Make it the one writer of its upload."""
        with self._lock:
            self._require_idle(writer.upload)
            writer.open(offset)
            if writer.is_open():
                self._writing.add(writer.upload.id)

    def _end(self, writer: _Writer) -> None:
        if writer.close():
            with self._lock:
                self._writing.discard(writer.upload.id)

    def take(self, upload: Upload) -> Path:
        """The folder of a complete upload, as a package; it is the caller's to remove.

        Raises:
            ApiError: 409, something has not arrived yet, or is being written.
        """
        with self._lock:
            self._require_idle(upload)
            missing = [name for name, size in upload.sizes.items() if upload.received(name) != size]
            if missing:
                raise Conflict(
                    f"'{missing[0]}' of upload '{upload.id}' has not arrived in full.",
                    code="upload_incomplete",
                )
            (upload.directory / META).unlink()
        return upload.directory

    def remove(self, upload: Upload) -> None:
        """Forget an upload and what has arrived of it; raises `ApiError` (409) while a part is being written.

        Else the writer would go on filling files that have no name any more and count for nobody.
        """
        with self._lock:
            self._require_idle(upload)
            (upload.directory / META).unlink()
        shutil.rmtree(upload.directory, ignore_errors=True)

    def _require_idle(self, upload: Upload) -> None:
        """Raise `ApiError` unless it is an upload still, and nothing writes to it."""
        if not (upload.directory / META).is_file():
            raise _no_upload()
        if upload.id in self._writing:
            raise Conflict("Another request is writing to this upload. Wait until it has ended.", code="upload_busy")

    def _require_place(self, caller: str) -> None:
        announced = [meta for path in self._root.glob(f"*/{META}") if (meta := _read(path)) is not None]
        if sum(meta["caller"] == caller for meta in announced) >= MOST_UPLOADS:
            raise Conflict(
                f"{MOST_UPLOADS} uploads are open already. Finish or delete one of them.", code="too_many_uploads"
            )

    def _require_room(self, needed: int) -> None:
        if self._to_come() + needed + FREE_BYTES > shutil.disk_usage(self._root).free:
            raise _disk_full(
                f"The package and the server's private copy of it need {needed} bytes, and the disk has less beside "
                "what other uploads have reserved. Free some space, or wait until they have finished."
            )

    def _to_come(self) -> int:
        """Bytes that are still to be written of the uploads there are, and of the private copies of them.

        An upload and its copy exist side by side until the expert is live; a folder without `upload.json` was taken.
        Nothing is kept free for an upload to which nothing was written for `KEPT_FREE_SECONDS`.
        """
        total = 0
        for directory in self._root.iterdir():
            arrived = sum(_size(directory / name) for name in NAMES)
            total += arrived
            with suppress(FileNotFoundError):
                if _newest(directory) < self._clock() - KEPT_FREE_SECONDS and directory.name not in self._writing:
                    continue
                announced = json.loads((directory / META).read_text())["sizes"]
                total += 2 * (sum(announced.values()) - arrived)
        return total

    def _check(self, sizes: Mapping[str, int]) -> None:
        odd = sorted(sizes.keys() - NAMES)
        if odd or not {MANIFEST_NAME, WEIGHTS_NAME} <= sizes.keys():
            raise Invalid(
                f"'files' must name '{MANIFEST_NAME}' and '{WEIGHTS_NAME}', and may name 'manifest.sig'.",
                param="files",
                code="invalid_value",
            )
        if sum(sizes.values()) > self._most_bytes:
            raise TooLarge(f"The package is larger than the limit of {self._most_bytes} bytes.")

    def _forget_stale(self) -> None:
        for directory in self._root.iterdir():
            with suppress(FileNotFoundError):  # something is removing it
                if _newest(directory) < self._clock() - KEPT_SECONDS and directory.name not in self._writing:
                    (directory / META).unlink(missing_ok=True)
                    REMOVALS.submit(shutil.rmtree, directory, ignore_errors=True)


class _Writer:
    """Appends to one file. Closing waits for a write, and what is asked of it later does nothing: its client may leave
    at any time.
    """

    def __init__(self, upload: Upload, name: str) -> None:
        self.upload, self.received = upload, 0
        self._name = name
        self._lock = threading.Lock()
        self._descriptor = -1
        self._closed = False

    def open(self, offset: int) -> None:
        """Open the file, which must end at `offset`."""
        self.received = self.upload.received(self._name)
        if offset != self.received:
            raise Conflict(
                f"'{self._name}' has {self.received} bytes so far; go on from there.",
                code="wrong_offset",
                details={"received": self.received},
            )
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._lock:
            if not self._closed:
                self._descriptor = os.open(self.upload.directory / self._name, flags, 0o600)

    def is_open(self) -> bool:
        """Whether it has the file."""
        return self._descriptor >= 0

    def write(self, chunk: bytes) -> None:
        """Append a chunk, unless that is more than was announced."""
        with self._lock:
            if self._closed:
                return
            size = self.upload.sizes[self._name]
            if self.received + len(chunk) > size:
                raise TooLarge(f"'{self._name}' was announced with {size} bytes.")
            _write_all(self._descriptor, chunk)
            self.received += len(chunk)

    def close(self) -> bool:
        """Give the file back; whether it had it."""
        with self._lock:
            self._closed = True
            opened, self._descriptor = self._descriptor, -1
            if opened >= 0:
                os.close(opened)
            return opened >= 0


async def _arriving(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`chunks` for as long as they come: who went without a word would keep the upload, and its room on the disk."""
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise TimedOut(
                f"No data for {IDLE_SECONDS:g} seconds. What has arrived is kept: continue at its size.",
                code="request_timeout",
            ) from None
        if chunk is None:
            return
        yield chunk


def _no_upload() -> NotFound:
    return NotFound("There is no such upload.", code="upload_not_found")


def _read(meta: Path) -> dict[str, Any] | None:
    """What was announced of an upload; None if it is none any more."""
    try:
        announced: dict[str, Any] = json.loads(meta.read_text())
    except FileNotFoundError:
        return None
    return announced


def _disk_full(message: str) -> ApiError:
    return OutOfSpace(message, code="disk_full")


def _newest(directory: Path) -> float:
    """When something was written to an upload last, in Unix seconds; raises `FileNotFoundError`."""
    return max(path.stat().st_mtime for path in (directory, *directory.iterdir()))


def _size(path: Path) -> int:
    """Bytes of a file; 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _write_all(descriptor: int, data: bytes) -> None:
    if shutil.disk_usage(descriptor).free < len(data) + FREE_BYTES:
        raise _disk_full("The disk is full. What has arrived is kept: free some space and continue.")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
