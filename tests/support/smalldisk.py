"""Real file systems with little room, which a test fills to the last byte, or that stop answering."""

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


@dataclass(frozen=True, slots=True)
class FreezableDisk:
    """A mounted file system that can stop taking writes without an error, as a disk that does not answer."""

    path: Path

    def freeze(self) -> None:
        """Let every write wait."""
        subprocess.run(["fsfreeze", "--freeze", str(self.path)], check=True)

    def thaw(self) -> None:
        """Let them go on; nothing happens where none waits."""
        subprocess.run(["fsfreeze", "--unfreeze", str(self.path)], check=False, capture_output=True)


@contextmanager
def freezable(folder: Path) -> Iterator[FreezableDisk]:
    """An ext4 of its own in `folder`; skips the test where this user may mount none."""
    image, path = folder / "image", folder / "mounted"
    path.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system from a file takes root")
    disk = FreezableDisk(path)
    try:
        yield disk
    finally:
        disk.thaw()
        subprocess.run(["umount", "-l", str(path)], check=True)
