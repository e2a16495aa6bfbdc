"""Which files lie in a folder, so that another look can tell whether they still do."""

import os
from pathlib import Path

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size, and nanoseconds of the last changes of content and of the file's entry.

The last is not a program's to set, so a file that was replaced, written to or renamed and put back is another one.
"""


def identities(folder: Path) -> dict[str, FileIdentity]:
    """Every file right in ``folder`` by its name; a link is what it leads to. Empty if there is no such folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: _identity(entry.stat()) for entry in entries if entry.is_file()}


def _identity(status: os.stat_result) -> FileIdentity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
