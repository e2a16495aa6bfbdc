"""The questions that requests asked of the policy, to be replayed against a proposed change.

Kept is what a decision depends on, once per distinct question: tenant, declared purpose and region,
and the listed experts that were named; how often it was asked, and when last. Bounded: the newest
questions, and of one tenant no more than its part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.schema import asked_questions

MOST: Final = 10_000
MOST_OF_ONE: Final = 500
AT_ONCE: Final = 25


class Question(NamedTuple):
    """What was asked; the order of names, and naming one twice, is no difference."""

    tenant_id: str
    purpose: str | None
    region: str | None
    only: tuple[str, ...] | None
    ignore: tuple[str, ...]

    @property
    def id(self) -> str:
        """Equal for equal questions."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class Asked(NamedTuple):
    """A question, how many requests asked it, and when the last one did (Unix seconds)."""

    question: Question
    times: int
    last: float


def add_questions(engine: Engine, asked: Iterable[Asked]) -> None:
    """Count questions, and forget those that were not asked for longest beyond the bounds.

    A few at a time: a change of the policy, which may be a revocation, waits for no more.
    """
    rest = iter(asked)
    while some := list(islice(rest, AT_ONCE)):
        with writing(engine) as connection:
            for question, times, last in some:
                _add(connection, question, times, last)
    with writing(engine) as connection:
        _forget(connection)


def _add(connection: Connection, question: Question, times: int, last: float) -> None:
    table = asked_questions
    known = update(table).where(table.c.id == question.id)
    if connection.execute(known.values(times=table.c.times + times, last=last)).rowcount == 0:
        connection.execute(insert(table).values(_row(question, times, last)))


def read_questions(engine: Engine) -> list[Asked]:
    """Every question that is kept, newest first."""
    table = asked_questions
    with reading(engine) as connection:
        rows = connection.execute(select(table).order_by(table.c.last.desc(), table.c.id))
        return [
            Asked(
                Question(
                    row.tenant_id,
                    row.purpose,
                    row.region,
                    None if row.only is None else tuple(row.only),
                    tuple(row.ignore),
                ),
                row.times,
                row.last,
            )
            for row in rows
        ]


def _row(question: Question, times: int, last: float) -> dict[str, Any]:
    return {"id": question.id, **question._asdict(), "times": times, "last": last}


def _forget(connection: Connection) -> None:
    table = asked_questions
    newest = (table.c.last.desc(), table.c.id)
    places = select(
        table.c.id,
        func.row_number().over(order_by=newest).label("of_all"),
        func.row_number().over(partition_by=table.c.tenant_id, order_by=newest).label("of_tenant"),
    ).subquery()
    beyond = select(places.c.id).where((places.c.of_all > MOST) | (places.c.of_tenant > MOST_OF_ONE))
    connection.execute(delete(table).where(table.c.id.in_(beyond)))
