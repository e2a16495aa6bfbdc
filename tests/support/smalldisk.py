"""A real file system with little room, which a test fills to the last byte."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A mounted file system."""

    path: Path

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Write until nothing fits, or at most `leave` bytes."""
        found = os.statvfs(self.path)
        size = found.f_bavail * found.f_frsize - leave
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while leave == 0 or size > 0:
                file.write(b"x" * 4096)
                size -= 4096

    def free(self) -> None:
        """Take the filler away again."""
        self._filler.unlink()


@contextmanager
def mounted(path: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """A tmpfs of that size at `path`; skips the test where this user may mount none."""
    path.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system takes root")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
