"""Sums over the ledger: what was used in periods of time, by whom, of which expert."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, Self

from flexgate.server.ledger.entries import MICROSECONDS
from flexgate.server.ledger.errors import LedgerError, TooMuchAsked
from flexgate.server.ledger.log import log_of
from flexgate.server.ledger.reading import INSTRUCTIONS, Source

Group = Literal["project_id", "api_key_id", "model", "expert_id", "owner_id"]
MOST_SECONDS: Final = 5.0
MOST_SUMS: Final = 20_000
COLUMNS: Final[Mapping[Group, str]] = {
    "project_id": "usage.tenant",
    "api_key_id": "usage.key_id",
    "model": "usage.model",
    "expert_id": "parts.expert",
    "owner_id": "parts.owner",
}
_OF_REQUESTS: Final = "sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens), count(*)"
_OF_PARTS: Final = "sum(prompt_positions), 0, sum(completion_positions), count(DISTINCT usage.sequence)"


@dataclass(frozen=True, slots=True)
class Sought:
    """Which requests: those that ended within a half-open time, in Unix seconds. None stands for all."""

    start: int
    end: int
    width: int
    projects: Sequence[str] | None = None
    keys: Sequence[str] | None = None
    models: Sequence[str] | None = None
    groups: Sequence[Group] = ()

    @property
    def bucket(self) -> str:
        """When the bucket of a request starts, in SQL."""
        return f"ended_at / {self.width * MICROSECONDS} * {self.width}"


@dataclass(frozen=True, slots=True)
class Sum:
    """What one group used in one bucket of time, which starts at `start`, a multiple of the width.

    By expert, the tokens are positions in which it was chosen, by owner the sum of its experts'.
    """

    start: int
    group: Mapping[Group, str | None]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    requests: int


def sums(source: Source, sought: Sought) -> list[Sum]:
    """The sums of every bucket that has any, by time and group. Blocks.

    Raises:
        LedgerError: usage cannot be read.
        TooMuchAsked: there are too many sums, or they take too long.
    """
    of_parts = bool({"expert_id", "owner_id"} & set(sought.groups))
    where, values = conditions(sought)
    columns = [COLUMNS[group] for group in sought.groups]
    grouped = ", ".join(["bucket", *columns])
    rows = read(
        source,
        f"SELECT {sought.bucket} AS bucket, {''.join(f'{name}, ' for name in columns)}"
        f"{_OF_PARTS if of_parts else _OF_REQUESTS} FROM usage{' JOIN parts USING (sequence)' if of_parts else ''} "
        f"WHERE {where} GROUP BY {grouped} ORDER BY {grouped}",
        values,
    )
    return [
        Sum(start, dict(zip(sought.groups, names, strict=True)), prompt, cached, completion, requests)
        for start, *names, prompt, cached, completion, requests in rows
    ]


def conditions(sought: Sought) -> tuple[str, list[object]]:
    """What is sought as conditions of a query, with their values."""
    where = ["ended_at >= ?", "ended_at < ?"]
    values: list[object] = [sought.start * MICROSECONDS, sought.end * MICROSECONDS]
    for column, names in (("tenant", sought.projects), ("key_id", sought.keys), ("model", sought.models)):
        if names is not None:
            where.append(f"usage.{column} IN ({', '.join('?' * len(names))})")
            values += names
    return " AND ".join(where), values


def read(
    source: Source, query: str, values: Sequence[object], *, seconds: float | None = None, most: int | None = None
) -> list[Any]:
    """The rows of a query that sums, in bounded time and number, by default those of any query. Blocks.

    Raises:
        LedgerError: usage cannot be read.
        TooMuchAsked: there are too many sums, or they take too long.
    """
    seconds, most = MOST_SECONDS if seconds is None else seconds, MOST_SUMS if most is None else most
    found = source.read(query, values, seconds=seconds, most=most + 1)
    if len(found) > most:
        raise TooMuchAsked(f"there are more than {most:,} sums")
    return found


class Reading:
    """One moment of the ledger, for sums in bounded time and number. Blocks.

    Raises:
        LedgerError: the file cannot be read.
        TooMuchAsked: there are too many sums, or all of them together take too long.
    """

    def __init__(self, path: Path, *, seconds: float | None = None, most: int | None = None) -> None:
        self._path = path
        self._seconds = MOST_SECONDS if seconds is None else seconds
        self._most = MOST_SUMS if most is None else most

    def __enter__(self) -> Self:
        path = self._path.absolute()
        with ExitStack() as opened:
            opened.enter_context(log_of(path).reading(self._seconds))
            deadline = time.monotonic() + self._seconds
            with self._failing():
                connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
            self._connection = opened.enter_context(closing(connection))
            self._opened = opened.pop_all()
        self._connection.set_progress_handler(lambda: time.monotonic() > deadline, INSTRUCTIONS)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def rows(self, query: str, values: Sequence[object]) -> list[Any]:
        """The rows of a query that sums."""
        found = list(islice(self.stream(query, values), self._most + 1))
        if len(found) > self._most:
            raise TooMuchAsked(f"there are more than {self._most:,} sums")
        return found

    def stream(self, query: str, values: Sequence[object]) -> Iterator[Any]:
        """The rows of a query, one by one."""
        with self._failing():
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN")
            for row in self._connection.execute(query, values):  # noqa: UP028 (it would close the cursor late)
                yield row

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                raise TooMuchAsked(f"the sums took longer than {self._seconds:g} seconds") from error
            raise LedgerError(
                f"the ledger {self._path} cannot be read: {error}; check the file and its disk"
            ) from error
