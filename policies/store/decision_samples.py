"""Samples of the decisions that requests got, to be replayed against a proposed policy.

Kept is what a decision depends on, once per distinct sample: tenant, declared purpose and region,
and the listed experts that were named; how many requests it stands for, and when the last one came.
The newest samples are kept, and of one tenant no more than its part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from flexgate.policies.decision import DecisionRequest
from flexgate.policies.simulate import Replay
from flexgate.policies.store.database import reading, writing
from flexgate.policies.store.schema import decision_samples

MOST: Final = 10_000
MOST_OF_ONE: Final = 500
AT_ONCE: Final = 25


class DecisionSample(NamedTuple):
    """What one request needed decided; the order of names, and naming one twice, is no difference."""

    tenant_id: str
    purpose: str | None
    region: str | None
    only: tuple[str, ...] | None
    ignore: tuple[str, ...]

    @property
    def id(self) -> str:
        """Equal for equal samples."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class CountedSample(NamedTuple):
    """A sample, how many requests it stands for, and when the last one came (Unix seconds)."""

    sample: DecisionSample
    times: int
    last: float


def add_samples(engine: Engine, counted: Iterable[CountedSample]) -> None:
    """Count samples, and delete the oldest beyond the bounds.

    A few at a time: a change of the policy, which may be a revocation, waits for no more.
    """
    rest = iter(counted)
    while some := list(islice(rest, AT_ONCE)):
        with writing(engine) as connection:
            for sample, times, last in some:
                _add(connection, sample, times, last)
    with writing(engine) as connection:
        _forget(connection)


def _add(connection: Connection, sample: DecisionSample, times: int, last: float) -> None:
    table = decision_samples
    known = update(table).where(table.c.id == sample.id)
    if connection.execute(known.values(times=table.c.times + times, last=last)).rowcount == 0:
        connection.execute(insert(table).values(_row(sample, times, last)))


def read_samples(engine: Engine) -> list[CountedSample]:
    """Every sample that is kept, newest first."""
    table = decision_samples
    with reading(engine) as connection:
        rows = connection.execute(select(table).order_by(table.c.last.desc(), table.c.id))
        return [
            CountedSample(
                DecisionSample(
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


def _row(sample: DecisionSample, times: int, last: float) -> dict[str, Any]:
    return {"id": sample.id, **sample._asdict(), "times": times, "last": last}


def _forget(connection: Connection) -> None:
    table = decision_samples
    newest = (table.c.last.desc(), table.c.id)
    places = select(
        table.c.id,
        func.row_number().over(order_by=newest).label("of_all"),
        func.row_number().over(partition_by=table.c.tenant_id, order_by=newest).label("of_tenant"),
    ).subquery()
    beyond = select(places.c.id).where((places.c.of_all > MOST) | (places.c.of_tenant > MOST_OF_ONE))
    connection.execute(delete(table).where(table.c.id.in_(beyond)))


def replays(engine: Engine, now: float) -> list[Replay]:
    """Every stored sample of all processes, as if its request came at `now` (Unix seconds)."""
    return [
        Replay(
            sample.tenant_id,
            DecisionRequest(
                decision_id="simulate",
                purpose=sample.purpose,
                region=sample.region,
                only=sample.only,
                ignore=sample.ignore,
            ),
            now,
            times,
        )
        for sample, times, _ in read_samples(engine)
    ]
