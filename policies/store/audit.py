"""The audit log in the store: written in the transaction of what it records, and only appended to.

Alone the oldest denied requests may be trimmed, in the transaction that records it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Final

from sqlalchemy import Connection, Engine, Select, delete, false, func, insert, select

from flexgate.policies.audit import (
    CHANGES,
    REQUESTS,
    STARTS,
    Entry,
    Event,
    Head,
    Verified,
    chain,
    trimming,
    verify,
)
from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.schema import audit_log, policy_revisions

MOST_TRIMMED: Final = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """Which entries are asked for: `after < sequence < before`, `since <= at < until`, by some
    actors, of one log, and those for which `matches` says yes.
    """

    after: int | None = None
    before: int | None = None
    since: float | None = None
    until: float | None = None
    actors: frozenset[str] | None = None
    log: str | None = None
    matches: Callable[[Entry], bool] = lambda _: True


def record(engine: Engine, events: Iterable[Event], *, urgent: bool = False) -> None:
    """Append events in one transaction; raises `StoreUnavailable` when that is impossible."""
    with writing(engine, urgent=urgent) as connection:
        append(connection, events)


def append(connection: Connection, events: Iterable[Event]) -> None:
    """Append events, each to its log, inside the caller's writing transaction."""
    newest = connection.scalar(select(func.max(audit_log.c.sequence))) or 0
    heads: dict[str, Head] = {}
    entries = []
    for event in events:
        head = heads.get(event.kind) or _head(connection, event.kind)
        entries.append(chain(head, event, newest=newest))
        newest = entries[-1].sequence
        heads[event.kind] = Head(newest, entries[-1].hash, event.kind)
    if entries:
        connection.execute(insert(audit_log), [_row(entry) for entry in entries])


def read_heads(engine: Engine) -> tuple[Head, Head]:
    """The newest entry of the changes, and of the denied requests, to be kept outside."""
    with reading(engine) as connection:
        return _head(connection, CHANGES), _head(connection, REQUESTS)


def trim(engine: Engine, *, before: float, actor: str, at: float, spare: float = 0.0) -> int:
    """Remove the oldest denied requests, as far as all of them were first denied before `before` (Unix seconds).

    At most `MOST_TRIMMED` go in one transaction, and the newest never; an entry of the changes says so. With `spare`,
    nothing is done before the oldest is by so many seconds too old. Returns how many went.
    """
    with writing(engine) as connection:
        table = audit_log.c
        query = select(table.sequence, table.hash, table.at).where(table.log == REQUESTS).order_by(table.sequence)
        rows = connection.execute(query.limit(MOST_TRIMMED + 1)).all()
        old = list(takewhile(lambda row: row.at < before, rows[:-1]))
        if not old or old[0].at >= before - spare:
            return 0
        through = Head(old[-1].sequence, old[-1].hash, REQUESTS)
        connection.execute(delete(audit_log).where(table.log == REQUESTS, table.sequence <= through.sequence))
        append(connection, [trimming(at, actor, before=before, entries=len(old), through=through)])
        return len(old)


def policy_digest(engine: Engine, version: int) -> str | None:
    """What a policy version is known by outside: the hash of its last entry, which names all entries before it.

    None where no entry of that version is there.
    """
    table = audit_log.c
    with reading(engine) as connection:
        made = connection.scalar(select(policy_revisions.c.at).where(policy_revisions.c.version == version))
        at = table.at.between(made - 1e-6, made + 1e-6) if made is not None else false()
        query = select(table.hash, table.detail).where(table.log == CHANGES, at)
        rows = connection.execute(query.order_by(table.sequence.desc()).execution_options(yield_per=10))
        return next((row.hash for row in rows if row.detail.get("policy_version") == version), None)


def read_log(engine: Engine, *, after: int = 0, limit: int = 100) -> list[Entry]:
    """Entries after a sequence number, oldest first, at most `limit`."""
    with reading(engine) as connection:
        query = select(audit_log).where(audit_log.c.sequence > after)
        rows = connection.execute(query.order_by(audit_log.c.sequence).limit(limit))
        return [Entry(**row._mapping) for row in rows]


def search(engine: Engine, sought: Sought, *, limit: int, oldest: bool = False) -> list[Entry]:
    """The newest entries that match, or the oldest; the first of them first, at most `limit`."""
    sequence = audit_log.c.sequence
    query = _query(sought).order_by(sequence if oldest else sequence.desc())
    with reading(engine) as connection:
        rows = connection.execute(query.execution_options(yield_per=200))
        found = (Entry(**row._mapping) for row in rows)
        return list(islice((entry for entry in found if sought.matches(entry)), limit))


def count_denied(
    engine: Engine,
    since: float,
    until: float,
    concerns: Callable[[str, float, float], bool],
    *,
    each: Callable[[], None] = lambda: None,
) -> dict[tuple[str, str], int]:
    """How many requests were denied because of an expert, by expert and code of the reason.

    Of entries that are kept, that began at `since <= at < until`, and that name their reasons; each stands for requests
    from its first to its last, and `concerns` says of an expert and these times whether it counts. `each` is called for
    each entry, and ends the count with what it raises.
    """
    counts: dict[tuple[str, str], int] = {}
    with reading(engine) as connection:
        query = _query(Sought(log=REQUESTS, since=since, until=until)).with_only_columns(
            audit_log.c.at, audit_log.c.detail
        )
        for row in connection.execute(query.execution_options(yield_per=1000)):
            each()
            for expert, code, _ in row.detail.get("rules", ()):
                if concerns(expert, row.at, max(row.at, row.detail["last"])):
                    counts[expert, code] = counts.get((expert, code), 0) + row.detail["requests"]
    return counts


def _query(sought: Sought) -> Select[Any]:
    table = audit_log
    query = select(table)
    if sought.before is not None:
        query = query.where(table.c.sequence < sought.before)
    if sought.after is not None:
        query = query.where(table.c.sequence > sought.after)
    if sought.since is not None:
        query = query.where(table.c.at >= sought.since)
    if sought.until is not None:
        query = query.where(table.c.at < sought.until)
    if sought.log is not None:
        query = query.where(table.c.log == sought.log)
    if sought.actors is not None:
        query = query.where(table.c.actor.in_(sought.actors))
    return query


def verify_log(engine: Engine, *, outside: Iterable[Head] = ()) -> Verified:
    """Check the whole stored log; raises `AuditBroken`."""
    with reading(engine) as connection:
        return verify(_entries(connection), outside=outside)


def _entries(connection: Connection) -> Iterator[Entry]:
    query = select(audit_log).order_by(audit_log.c.sequence)
    for row in connection.execute(query.execution_options(yield_per=1000)):
        yield Entry(**row._mapping)


def _head(connection: Connection, log: str) -> Head:
    columns = (audit_log.c.sequence, audit_log.c.hash)
    query = select(*columns).where(audit_log.c.log == log).order_by(audit_log.c.sequence.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return STARTS[log] if row is None else Head(row.sequence, row.hash, log)


def _row(entry: Entry) -> dict[str, object]:
    return {
        "sequence": entry.sequence,
        "at": entry.at,
        "actor": entry.actor,
        "action": entry.action,
        "detail": entry.detail,
        "previous": entry.previous,
        "hash": entry.hash,
        "log": entry.log,
    }
