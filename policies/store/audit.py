"""The audit log in the store: written in the transaction of what it records, only appended to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Engine, Select, insert, select

from flexgate.policies.audit import START, Entry, Event, Head, chain, verify
from flexgate.policies.store.engine import reading, writing
from flexgate.policies.store.schema import audit_log


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """Which entries are asked for: `after < sequence < before`, `since <= at < until`, by some
    actors, and those for which `matches` says yes.
    """

    after: int | None = None
    before: int | None = None
    since: float | None = None
    until: float | None = None
    actors: frozenset[str] | None = None
    matches: Callable[[Entry], bool] = lambda _: True


def record(engine: Engine, events: Iterable[Event], *, urgent: bool = False) -> Head:
    """Append events in one transaction; raises `StoreUnavailable` when that is impossible."""
    with writing(engine, urgent=urgent) as connection:
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


def newest(engine: Engine, sought: Sought, *, limit: int) -> list[Entry]:
    """Entries that match, newest first, at most `limit`."""
    with reading(engine) as connection:
        rows = connection.execute(_query(sought).execution_options(yield_per=200))
        found = (Entry(**row._mapping) for row in rows)
        return list(islice((entry for entry in found if sought.matches(entry)), limit))


def _query(sought: Sought) -> Select[Any]:
    table = audit_log
    query = select(table).order_by(table.c.sequence.desc())
    if sought.before is not None:
        query = query.where(table.c.sequence < sought.before)
    if sought.after is not None:
        query = query.where(table.c.sequence > sought.after)
    if sought.since is not None:
        query = query.where(table.c.at >= sought.since)
    if sought.until is not None:
        query = query.where(table.c.at < sought.until)
    if sought.actors is not None:
        query = query.where(table.c.actor.in_(sought.actors))
    return query


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
