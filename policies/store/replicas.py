"""Which processes decide from this store, and up to which policy version each has confirmed.

A process announces itself before it reads its first snapshot and after each newer one. So whoever
made a change can tell when no process decides from an older policy any more: each has confirmed
the new version, or the lease of what it had before has run out.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import Engine, delete, insert, select, update

from flexgate.policies.store.database import noting, reading
from flexgate.policies.store.schema import processes

FORGOTTEN_AFTER_S: Final = 3600.0


class Process(NamedTuple):
    """One process: what it confirmed, and for how many seconds it may use what it confirmed."""

    id: str
    confirmed: int
    lease_s: float


def announce(engine: Engine, process: Process, *, at: float) -> None:
    """Note what a process has confirmed, `at` Unix seconds."""
    values = {"confirmed": process.confirmed, "lease_s": process.lease_s, "seen": at}
    table = processes
    with noting(engine) as connection:
        known = connection.execute(update(table).where(table.c.id == process.id).values(values))
        if known.rowcount == 0:
            connection.execute(insert(table).values(id=process.id, **values))
            connection.execute(delete(table).where(table.c.seen < at - FORGOTTEN_AFTER_S))


def deregister(engine: Engine, process_id: str) -> None:
    """Remove a process that has ended."""
    with noting(engine) as connection:
        connection.execute(delete(processes).where(processes.c.id == process_id))


def behind(engine: Engine, version: int) -> list[Process]:
    """The processes that have not confirmed `version` yet."""
    table = processes
    query = select(table.c.id, table.c.confirmed, table.c.lease_s).where(table.c.confirmed < version)
    with reading(engine) as connection:
        return [Process(*row) for row in connection.execute(query)]
