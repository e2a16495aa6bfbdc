"""What projects and keys have used of budgets, summed over all processes and restarts, and what runs has reserved.

What a server that was killed had reserved counts until it starts again, and then what it used; at most for a lease.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, bindparam, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.schema import budget_reservations, token_use, use_batches

FORGOTTEN_AFTER_S: Final = 7 * 86400.0
LEASE_S: Final = 900.0
"""How long what a server has reserved counts after it last wrote or renewed it."""
_IN: Final = "@"
_INTERRUPTED: Final = "interrupted@"
_FORGOTTEN: Final = {use_batches: (~use_batches.c.writer.startswith(_INTERRUPTED, autoescape=True),)}
"""A ledger's interruptions would count again if it was forgotten up to where they are counted."""
_PERIODS: Final = ("____-__", "____-__-__")
"""Names of months and days, as SQL's LIKE has them."""


def in_period(scope: str, period: str) -> str:
    """What a limit scope's tokens of one day or month are counted under."""
    return f"{scope}{_IN}{period}"


class Batch(NamedTuple):
    """Names what one process writes at once: a process counts its batches up from 1."""

    writer: str
    number: int


class Reservations(NamedTuple):
    """What a server has reserved now, in those limit scopes in which it is not what it was."""

    server: str
    amounts: Mapping[str, int]


class Use(NamedTuple):
    """What is used by limit scope, what others have reserved, and in which scopes the database has own reservations.

    `lapsed` are the other servers that have reservations and have not renewed them within the lease.
    """

    used: dict[str, int]
    elsewhere: Mapping[str, int]
    own: frozenset[str]
    lapsed: frozenset[str]


NOTHING_RESERVED: Final = Reservations("", {})


def add_use(
    engine: Engine, used: Mapping[str, int], batch: Batch, at: float, reserved: Reservations = NOTHING_RESERVED
) -> None:
    """Add tokens to each limit scope (a project's or key's id), and note what is reserved, `at` Unix seconds.

    All of it is written or nothing. A batch that was written before changes nothing: where it is unknown whether it
    was, write the same one again.
    """
    with writing(engine, alone=False) as connection:
        if _is_next(connection, batch, at):
            _add(connection, used)
            _reserve(connection, reserved, at)


def _add(connection: Connection, used: Mapping[str, int]) -> None:
    make = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert
    adding = make(token_use)
    more = {"tokens": token_use.c.tokens + adding.excluded.tokens}
    rows = [{"limit_scope": scope, "tokens": tokens} for scope, tokens in sorted(used.items())]  # locked in one order
    if rows:
        connection.execute(adding.on_conflict_do_update(index_elements=["limit_scope"], set_=more), rows)


def _reserve(connection: Connection, reserved: Reservations, at: float) -> None:
    table, server = budget_reservations, reserved.server
    own = delete(table).where(table.c.limit_scope == bindparam("scope"), table.c.server == server)
    if reserved.amounts:
        connection.execute(own, [{"scope": scope} for scope in reserved.amounts])
    rows = [
        {"limit_scope": scope, "server": server, "amount": amount, "at": at}
        for scope, amount in reserved.amounts.items()
        if amount
    ]
    if rows:
        connection.execute(insert(table), rows)


def interruptions_writer(ledger: str) -> str:
    """What what a ledger has interrupted is written as: a batch has the last sequence of it that is counted."""
    return f"{_INTERRUPTED}{ledger}"


def last_batch(engine: Engine, writer: str) -> int | None:
    """The batch of a writer that was written last; None where there was none, or it was forgotten."""
    with reading(engine) as connection:
        return connection.scalar(select(use_batches.c.batch).where(use_batches.c.writer == writer))


def forget(engine: Engine, at: float) -> None:
    """Remove what counts no more, `at` Unix seconds: what is of a week ago, and all periods before the last two.

    A clock that is behind may still be in the last but one, or is right where another is ahead.
    """
    name = token_use.c.limit_scope
    with writing(engine) as connection:
        for table in (use_batches, budget_reservations):
            connection.execute(delete(table).where(table.c.at < at - FORGOTTEN_AFTER_S, *_FORGOTTEN.get(table, ())))
        for form in _PERIODS:
            is_one, period = name.like(f"%{_IN}{form}"), func.substr(name, func.length(name) - (len(form) - 1))
            last = connection.scalar(select(func.max(period)).where(is_one)) or ""
            before = connection.scalar(select(func.max(period)).where(is_one, period < last)) or ""
            connection.execute(delete(token_use).where(is_one, period < before))


def renew(engine: Engine, server: str, at: float) -> None:
    """Let what a server has reserved count for another lease, from `at` Unix seconds."""
    with writing(engine, alone=False) as connection:
        connection.execute(update(budget_reservations).where(budget_reservations.c.server == server).values(at=at))


def read_use(engine: Engine, server: str = "", at: float = 0.0) -> Use:
    """What is used and reserved, as `server` sees it `at` Unix seconds."""
    elsewhere: Counter[str] = Counter()
    own, lapsed = set(), set()
    with reading(engine) as connection:
        used = {row.limit_scope: row.tokens for row in connection.execute(select(token_use))}
        for row in connection.execute(select(budget_reservations)):
            if row.server == server:
                own.add(row.limit_scope)
            elif row.at < at - LEASE_S:
                lapsed.add(row.server)
            else:
                elsewhere[row.limit_scope] += row.amount
    return Use(used, elsewhere, frozenset(own), frozenset(lapsed))


def _is_next(connection: Connection, batch: Batch, at: float) -> bool:
    """Note a batch; False if it was noted before."""
    table = use_batches
    last = connection.scalar(select(table.c.batch).where(table.c.writer == batch.writer))
    if last is None:
        connection.execute(insert(table).values(writer=batch.writer, batch=batch.number, at=at))
        return True
    newer = update(table).where(table.c.writer == batch.writer, table.c.batch < batch.number)
    return bool(connection.execute(newer.values(batch=batch.number, at=at)).rowcount)  # an earlier try may just commit
