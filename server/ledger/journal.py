"""The journal of the ledger: a SQLite file of this server's own, apart from the policy database.

A request is written down three times: when it is registered, before the first byte of its response leaves; as a mark of
what it has used, before tokens leave that no earlier mark covers; and when it ends, with what it used in all. What
leaves is therefore never more than what is written down, and what is written down never more than what was generated,
whenever the server is killed. A request that was running then ends at the next start, with its last mark.

One thread writes. It commits whatever has come since its last commit at once, so that a commit serves all requests that
wait for one, and none waits for more than the commit that is running and its own. Another thread watches it: where a
commit takes too long, all that wait are refused, and new requests are, until it has ended. On a full disk ends alone
are written, into space that is reserved for them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from flexgate.policies.errors import StoreFull
from flexgate.policies.store.identity import FileIdentity
from flexgate.policies.store.reserve import Reserve
from flexgate.server.ledger.batch import Batch, End, answer
from flexgate.server.ledger.corrections import Corrections
from flexgate.server.ledger.entries import (
    INTERRUPTED,
    MICROSECONDS,
    Part,
    Registration,
    State,
    Used,
    microseconds,
)
from flexgate.server.ledger.errors import LedgerClosed, LedgerError
from flexgate.server.ledger.log import log_of
from flexgate.server.ledger.opening import open_ledger, told
from flexgate.server.ledger.retention import Retention
from flexgate.server.ledger.schema import VERSION
from flexgate.server.ledger.writing import Recorded, Rows

NAME: Final = "ledger.db"
RETRY_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 5.0
"""How long a commit may take before what waits for it is refused."""
LOOK_SECONDS: Final = 0.25

Count = Callable[[Registration, str, Used, Sequence[Part]], None]
"""Told a request that has ended: how, what it used, and what each expert did."""

logger = logging.getLogger(__name__)


class Journal:
    """An open journal. Its methods are the event loop's, and do not wait for the disk."""

    def __init__(self, path: Path, *, clock: Callable[[], float], count: Count = lambda *_: None) -> None:
        """Open or create the file, and end what was running when it was last open. Blocks.

        Args:
            clock: gives Unix seconds.
            count: told each request whose end was committed, in the thread that writes.

        Raises:
            LedgerError: it is no journal, of a newer version, or cannot be read or written.
        """
        self.path = path
        self._clock = clock
        self._count = count
        self._recorded: list[Recorded] = []  # by the transaction that is running
        self._connection = open_ledger(path)
        self._lock = threading.Condition()
        self._next = Batch()
        self._writing: tuple[Batch, float] | None = None  # and since when
        self._owed: list[End] = []  # those that could not be written yet: no more than were running when writes failed
        self._running: dict[str, int] = {}  # requests that were registered and have not ended, with their numbers
        self._numbers = itertools.count(1)
        self._used: dict[str, int] = {}  # when each of them was registered or last marked, in microseconds
        self._refused: list[int] = []  # numbers of requests that were refused, and may have been written
        self._newest = 0  # of the ends, in microseconds
        self._marked_at = 0  # the time of the marks of the commit that is running
        self._behind = False  # whether the clock is behind it
        self._failing: LedgerError | None = None
        self._closing = False
        self._file = FileIdentity(path, "the ledger")
        self._file.take()
        self._reserve = Reserve(path, "the ends of running requests")
        self._log = log_of(path.absolute())
        self._log_is_due = False
        self.retention = Retention(lambda: self._clock())
        self.corrections = Corrections(path, lambda: self._clock(), self._file, self._reserve)
        with told(path):
            self._rows = Rows(self._connection)
            (self.id,) = self._connection.execute("SELECT id FROM ledger").fetchone()
            self.ended_before = self._rows.sequence  # up to which nothing ended at this start
            self._end_running()
            self.ended_at_start = self._rows.sequence
        self._reserve.keep()
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write_all, name="flexgate-ledger", daemon=True)
        self._writer.start()
        threading.Thread(target=self._watch, name="flexgate-ledger-watch", daemon=True).start()

    @property
    def failing(self) -> bool:
        """Whether the last write failed, or takes too long."""
        return self._failing is not None

    def has_written(self, before: float) -> bool:
        """Whether the file has all ends before a time that is over, in Unix seconds.

        A request that runs, and was last marked before that time, may end there: if the server is killed now.
        """
        with self._lock:
            batches = [self._next] if self._writing is None else [self._next, self._writing[0]]
            begun = [one.registered_at for batch in batches for one, _ in batch.registered]
            earliest = min((*begun, *self._used.values()), default=None)
        return earliest is None or max(earliest, self.corrections.closed) >= microseconds(before)

    def state(self) -> State:
        """How it stands now, for monitoring."""
        with self._lock:
            writing = [] if self._writing is None else self._writing[0].ended
            unwritten = len(self._owed) + len(writing) + len(self._next.ended)
        behind = max(0, self._newest - microseconds(self._clock())) / MICROSECONDS
        uncopied = self.retention.uncopied(self._rows.sequence)
        return State(self.failing, len(self._running), unwritten, behind, uncopied)

    def register(self, registration: Registration) -> Entry:
        """Write down a request before anything of its response leaves.

        Raises:
            LedgerError: the last write failed, and none has succeeded since; or the server is stopping.
        """
        if self._failing is not None:
            raise self._failing
        done = asyncio.get_running_loop().create_future()
        self._add(lambda batch: batch.registered.append((registration, done)))
        return Entry(self, registration, done)

    def mark(self, request: str, used: Used) -> asyncio.Future[None]:
        """Write down what a running request has used so far; each future has one waiter."""
        done, mark = asyncio.get_running_loop().create_future(), used.encode()
        if self._failing is not None:
            done.set_exception(self._failing)
            return done

        def add(batch: Batch) -> None:
            _, waiting = batch.marks.get(request, (b"", []))
            batch.marks[request] = mark, [*waiting, done]

        self._add(add)
        return done

    def end(self, registration: Registration, outcome: str, used: Used) -> None:
        """Write down what a request used in all; tried again every second for as long as the disk refuses it.

        Nothing is written of a request that was not registered. An end is never earlier than those before it, and never
        in a closed month.
        """
        now = microseconds(self._clock())
        self._newest = max(self._newest, self.corrections.closed)
        self._note_clock(now)
        at = self._newest = max(now, registration.registered_at, self._newest)
        try:
            self._add(lambda batch: batch.ended.append((registration, outcome, at, used)))
        except LedgerError:
            logger.error("request %s ended after the ledger was closed; its last mark counts", registration.request)

    def close(self) -> None:
        """Write what has come, and close the file; on a disk that hangs, leave it open. Blocks."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        while self._writer.is_alive() and not self._hangs():
            self._writer.join(LOOK_SECONDS)
        self._closed.set()
        self._log.release()
        writing = [] if self._writing is None else self._writing[0].ended
        if left := len(self._owed) + len(writing) + len(self._next.ended):
            logger.error("the usage of %d requests could not be written to %s", left, self.path)
        if not self._writer.is_alive():
            self._connection.close()

    def _add(self, add: Callable[[Batch], None]) -> None:
        with self._lock:
            if self._closing:
                raise LedgerClosed("the ledger is closed: the server is stopping")
            add(self._next)
            self._lock.notify()

    def _write_all(self) -> None:
        closing = False
        while not closing:
            with self._lock:
                if not self._next and not self._closing and not self._log_is_due:
                    self._lock.wait(RETRY_SECONDS if self._failing is not None else self.retention.seconds())
                batch, self._next = self._next, Batch()
                self._writing = batch, time.monotonic()
                closing = self._closing
            waiting = batch.waiting
            error = self._write(batch)
            with self._lock:
                self._note(error)
            answer(waiting, error)
            if error is None and self.retention.seconds() == 0:
                self._trim()
            if self._log_is_due:
                self._empty_log()
            with self._lock:
                self._writing = None

    def _write(self, batch: Batch) -> LedgerError | None:
        """Commit a batch with the ends that are owed; returns why not, if its ends are owed and all else is refused."""
        full = self._full()
        if full is not None:
            batch.refuse(full)
        registered = {registration.request: next(self._numbers) for registration, _ in batch.registered}
        self._running |= registered
        ended = [end for end in batch.ended if end[0].request in self._running]
        batch.ended, self._owed = self._owed + ended, []
        for request in [request for request in batch.marks if request not in self._running]:
            answer(batch.marks.pop(request)[1], LedgerError(f"the ledger has no running request {request} to mark"))
        if not batch and (full is not None or self._failing is None):
            return full
        try:
            self._file.require()
            with self._transaction():
                self._insert(batch)
            self._file.require()
        except Exception as error:
            self._owed = [end for end in batch.ended if end[0].request not in registered]
            for request in registered:
                del self._running[request]
            self._refused += registered.values()  # whether or not the disk has them
            return self._error(error)
        self._reserve.keep()
        self._refused = []
        with self._lock:
            self._used |= {one.request: one.registered_at for one, _ in batch.registered}
            self._used |= dict.fromkeys(batch.marks, self._marked_at)
            for registration, _, _, _ in batch.ended:
                self._running.pop(registration.request, None)
                self._used.pop(registration.request, None)
            batch.registered = []  # they are used now, or have ended
        self._count_recorded()
        return full

    def _count_recorded(self) -> None:
        for one in self._recorded:
            self._count(*one)

    def _trim(self) -> None:
        """Delete a little of what is too old."""
        try:
            with self._transaction():
                self.retention.trim(self._connection)
        except sqlite3.Error as error:
            logger.error("usage that is too old is not deleted: %s", error)
            self.retention.later()

    def _empty_log(self) -> None:
        self._log_is_due = False
        self._log.empty(self._connection)

    def _full(self) -> LedgerError | None:
        """Why nothing but ends is written, if the disk has room for no more."""
        try:
            self._reserve.require_room()
        except StoreFull as error:
            return self._error(error)
        return None

    def _error(self, reason: object) -> LedgerError:
        return LedgerError(f"the ledger {self.path} cannot be written: {reason}; free space or check its disk")

    def _note(self, error: LedgerError | None) -> None:
        """Refuse requests from now on, or no longer."""
        if error is not None and self._failing is None:
            logger.error("%s", error)
        if error is None and self._failing is not None:
            logger.warning("the ledger %s is written again", self.path)
        self._failing = error

    def _note_clock(self, now: int) -> None:
        """Log, once until the clock has caught up, that it is behind the newest end."""
        behind = (self._newest - now) // MICROSECONDS
        if behind > 0 and not self._behind:
            logger.error("the clock is %d seconds behind the newest end or closed month: usage gets that time", behind)
        self._behind = behind > 0

    def _watch(self) -> None:
        """Refuse what waits for a commit that takes too long; ends wait on. Have a long log emptied."""
        while not self._closed.wait(LOOK_SECONDS):
            with self._lock:
                if self._writing is not None and self._hangs():
                    error = self._error(f"a commit has taken more than {ANSWER_SECONDS:g} seconds")
                    self._note(error)
                    self._next.refuse(error)
                    answer(self._writing[0].waiting, error)
            if self._log.is_due():
                with self._lock:
                    self._log_is_due = True
                    self._lock.notify()

    def _hangs(self) -> bool:
        writing = self._writing
        return writing is not None and time.monotonic() - writing[1] > ANSWER_SECONDS

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._recorded = []
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                self._connection.execute("ROLLBACK")
            raise

    def _insert(self, batch: Batch) -> None:
        """Write a batch; what ends in it needs no rows of running requests."""
        rows, running = self._rows, self._running
        if not batch:  # whether the disk takes anything again
            self._connection.execute(f"PRAGMA user_version = {VERSION}")
        if self._failing is not None:  # the disk may have what it refused
            rows.reload()
        self._recorded = rows.insert(batch.ended)
        ended = {registration.request for registration, _, _, _ in batch.ended}
        rows.begin((running[one.request], one) for one, _ in batch.registered if one.request not in ended)
        at = self._marked_at = max(self._marked_at, self._newest, microseconds(self._clock()))
        rows.mark((running[id_], mark, at) for id_, (mark, _) in batch.marks.items() if id_ not in ended)
        rows.drop([*(running[request] for request in ended if request in running), *self._refused])

    def _end_running(self) -> None:
        """End the requests that were running when the file was last open, with their last marks, when these were made.

        None ends earlier than what ended before the file was closed, or in a closed month.
        """
        ((newest,),) = self._connection.execute("SELECT max(ended_at) FROM usage").fetchall()
        self._newest = max(newest or 0, self.corrections.closed)
        self._note_clock(microseconds(self._clock()))
        ended = []
        for registration, used, at in self._rows.running():
            self._newest = max(self._newest, at)
            ended.append((registration, INTERRUPTED, self._newest, used))
        with self._transaction():
            self._recorded = self._rows.insert(ended)
            self._rows.drop_all()
        self._count_recorded()
        if ended:
            logger.warning("%d requests were running when the server ended; their last marks count", len(ended))


class Entry:
    """A running request in the journal."""

    __slots__ = ("_covered", "_ended", "_journal", "_registered", "registration")

    def __init__(self, journal: Journal, registration: Registration, registered: asyncio.Future[None]) -> None:
        self.registration = registration
        self._journal = journal
        self._registered = registered
        self._covered = 0
        self._ended = False

    async def registered(self) -> None:
        """Wait until the request is written down; raises `LedgerError` where it cannot be."""
        if self._registered.done():
            self._registered.result()
        else:
            await asyncio.shield(self._registered)  # others may wait for it, too

    async def cover(self, tokens: int, used: Callable[[], Used]) -> None:
        """Wait until so many tokens are written down, which may leave then.

        Args:
            used: what was used so far, no less than `tokens`; only asked where an earlier mark does not cover them.

        Raises:
            LedgerError: they are not, and may not leave.
        """
        await self.registered()
        if tokens > self._covered:
            now = used()
            await self._journal.mark(self.registration.request, now)
            self._covered = max(self._covered, now.prompt_tokens + now.completion_tokens)

    def end(self, outcome: str, used: Used) -> None:
        """Write down the end; the first one counts."""
        if not self._ended:
            self._journal.end(self.registration, outcome, used)
        self._ended = True
