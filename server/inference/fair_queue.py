"""Choose which waiting prompt the engine gets next, so that no project keeps the others out of its batch.

A seat is one place in the engine's batch (`max_num_seqs`); every choice of a prompt takes one until it is generated.

Seats: a project may take another one while all that it has stays within its share of them and the free ones,
`taken <= share / (1 - share) * free`. So one project alone takes `share` of all seats, several leave some free for the
next one that comes, and one with nothing in the batch may take any free seat (Choudhury and Hahne, "Dynamic queue
length thresholds for shared-memory packet switches", 1998).

Turns: a project with nothing in the batch goes first. Among equals the one that has used the fewest tokens goes next,
and having been idle earns nothing: a deficit round robin on tokens whose rounds are reckoned instead of walked (Sheng
et al., "Fairness in serving large language models", 2024). Tokens of a prompt count when its turn comes, others when
they are generated. Within a project the oldest prompt goes first.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from flexgate.server.http import metrics
from flexgate.server.inference.limits import refusals

PROJECTS: Final = 8
"""As many full queues of projects are the most that waits in the server."""


class _Project:
    """One project's queue, seats and turn."""

    __slots__ = ("id", "listed", "taken", "turn", "waited", "waiting")

    def __init__(self, id_: str) -> None:
        self.id = id_
        self.waiting: OrderedDict[Ticket, None] = OrderedDict()
        self.taken = 0
        self.turn = 0.0  # tokens used so far, by weight
        self.listed = False  # among those that have nothing in the batch
        self.waited = 0.0  # seconds, of the prompt whose turn came last

    @property
    def first(self) -> Ticket:
        """The prompt whose turn is next."""
        return next(iter(self.waiting))


class Ticket:
    """A prompt's place in the queue, then its seats. Close it however the prompt ends; the second time does nothing."""

    __slots__ = ("_began", "_prompt", "_queue", "_seats", "_wake", "_weight", "project", "seated", "seats")

    def __init__(
        self, queue: FairQueue, project: _Project, seats: int, prompt: int, weight: float, began: float
    ) -> None:
        self._queue: FairQueue | None = queue  # None once closed
        self.project = project
        self.seats = seats
        self.seated = False  # its turn has come, and it is not closed
        self._seats = 0  # taken and not released
        self._prompt = prompt
        self._weight = weight
        self._began = began
        self._wake: asyncio.Future[None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether its turn has yet to come."""
        return self in self.project.waiting

    async def wait(self, seconds: float) -> bool:
        """Whether its turn came within `seconds`, the queue's own limit, and before it was closed."""
        if self.waiting and self._queue is not None:
            self._wake = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._wake}, timeout=max(0.0, min(seconds, self._queue.seconds)))
        return self.seated

    def use(self, tokens: int) -> None:
        """Count tokens that were generated."""
        if self._queue is not None:
            self.project.turn += tokens / self._weight

    def release(self) -> None:
        """Release the seat of a choice that is generated."""
        if self._queue is not None and self._seats > 1:
            self._seats -= 1
            self._queue.release_seats(self.project, 1)
        elif self._seats:
            self.close()

    def close(self) -> None:
        """Leave the queue, or release every seat."""
        queue, self._queue, self.seated = self._queue, None, False
        if queue is None:
            return
        seats, self._seats = self._seats, 0
        if seats:
            queue.release_seats(self.project, seats)
        else:
            queue.forget(self)
        self._notify()

    def take(self, now: float) -> None:
        """Take the seats: the turn has come."""
        self._seats = self.seats
        self.seated = True
        self.project.turn += max(1, self._prompt) / self._weight
        self.project.waited = now - self._began
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class FairQueue:
    """Prompts wait here for a seat. Call it from the event loop alone.

    A prompt costs the loop a step of a heap of the waiting projects, and a look at each project that has something in
    the batch: at most one for each seat.
    """

    def __init__(
        self,
        seats: int,
        *,
        share: float,
        most_queued: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share` of the seats is what one project may take alone, `most_queued` the prompts of one that may wait."""
        self.seats = self.free = seats
        self.alone = max(1, int(share * seats))
        self.seconds = seconds
        self.queued = 0  # prompts that wait
        self.projects = 0  # that wait
        self._share = share
        self._most_queued = most_queued
        self._clock = clock
        self._turn = 0.0  # of the project that was the last one when nothing ran any more
        self._projects: dict[str, _Project] = {}
        self._absent: list[tuple[float, int, _Project]] = []  # a heap: waiting, and nothing in the batch
        self._present: dict[_Project, None] = {}  # something in the batch
        self._number = itertools.count()

    def enter(self, project: str, choices: int, prompt_tokens: int, *, weight: float = 1.0) -> Ticket:
        """Queue a prompt, whose turn may come at once; raises `ApiError` where too many wait.

        Args:
            choices: how many are generated from it, each in a seat of its own.
            weight: of the project's tokens, against others'.
        """
        found = self._projects.get(project)
        if found is None:
            found = self._projects[project] = _Project(project)
        if len(found.waiting) >= self._most_queued:
            raise refusals.too_many_queued(self._most_queued, found.waited)
        if self.queued >= self._most_queued * PROJECTS:
            raise refusals.queue_full(found.waited)
        if not found.waiting:
            found.turn = max(found.turn, self._least_turn(found))
            self.projects += 1
        ticket = Ticket(self, found, min(choices, self.seats), prompt_tokens, weight, self._clock())
        found.waiting[ticket] = None
        self.queued += 1
        self._list(found)
        self._fill_seats()
        return ticket

    def release_seats(self, project: _Project, seats: int) -> None:
        """Free a project's seats, and fill them from the queue."""
        project.taken -= seats
        self.free += seats
        if self.free == self.seats:
            self._turn = max(self._turn, project.turn)
        self._list(project)
        self._fill_seats()

    def forget(self, ticket: Ticket) -> None:
        """Take a prompt out of the queue."""
        self._dequeue(ticket)
        self._list(ticket.project)
        self._fill_seats()

    def _dequeue(self, ticket: Ticket) -> None:
        waiting = ticket.project.waiting
        del waiting[ticket]
        self.queued -= 1
        self.projects -= not waiting

    def _list(self, project: _Project) -> None:
        """Put a project where `_next` looks for it."""
        if project.taken:
            self._present[project] = None
            return
        self._present.pop(project, None)
        if project.waiting and not project.listed:
            project.listed = True
            heapq.heappush(self._absent, (project.turn, next(self._number), project))

    def _fill_seats(self) -> None:
        now = self._clock()
        while self.free and (project := self._next()) is not None:
            if not project.taken:  # it goes to the end of those whose turn is the same
                heapq.heappop(self._absent)
                project.listed = False
            ticket = project.first
            self._dequeue(ticket)
            project.taken += ticket.seats
            self.free -= ticket.seats
            ticket.take(now)
            metrics.QUEUE_SECONDS.observe(project.waited)
            self._list(project)

    def _next(self) -> _Project | None:
        """The project whose turn it is, if there are seats for its first prompt.

        No other overtakes one that has nothing in the batch, so that many small prompts cannot keep a large one out.
        """
        absent = self._first_absent()
        if absent is not None:
            return absent if absent.first.seats <= self.free else None
        fitting = [project for project in self._present if project.waiting and self._may_take(project)]
        return min(fitting, key=lambda project: project.turn, default=None)

    def _least_turn(self, project: _Project) -> float:
        """The turn with which a project starts to wait: the least of waiting projects, or else of running ones."""
        absent = self._first_absent()
        waiting = [other.turn for other in self._present if other.waiting]
        if absent is not None:
            waiting.append(absent.turn)
        running = (other.turn for other in self._present if other is not project)
        return min(waiting or running, default=self._turn)

    def _first_absent(self) -> _Project | None:
        while self._absent:
            turn, _, project = self._absent[0]
            if project.waiting and not project.taken and turn == project.turn:
                return project
            heapq.heappop(self._absent)
            project.listed = False
            self._list(project)
        return None

    def _may_take(self, project: _Project) -> bool:
        seats = project.first.seats
        return (1 - self._share) * (project.taken + seats) <= self._share * (self.free - seats)
