"""Connections to PostgreSQL that give a server up which takes a statement and never answers.

The system notices a host that is gone. It does not notice a server process that hangs with its connections open.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen

MOST_SECONDS: Final = 20.0
"""How long a statement may take, with its rows: longer than any waits for a lock."""
SERVER_SECONDS: Final = 18.0
"""After which a slow server ends a statement itself: none runs on with its locks once it is given up."""
_LOOK_SECONDS: Final = 0.1
T = TypeVar("T")


class Answering(psycopg.Connection[Any]):
    """A connection that is closed where a statement is not answered in time."""

    _until: float | None = None

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Give all statements of the block so long, together; infinite where nothing bounds them."""
        self._until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._until = None

    def wait(self, gen: PQGen[T], interval: float = _LOOK_SECONDS, timeout: float | None = None) -> T:
        """As psycopg's; what has a time limit of its own, as notifications have, keeps it."""
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        now = time.monotonic()
        until = now + MOST_SECONDS if self._until is None else self._until
        try:
            return super().wait(gen, interval, None if until == math.inf else max(0.0, until - now))
        except psycopg.OperationalError as error:
            if time.monotonic() < until:
                raise
            self.close()  # it may answer later, to what was asked before
            raise psycopg.OperationalError("PostgreSQL does not answer: check its server and disk") from error


def connect(*args: Any, **arguments: Any) -> Answering:
    """A connection whose statements end; raises as psycopg's."""
    connection = Answering.connect(*args, **arguments)
    try:
        connection.execute(f"SET statement_timeout = {round(SERVER_SECONDS * 1000)}")
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection
