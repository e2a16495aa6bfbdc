"""Rows of requests that run and of those that have ended, as the one that writes the ledger puts them there.

What an expert did for a request is a row of numbers. What it was registered as is a row of its own, once for all
requests that it has in common; the view `parts` shows both together.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from functools import cache
from operator import itemgetter
from typing import Final

from flexgate.server.ledger.batch import End
from flexgate.server.ledger.entries import (
    Part,
    RegisteredExpert,
    Registration,
    Used,
    decode_registration,
    encode_registration,
)

Recorded = tuple[Registration, str, Used, Sequence[Part]]
"""A request that has ended: how, what it used, and what each expert did."""
MOST_KNOWN: Final = 4096
"""Sets of experts whose numbers are kept in memory."""
_USAGE: Final = (
    "INSERT INTO usage (sequence, request, registered_at, ended_at, outcome, tenant, key_id, endpoint, model, "
    "policy_version, weights_epoch, prompt_tokens, cached_tokens, completion_tokens, prompt_sha256, answer_sha256, "
    "excluded, catalogue) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, "
    "(SELECT number FROM catalogues WHERE experts = ?)) ON CONFLICT (request) DO NOTHING"
)
_CATALOGUE: Final = "INSERT INTO catalogues (experts) VALUES (?) ON CONFLICT DO NOTHING"
_NAMES: Final = ("expert", "owner", "agreement", "agreement_version", "package", "duties_sha256")
_FIND_EXPERT: Final = f"SELECT number FROM experts WHERE {' AND '.join(f'{name} IS ?' for name in _NAMES)}"
_INSERT_EXPERT: Final = f"INSERT INTO experts ({', '.join(_NAMES)}) VALUES (?, ?, ?, ?, ?, ?) RETURNING number"


class Rows:
    """The rows of an open ledger, in its transactions; after one that failed, `reload` comes before the next.

    Attributes:
        sequence: the last number that a request was given.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[Sequence[RegisteredExpert], dict[str, int]] = {}
        self.reload()

    def reload(self) -> None:
        """Begin with what is on disk."""
        given = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'usage'").fetchone()
        self.sequence: int = 0 if given is None else given[0]
        self._known.clear()

    def insert(self, ended: Sequence[End]) -> list[Recorded]:
        """Write requests, each once: a statement for all, and one for the parts of each; those that were not there."""
        numbered = list(enumerate(ended, start=self.sequence + 1))
        catalogues = {registration.catalogue for registration, _, _, _ in ended} - {None}
        self._connection.executemany(_CATALOGUE, [(one,) for one in catalogues])
        if self._connection.executemany(_USAGE, map(_usage, numbered)).rowcount < len(numbered):
            query = "SELECT sequence FROM usage WHERE sequence > ?"
            new = {sequence for (sequence,) in self._connection.execute(query, (self.sequence,))}
            numbered = [one for one in numbered if one[0] in new]
        recorded: list[Recorded] = []
        for sequence, (registration, outcome, _, used) in numbered:
            parts = used.parts(registration)
            recorded.append((registration, outcome, used, parts))
            if parts:
                numbers, values = self._numbers(registration.experts), list[int]()
                for part in parts:
                    values += (sequence, numbers[part.expert], *part[2:6], part.share_ppm)
                self._connection.execute(_counts(len(parts)), values)
        self.sequence += len(ended)
        return recorded

    def begin(self, registered: Iterable[tuple[int, Registration]]) -> None:
        """Write requests that run, by their numbers."""
        rows = [(number, one.request, encode_registration(one)) for number, one in registered]
        self._connection.executemany("INSERT INTO running VALUES (?, ?, ?)", rows)

    def mark(self, marks: Iterable[tuple[int, bytes, int]]) -> None:
        """Write what running requests have used, and when this is written, in the place of earlier marks."""
        self._connection.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", marks)

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete the rows of requests that run no more."""
        over = [(number,) for number in numbers]
        for table in ("running", "marks"):
            self._connection.executemany(f"DELETE FROM {table} WHERE number = ?", over)

    def drop_all(self) -> None:
        """Delete the rows of all requests that run."""
        for table in ("running", "marks"):
            self._connection.execute(f"DELETE FROM {table}")

    def running(self) -> list[tuple[Registration, Used, int]]:
        """The requests that run, what they have used, and when they were registered or last marked, in that order."""
        query = (
            "SELECT registration, mark, coalesce(at, 0) FROM running LEFT JOIN marks USING (number) ORDER BY request"
        )
        found = []
        for text, mark, at in self._connection.execute(query):
            registration = decode_registration(text)
            found.append((registration, Used.decode(mark), max(at, registration.registered_at)))
        return sorted(found, key=itemgetter(2))

    def _numbers(self, experts: Sequence[RegisteredExpert]) -> dict[str, int]:
        """The number of each expert as it was registered."""
        numbers = self._known.get(experts)
        if numbers is None:
            if len(self._known) == MOST_KNOWN:
                self._known.clear()
            numbers = self._known[experts] = {one.expert: self._number(one) for one in experts}
        return numbers

    def _number(self, expert: RegisteredExpert) -> int:
        names = expert[1:]
        found = self._connection.execute(_FIND_EXPERT, names).fetchone()
        number: int
        (number,) = found or self._connection.execute(_INSERT_EXPERT, names).fetchone()
        return number


@cache
def _counts(parts: int) -> str:
    """The statement for so many parts."""
    columns = "sequence, number, prompt_mass, prompt_positions, completion_mass, completion_positions, share_ppm"
    return f"INSERT INTO counts ({columns}) VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?)'] * parts)}"


def _usage(numbered: tuple[int, End]) -> Sequence[object]:
    sequence, (a, outcome, at, used) = numbered
    names = a.request, a.registered_at, at, outcome, a.tenant, a.key_id, a.endpoint, a.model
    tokens = used.prompt_tokens, used.cached_tokens, used.completion_tokens
    digests = a.prompt_sha256, used.answer_sha256
    return sequence, *names, a.policy_version, a.weights_epoch, *tokens, *digests, a.excluded, a.catalogue
