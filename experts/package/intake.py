"""Taking a package's files into a private folder, so that what is checked is what is used.

The source may belong to somebody else and change at any moment. It is opened once, without following links, read once,
and never looked at again; every check is made on the copy.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexgate.experts.errors import PackageUnreadable
from flexgate.experts.io.output import new_file, require_room, write_all
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.tensorfile import CHUNK
from flexgate.experts.package.files import NAMES


class Source:
    """An open package folder of which nothing is trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise PackageUnreadable(f"{path} is not a package folder: {error.strerror}") from error

        try:
            self.names = frozenset(self._names())
        except BaseException:
            os.close(self._folder)
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)

    def read(self, name: str, limit: int) -> bytes:
        """A small file; raises ``PackageUnreadable`` if it has more than ``limit`` bytes."""
        with self._open(name) as descriptor:
            text = bytearray()
            while chunk := os.read(descriptor, min(CHUNK, limit + 1 - len(text))):
                text += chunk
        if len(text) > limit:
            raise PackageUnreadable(f"{self.path}: {name} has more than {limit} bytes")
        return bytes(text)

    def copy(self, name: str, size: int, target: Path, progress: Progress = silent, *, keep_free: int = 0) -> None:
        """Copy a file of exactly ``size`` bytes to a new file that only this user may read.

        Raises:
            DiskFull: the rest of the file does not fit beside ``keep_free`` bytes, before it is written.
        """
        with self._open(name) as descriptor, new_file(target) as written:
            self._require_size(name, os.fstat(descriptor).st_size, size)
            copied = 0
            while chunk := os.read(descriptor, min(CHUNK, size + 1 - copied)):
                require_room(target.parent, size - copied, keep_free, f"a copy of {self.path}")
                copied += len(chunk)
                self._require_at_most(name, copied, size)
                write_all(written, chunk)
                progress(len(chunk))
            self._require_size(name, copied, size)

    def _names(self) -> Iterator[str]:
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name not in NAMES:
                    known = ", ".join(sorted(NAMES))
                    raise PackageUnreadable(f"{self.path} holds {entry.name[:80]!a}; a package has only {known}")
                yield entry.name

    def _require_size(self, name: str, found: int, size: int) -> None:
        if found != size:
            raise PackageUnreadable(f"{self.path}: {name} has {found} bytes, the manifest names {size}")

    def _require_at_most(self, name: str, copied: int, size: int) -> None:
        if copied > size:
            raise PackageUnreadable(f"{self.path}: {name} grew beyond the {size} bytes that the manifest names")

    @contextmanager
    def _open(self, name: str) -> Iterator[int]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=self._folder)
        except OSError as error:
            raise PackageUnreadable(f"{self.path}: {name} cannot be opened: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PackageUnreadable(f"{self.path}: {name} is not a regular file")
            yield descriptor
        except OSError as error:
            raise PackageUnreadable(f"{self.path}: {name} cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)
