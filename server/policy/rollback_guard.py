"""Guard against starting from a rolled-back database: remembers the newest policy that was served.

The database alone cannot show that it was replaced by an older copy. So the version that
was confirmed last is also kept in the server's own directory, and compared at the next start.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from flexgate.experts.io.output import sync
from flexgate.policies.errors import StoreReplaced, StoreRolledBack
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store.history import newest_revisions
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.store import Store

CLOCKS_DIFFER_S: Final = 60.0
"""By so much the clocks of two servers may differ."""

logger = logging.getLogger(__name__)


class ClockBehind(Exception):
    """The machine's clock is earlier than what has happened already."""


class RollbackGuard:
    """The file with the newest served policy version. One server writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failing = False
        self._file = FileIdentity(path, "the memory of the policy")

    def kept(self) -> bool:
        """Whether what `note` was given last was written and is still there."""
        if self._failing:
            return False
        try:
            self._file.require()
        except StoreReplaced:
            return False
        return True

    def require(self, store: Store) -> None:
        """Raise `StoreRolledBack` unless the store's history holds what was noted last; nothing noted is no claim."""
        try:
            noted = json.loads(self._path.read_text())
            version, made = int(noted["policy_version"]), float(noted["made"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            raise StoreRolledBack(
                f"{self._path} is damaged and does not name the newest policy that was served: check that the database "
                "was not rolled back, then remove the file"
            ) from error
        try:
            store.require_in_history(version, made)
        except StoreRolledBack as error:
            raise StoreRolledBack(f"{error}, or remove {self._path} to accept this database") from None

    def note(self, snapshot: Snapshot) -> None:
        """Keep which policy was confirmed. A disk that is full ends nothing: it is logged, and tried the next time."""
        new = self._path.with_suffix(".new")
        try:
            with new.open("w") as file:
                file.write(json.dumps({"policy_version": snapshot.policy_version, "made": snapshot.made}))
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the name with nothing under it
            os.replace(new, self._path)
            sync(self._path.parent)
            self._file = FileIdentity(self._path, "the memory of the policy")
            self._file.take()
            self._failing = False
        except (OSError, StoreReplaced) as error:
            if not self._failing:
                logger.error("%s cannot be written: %s", self._path, getattr(error, "strerror", error))
            self._failing = True


def require_clock(store: Store, now: float) -> None:
    """Raise `ClockBehind` when `now` (Unix seconds) is before the newest change of the policy."""
    for newest in newest_revisions(store, limit=1):
        if now < newest.at - CLOCKS_DIFFER_S:
            raise ClockBehind(
                f"this machine's clock says {_utc(now)}, which is before the newest change of the policy, made at "
                f"{_utc(newest.at)} by {newest.actor!r}: set the clock; or, if that change was stamped by a wrong "
                "clock, make another one with 'flexgate policy apply'"
            )


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
