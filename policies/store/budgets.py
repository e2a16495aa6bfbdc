"""Tokens that projects and keys have used, summed over all processes and restarts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, delete, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.schema import token_use, use_batches

FORGOTTEN_AFTER_S: Final = 7 * 86400.0
_IN: Final = "@"
_PERIODS: Final = ("____-__", "____-__-__")
"""Names of months and days, as SQL's LIKE has them."""


def in_period(scope: str, period: str) -> str:
    """What a limit scope's tokens of one day or month are counted under."""
    return f"{scope}{_IN}{period}"


class Batch(NamedTuple):
    """Names what one process writes at once: a process counts its batches up from 1."""

    writer: str
    number: int


def add_use(engine: Engine, used: Mapping[str, int], batch: Batch, at: float) -> None:
    """Add tokens to each limit scope (a project's or key's id), all of them or none, `at` Unix seconds.

    A batch that was written before changes nothing: where it is unknown whether it was, write the same one again.
    """
    rows = [{"limit_scope": scope, "tokens": tokens} for scope, tokens in sorted(used.items())]  # locked in one order
    make = (postgresql if engine.dialect.name == "postgresql" else sqlite).insert
    adding = make(token_use)
    tokens = token_use.c.tokens + adding.excluded.tokens
    with writing(engine, alone=False) as connection:
        if rows and _is_next(connection, batch, at):
            connection.execute(
                adding.on_conflict_do_update(index_elements=["limit_scope"], set_={"tokens": tokens}), rows
            )


def forget(engine: Engine, at: float) -> None:
    """Remove what counts no more, `at` Unix seconds: processes of long ago, and all periods before the last two.

    A clock that is behind may still be in the last but one, or is right where another is ahead.
    """
    name = token_use.c.limit_scope
    with writing(engine) as connection:
        connection.execute(delete(use_batches).where(use_batches.c.at < at - FORGOTTEN_AFTER_S))
        for form in _PERIODS:
            is_one, period = name.like(f"%{_IN}{form}"), func.substr(name, func.length(name) - (len(form) - 1))
            last = connection.scalar(select(func.max(period)).where(is_one)) or ""
            before = connection.scalar(select(func.max(period)).where(is_one, period < last)) or ""
            connection.execute(delete(token_use).where(is_one, period < before))


def read_use(engine: Engine) -> dict[str, int]:
    """Tokens used so far, by limit scope."""
    with reading(engine) as connection:
        return {row.limit_scope: row.tokens for row in connection.execute(select(token_use))}


def _is_next(connection: Connection, batch: Batch, at: float) -> bool:
    """Note a batch; False if it was noted before."""
    table = use_batches
    last = connection.scalar(select(table.c.batch).where(table.c.writer == batch.writer))
    if last is None:
        connection.execute(insert(table).values(writer=batch.writer, batch=batch.number, at=at))
    elif last < batch.number:
        connection.execute(update(table).where(table.c.writer == batch.writer).values(batch=batch.number, at=at))
    return last is None or last < batch.number
