"""Tokens that projects and keys have used, summed over all processes and restarts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.schema import token_use, use_batches

FORGOTTEN_AFTER_S: Final = 7 * 86400.0
_IN: Final = "@"


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
    table = token_use
    with writing(engine) as connection:
        if not _is_next(connection, batch, at):
            return
        for scope, tokens in sorted(used.items()):
            more = update(table).where(table.c.limit_scope == scope).values(tokens=table.c.tokens + tokens)
            if connection.execute(more).rowcount == 0:
                _forget_earlier(connection, scope)
                connection.execute(insert(table).values(limit_scope=scope, tokens=tokens))


def _forget_earlier(connection: Connection, scope: str) -> None:
    """Remove periods of a scope before the one before this, which a clock that is behind may still be in.

    Names of a scope's periods are equally long and sort by time.
    """
    owner, found, _ = scope.partition(_IN)
    if found:
        name = token_use.c.limit_scope
        same = name.startswith(owner + _IN, autoescape=True), func.length(name) == len(scope)
        last = connection.scalar(select(func.max(name)).where(*same, name < scope))
        if last is not None:
            connection.execute(delete(token_use).where(*same, name < last))


def read_use(engine: Engine) -> dict[str, int]:
    """Tokens used so far, by limit scope."""
    with reading(engine) as connection:
        return {row.limit_scope: row.tokens for row in connection.execute(select(token_use))}


def _is_next(connection: Connection, batch: Batch, at: float) -> bool:
    """Note a batch; False if it was noted before."""
    table = use_batches
    last = connection.scalar(select(table.c.batch).where(table.c.writer == batch.writer))
    if last is None:
        connection.execute(delete(table).where(table.c.at < at - FORGOTTEN_AFTER_S))
        connection.execute(insert(table).values(writer=batch.writer, batch=batch.number, at=at))
    elif last < batch.number:
        connection.execute(update(table).where(table.c.writer == batch.writer).values(batch=batch.number, at=at))
    return last is None or last < batch.number
