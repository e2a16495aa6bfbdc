"""The store: open, migrate, read one snapshot, change in one attributed transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from flexgate.policies.audit import Entry, Event, Head, Verified
from flexgate.policies.documents import KeyRecord
from flexgate.policies.snapshot import Snapshot
from flexgate.policies.store import audit
from flexgate.policies.store.change import Change
from flexgate.policies.store.database import open_engine, reading, require_room, writing
from flexgate.policies.store.keys import read_keys
from flexgate.policies.store.migrate import migrate, refuse_newer
from flexgate.policies.store.revisions import current_version
from flexgate.policies.store.snapshots import read_snapshot, read_snapshot_after, require_in_history
from flexgate.policies.store.weights_log import WeightsState, revocation_epochs, weights_state


class Store:
    """A policy database. Not for the hot path: requests are decided from a `Snapshot`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, url: str) -> Store:
        """The store behind an SQLAlchemy URL, for example `sqlite:////var/lib/flexgate.db`."""
        return cls(open_engine(url))

    def migrate(self) -> None:
        """Bring the tables to this version; raises `StoreFromNewerVersion`. Run it at start."""
        migrate(self.engine)

    def version(self) -> int:
        """The newest policy version; 0 before the first change."""
        with reading(self.engine) as connection:
            return current_version(connection)

    def snapshot(self) -> Snapshot:
        """Read the whole policy in one transaction; raises `StoreDamaged` if it is inconsistent."""
        with reading(self.engine) as connection:
            refuse_newer(connection)
            return read_snapshot(connection)

    def confirm(self, known: Snapshot | None) -> Snapshot:
        """`known` itself if nothing changed since, else the newest snapshot. Cheap to poll.

        Raises `StoreRolledBack` when the store went back behind `known`, also if it was changed
        again since: what was revoked may be permitted in it, so nothing may be decided from it until
        an operator has looked at it.
        """
        with reading(self.engine) as connection:
            refuse_newer(connection)
            return read_snapshot(connection) if known is None else read_snapshot_after(connection, known)

    def require_in_history(self, version: int, made: float) -> None:
        """Raise `StoreRolledBack` unless policy version `version` was made here, at `made` (Unix seconds)."""
        with reading(self.engine) as connection:
            require_in_history(connection, version, made)

    def keys(self) -> list[KeyRecord]:
        """Every key's record, revoked ones too, oldest first."""
        with reading(self.engine) as connection:
            return read_keys(connection)

    def weights(self) -> WeightsState:
        """Which experts were added to the engine or revoked from it."""
        with reading(self.engine) as connection:
            return weights_state(connection)

    def revocation_epochs(self) -> dict[str, int]:
        """The weights epoch of each expert's last revocation: what was loaded before it must not be served."""
        with reading(self.engine) as connection:
            return revocation_epochs(connection)

    @contextmanager
    def change(self, *, actor: str, note: str = "", at: float, urgent: bool = False) -> Iterator[Change]:
        """One transaction and at most one new revision, committed when the block ends well.

        `actor` names who asked, `at` is Unix seconds. Raises `ChangeRefused` and changes nothing
        when the result would not fit together. A block that changes nothing makes no revision. An
        `urgent` change takes rights away: it is made on a full disk too, where others raise `StoreFull`.
        """
        with writing(self.engine, urgent=True) as connection:
            refuse_newer(connection)
            change = Change(connection, actor=actor, note=note, at=at)
            yield change
            if change.finish() and not urgent:
                require_room(self.engine)

    def record(self, events: Iterable[Event], *, urgent: bool = False) -> None:
        """Append events (denied requests, for example) to the audit log.

        Those that are `urgent` say of a right that it is gone, and are written on a full disk too.
        """
        audit.record(self.engine, events, urgent=urgent)

    def audit_heads(self) -> tuple[Head, Head]:
        """The newest entries of the audit log's changes and denied requests: keep them outside, to check against."""
        return audit.read_heads(self.engine)

    def audit_log(self, *, after: int = 0, limit: int = 100) -> list[Entry]:
        """Entries of the audit log after a sequence number, oldest first."""
        return audit.read_log(self.engine, after=after, limit=limit)

    def verify_audit(self, *, outside: Iterable[Head] = ()) -> Verified:
        """Check the whole audit log; raises `AuditBroken`."""
        return audit.verify_log(self.engine, outside=outside)

    def trim_audit(self, *, before: float, actor: str, at: float, spare: float = 0.0) -> int:
        """Remove denied requests that are older than `before` (Unix seconds); returns how many. See `audit.trim`."""
        return audit.trim(self.engine, before=before, actor=actor, at=at, spare=spare)

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()
