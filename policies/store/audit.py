"""The audit log in the store: written in the transaction of what it records, only appended to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sqlalchemy import Connection, Engine, insert, select

from flexgate.policies.audit import START, Entry, Event, Head, chain, verify
from flexgate.policies.store.engine import reading, writing
from flexgate.policies.store.schema import audit_log


def record(engine: Engine, events: Iterable[Event]) -> Head:
    """Append events in one transaction; raises `StoreUnavailable` when that is impossible."""
    with writing(engine) as connection:
        return append(connection, events)


def append(connection: Connection, events: Iterable[Event]) -> Head:
    """Append events inside the caller's writing transaction."""
    head = _head(connection)
    entries = []
    for event in events:
        entries.append(chain(head, event))
        head = Head(entries[-1].sequence, entries[-1].hash)
    if entries:
        connection.execute(insert(audit_log), [_row(entry) for entry in entries])
    return head


def read_head(engine: Engine) -> Head:
    """The newest entry's sequence and hash, to be kept outside."""
    with reading(engine) as connection:
        return _head(connection)


def read_log(engine: Engine, *, after: int = 0, limit: int = 100) -> list[Entry]:
    """Entries after a sequence number, oldest first, at most `limit`."""
    with reading(engine) as connection:
        query = select(audit_log).where(audit_log.c.sequence > after)
        rows = connection.execute(query.order_by(audit_log.c.sequence).limit(limit))
        return [Entry(**row._mapping) for row in rows]


def verify_log(engine: Engine, *, outside: Head | None = None) -> Head:
    """Check the whole stored log; returns its head, or raises `AuditBroken`."""
    with reading(engine) as connection:
        return verify(_entries(connection), outside=outside)


def _entries(connection: Connection) -> Iterator[Entry]:
    query = select(audit_log).order_by(audit_log.c.sequence)
    for row in connection.execute(query.execution_options(yield_per=1000)):
        yield Entry(**row._mapping)


def _head(connection: Connection) -> Head:
    columns = (audit_log.c.sequence, audit_log.c.hash)
    newest = select(*columns).order_by(audit_log.c.sequence.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    return START if row is None else Head(row.sequence, row.hash)


def _row(entry: Entry) -> dict[str, object]:
    return {
        "sequence": entry.sequence,
        "at": entry.at,
        "actor": entry.actor,
        "action": entry.action,
        "detail": entry.detail,
        "previous": entry.previous,
        "hash": entry.hash,
    }
