"""Disk space reserved for what must be written on a full disk, allocated to SQLite's write-ahead log.

On a full disk no commit succeeds, and a right that cannot be revoked would stay in use. So blocks are allocated
behind the end of the log, where no other file can take them, and ordinary changes stop while there is still room; those
that take rights away go on. A file system that cannot allocate leaves only the room at which ordinary changes stop.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from flexgate.policies.errors import StoreFull

RESERVED_BYTES: Final = 8 << 20
"""Enough for about a hundred changes of the policy."""
_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE of linux/falloc.h: the file does not look longer


class Reserve:
    """The room of one SQLite database."""

    def __init__(self, database: Path, use: str = "revocations") -> None:
        """`use` says in messages what the room is kept for."""
        self._database = database.absolute()
        self._log = self._database.with_name(f"{self._database.name}-wal")
        self._use = use
        self._kept: tuple[int, int] | None = None  # the log's file and length when its room was last complete

    def keep(self) -> None:
        """Allocate what is missing; cheap when nothing is. Without room, or a log to have it, nothing happens."""
        with suppress(OSError):
            found = os.stat(self._log)
            if self._kept == (found.st_ino, found.st_size):
                return
            descriptor = os.open(self._log, os.O_RDWR | os.O_CLOEXEC)
            try:
                done = _allocate(descriptor, found.st_size + RESERVED_BYTES)
            finally:
                os.close(descriptor)
            self._kept = (found.st_ino, found.st_size) if done else None

    def require_room(self) -> None:
        """Raise `StoreFull` when the disk has no room for ordinary changes."""
        with suppress(OSError):
            found = os.statvfs(self._database.parent)
            if found.f_bavail * found.f_frsize < RESERVED_BYTES:
                raise StoreFull(
                    f"the disk of {self._database} has less than {RESERVED_BYTES >> 20} MiB left, which are kept for "
                    f"{self._use}: free some space"
                )


def _allocate(descriptor: int, size: int) -> bool:
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None:
        return False
    return bool(allocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) == 0)
