"""Writing so that what has its final name is whole and on the disk, and nothing is overwritten unasked."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexgate.experts.errors import DiskFull, OutputRefused


@contextmanager
def new_directory(target: Path, *, mode: int = 0o755) -> Iterator[Path]:
    """A folder to fill, named ``target`` once the block has ended well; gone if the block raises.

    Raises:
        OutputRefused: ``target`` exists, or the disk refused something.
    """
    require_absent(target)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise OutputRefused(f"{target} cannot be made: {error.strerror}") from error
    try:
        yield partial
        partial.chmod(mode)
        settle(partial, target)
    except OSError as error:
        raise OutputRefused(f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_absent(target: Path) -> None:
    """Raise ``OutputRefused`` if something has this name, were it a broken link."""
    if target.is_symlink() or target.exists():
        raise OutputRefused(f"{target} exists already; nothing is overwritten")


def require_room(directory: Path, size: int, keep_free: int, what: str) -> None:
    """Raise ``DiskFull``, which names ``what``, unless the disk has room for ``size`` bytes and ``keep_free`` more."""
    free = shutil.disk_usage(directory).free
    if free < size + keep_free:
        raise DiskFull(
            f"the disk has no room for {what}: {size} bytes are still to be written, {keep_free} must stay free, "
            f"and {free} are free"
        )


def settle(partial: Path, target: Path) -> None:
    """Give a finished folder its name; files in it must be on the disk already."""
    sync(partial)
    require_absent(target)
    partial.rename(target)
    sync(target.parent)


def sync(directory: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: Path, *, mode: int = 0o600) -> Iterator[int]:
    """The descriptor of a new file, which is on the disk when the block ends, and gone if the block raises."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        raise OutputRefused(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield descriptor
        os.fsync(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputRefused(f"{path} cannot be written: {error.strerror}") from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def write_new(path: Path, text: bytes, *, mode: int = 0o644) -> None:
    """A small new file, on the disk."""
    with new_file(path, mode=mode) as descriptor:
        write_all(descriptor, text)


def write_whole(target: Path, text: bytes, *, replace: bool, mode: int = 0o644) -> None:
    """A small file that is there whole or not at all, and on the disk.

    Raises:
        OutputRefused: the disk refused it, or something has this name already and ``replace`` is false.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    write_new(partial, text, mode=mode)
    try:
        if not replace:
            require_absent(target)
        partial.replace(target)
        sync(target.parent)
    except OSError as error:
        raise OutputRefused(f"{target} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    """Write every byte."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
