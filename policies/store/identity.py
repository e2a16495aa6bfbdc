"""Whether a path still names the file that this process opened, compared by device and inode.

An open file survives when its name is deleted or given to another file: reads and writes then use a file that
no other process sees.
"""

from __future__ import annotations

import os
from pathlib import Path

from flexgate.policies.errors import StoreReplaced


class FileIdentity:
    """One file, from the moment of `take` on."""

    def __init__(self, path: Path, what: str) -> None:
        """`what` names the file in messages."""
        self.path = path.absolute()
        self._what = what
        self._taken: tuple[int, int] | None = None

    def take(self) -> None:
        """Remember the file that is there now; later calls change nothing.

        Raises:
            StoreReplaced: there is none, so that nothing could be compared with it later.
        """
        if self._taken is None:
            self._taken = self._now()
            if self._taken is None:
                raise StoreReplaced(
                    f"{self._what} {self.path} disappeared after it was opened: check the path and start again"
                )

    def require(self) -> None:
        """Raise `StoreReplaced` unless the path names the file that was taken; before `take` nothing is claimed."""
        if self._taken is not None and self._now() != self._taken:
            raise StoreReplaced(
                f"{self._what} {self.path} was replaced or deleted while it was in use: restart the server to use the "
                "file that is there now, or move the original file back"
            )

    def _now(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino
