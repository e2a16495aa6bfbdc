"""Lines of JSON that are appended to a file: all of them, or none, whatever was broken off before."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

LONGEST_LINE: Final = 1 << 20


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Append objects of JSON, each as a line, and wait for the disk. Blocks.

    What an earlier append has left of a line is cut off. Where the file may only be appended to, it stays, as a line
    that is no JSON. A last line that is whole gets the line break that it lacks.

    Raises:
        OSError: they could not be written, and nothing was appended; or the file has no lines.
    """
    data = b"".join(line + b"\n" for line in lines)
    with path.open("a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        rest = memoryview(_mend(file, before) + data)
        end = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # the next append does it
                file.truncate(end)
            raise


def _mend(file: BinaryIO, size: int) -> bytes:
    """Cut off what follows the last line break; what has to come before the next line."""
    start = max(0, size - LONGEST_LINE)
    file.seek(start)
    tail = file.read(size - start)
    found = tail.rfind(b"\n")
    if found < 0 and start:
        raise OSError(errno.EINVAL, "it is not a file of lines")
    torn = tail[found + 1 :]
    if not torn:
        return b""
    try:
        json.loads(torn)
    except ValueError:
        with suppress(PermissionError):
            file.truncate(start + found + 1)
            return b""
    return b"\n"
