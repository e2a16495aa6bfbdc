"""Tokens that projects and keys have used, summed over all processes and restarts."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Engine, insert, select, update

from flexgate.policies.store.engine import reading, writing
from flexgate.policies.store.schema import token_use


def add_use(engine: Engine, used: Mapping[str, int]) -> None:
    """Add tokens to each subject (a project's or key's id), all of them or none."""
    table = token_use
    with writing(engine) as connection:
        for subject, tokens in sorted(used.items()):
            more = update(table).where(table.c.subject == subject).values(tokens=table.c.tokens + tokens)
            if connection.execute(more).rowcount == 0:
                connection.execute(insert(table).values(subject=subject, tokens=tokens))


def read_use(engine: Engine) -> dict[str, int]:
    """Tokens used so far, by subject."""
    with reading(engine) as connection:
        return {row.subject: row.tokens for row in connection.execute(select(token_use))}
