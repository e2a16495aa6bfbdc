"""Turns and seats of the queue before the engine, against a model that looks at every project each time."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flexgate.server.http.errors import ApiError
from flexgate.server.inference.fair_queue import FairQueue, Ticket


def make(
    seats: int = 64, share: float = 0.5, most_queued: int = 1024, seconds: float = 300.0, **more: Any
) -> FairQueue:
    return FairQueue(seats, share=share, most_queued=most_queued, seconds=seconds, **more)


def enter(queue: FairQueue, project: str, count: int = 1, *, choices: int = 1, tokens: int = 100) -> list[Ticket]:
    return [queue.enter(project, choices, tokens) for _ in range(count)]


def running(tickets: list[Ticket]) -> int:
    return sum(not ticket.waiting for ticket in tickets)


class Prompt:
    """What the model knows of a ticket."""

    def __init__(self, ticket: Ticket, project: str, seats: int, tokens: int) -> None:
        self.ticket, self.project, self.seats, self.tokens = ticket, project, seats, tokens
        self.left = seats


class Model(RuleBasedStateMachine):
    """Every turn that the queue gives is checked against the rules of the module's head, and so is every one it does
    not give.
    """

    @initialize(seats=st.integers(1, 12), share=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    def begin(self, seats: int, share: float) -> None:
        self.seats, self.share = seats, share
        self.queue = make(seats, share, most_queued=10_000)
        self.waiting: list[Prompt] = []
        self.taken: list[Prompt] = []
        self.turns: dict[str, float] = {}
        self.last = 0.0  # the turn of the last project when nothing ran any more
        self.given: list[Ticket] = []
        self.take, given = Ticket.take, self.given

        def take(ticket: Ticket, now: float) -> None:
            given.append(ticket)
            self.take(ticket, now)

        Ticket.take = take  # type: ignore[method-assign]

    def teardown(self) -> None:
        """Nothing waits for ever: whatever runs ends one after the other, and all have had their turn."""
        if not hasattr(self, "queue"):
            return
        try:
            while self.waiting:
                assert self.taken, "prompts wait and nothing runs"
                self.close(self.taken[0])
                self.check()
            while self.taken:
                self.close(self.taken[0])
            assert (self.queue.free, self.queue.queued, self.queue.projects) == (self.seats, 0, 0)
        finally:
            Ticket.take = self.take  # type: ignore[method-assign]

    @rule(project=st.sampled_from("abcd"), choices=st.integers(1, 4), tokens=st.integers(1, 50))
    def enter(self, project: str, choices: int, tokens: int) -> None:
        if not any(prompt.project == project for prompt in self.waiting):
            waiting = [self.turns[prompt.project] for prompt in self.waiting]
            running = [self.turns[prompt.project] for prompt in self.taken if prompt.project != project]
            self.turns[project] = max(self.turns.get(project, 0.0), min(waiting or running, default=self.last))
        seats = min(choices, self.seats)
        self.waiting.append(Prompt(self.queue.enter(project, choices, tokens), project, seats, tokens))

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), tokens=st.integers(0, 50))
    def generate(self, data: st.DataObject, tokens: int) -> None:
        prompt = data.draw(st.sampled_from(self.taken))
        self.turns[prompt.project] += tokens
        prompt.ticket.use(tokens)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def a_choice_is_generated(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(self.taken))
        prompt.left -= 1
        if not prompt.left:
            self.gone(prompt)
        prompt.ticket.release()

    @precondition(lambda self: self.taken or self.waiting)
    @rule(data=st.data(), twice=st.booleans())
    def end(self, data: st.DataObject, twice: bool) -> None:
        prompt = data.draw(st.sampled_from(self.taken + self.waiting))
        self.close(prompt)
        if twice:
            prompt.ticket.close()
            prompt.ticket.release()

    def close(self, prompt: Prompt) -> None:
        if prompt in self.waiting:
            self.waiting.remove(prompt)
        else:
            self.gone(prompt)
        prompt.ticket.close()

    def gone(self, prompt: Prompt) -> None:
        self.taken.remove(prompt)
        if not self.taken:
            self.last = max(self.last, self.turns[prompt.project])

    def seats_of(self, project: str) -> int:
        return sum(prompt.left for prompt in self.taken if prompt.project == project)

    @property
    def free(self) -> int:
        return self.seats - sum(prompt.left for prompt in self.taken)

    def next(self) -> list[Prompt]:
        """Whose turn it is: one of these, which are equal, or nobody's."""
        firsts: dict[str, Prompt] = {}
        for prompt in self.waiting:
            firsts.setdefault(prompt.project, prompt)
        absent = [prompt for prompt in firsts.values() if not self.seats_of(prompt.project)]
        if absent:
            earliest = min(self.turns[prompt.project] for prompt in absent)
            return [prompt for prompt in absent if self.turns[prompt.project] == earliest]
        fitting = [
            prompt
            for prompt in firsts.values()
            if (1 - self.share) * (self.seats_of(prompt.project) + prompt.seats)
            <= self.share * (self.free - prompt.seats)
        ]
        earliest = min((self.turns[prompt.project] for prompt in fitting), default=0.0)
        return [prompt for prompt in fitting if self.turns[prompt.project] == earliest]

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "queue"):
            return
        for ticket in self.given:
            (prompt,) = [prompt for prompt in self.next() if prompt.ticket is ticket]
            assert prompt.seats <= self.free
            self.waiting.remove(prompt)
            self.turns[prompt.project] += prompt.tokens
            self.taken.append(prompt)
        self.given.clear()
        due = self.next()
        assert not due or any(prompt.seats > self.free for prompt in due), "a prompt waits that may have a free seat"
        assert self.queue.free == self.free >= 0
        assert self.queue.queued == len(self.waiting)
        assert self.queue.projects == len({prompt.project for prompt in self.waiting})
        for project in self.turns:
            mine = [prompt for prompt in self.taken if prompt.project == project]
            assert self.seats_of(project) <= max(self.queue.alone, *(prompt.seats for prompt in mine), 0)


def test_every_turn_that_is_given_or_not_given_follows_the_rules() -> None:
    generated = settings(max_examples=100, stateful_step_count=60, phases=[Phase.generate])
    run_state_machine_as_test(Model, settings=generated)  # unshrunk: making a failure small takes minutes


def test_one_project_alone_takes_its_share_and_leaves_the_rest() -> None:
    queue = make(64)
    assert running(enter(queue, "a", 64)) == 32 == queue.alone
    assert running(enter(queue, "b", 64)) == 16
    assert running(enter(queue, "c", 64)) == 8
    assert not enter(queue, "d")[0].waiting


def test_with_no_share_kept_one_project_takes_everything() -> None:
    assert running(enter(make(64, share=1.0), "a", 100)) == 64


def test_a_single_seat_goes_round() -> None:
    queue = make(1)
    first, *others = enter(queue, "a", 3)
    (other,) = enter(queue, "b")
    first.close()
    assert not other.waiting
    assert running(others) == 0


def test_projects_get_the_same_tokens_however_large_their_prompts_are() -> None:
    queue = make(1)
    used = {"large": 0, "small": 0}
    sizes = {"large": 1000, "small": 50}
    tickets = {name: enter(queue, name, 600, tokens=size // 2) for name, size in sizes.items()}
    for _ in range(600):
        done = next(ticket for each in tickets.values() for ticket in each if not ticket.waiting)
        name = done.project.id
        tickets[name].remove(done)
        done.use(sizes[name] // 2)
        used[name] += sizes[name]
        done.close()
    assert min(used.values()) > 10_000
    assert abs(used["large"] - used["small"]) <= 2 * 1000


def test_having_been_idle_earns_nothing() -> None:
    queue = make(1)
    for _ in range(50):
        enter(queue, "busy")[0].close()
    (now,) = enter(queue, "late", tokens=1)
    late, busy = enter(queue, "late", 9, tokens=50), enter(queue, "busy", 9, tokens=50)
    order = []
    for _ in range(6):
        now.close()
        now = next(ticket for ticket in late + busy if not ticket.waiting and ticket._queue is not None)
        order.append(now.project.id)
    assert sorted(order) == ["busy"] * 3 + ["late"] * 3


def test_weight_divides_what_a_project_has_used() -> None:
    queue = make(1, share=1.0)
    first = queue.enter("paid", 1, 100, weight=4.0)
    assert first.project.turn == 25
    first.use(8)
    assert first.project.turn == 27


def test_a_large_prompt_is_not_overtaken_for_ever() -> None:
    queue = make(8)
    small = [ticket for name in "abcd" for ticket in enter(queue, name, 20, tokens=1)]
    (large,) = enter(queue, "e", choices=4)
    ended = 0
    while large.waiting:
        next(ticket for ticket in small if not ticket.waiting and ticket._queue is not None).close()
        ended += 1
    assert ended <= 4


def test_only_so_many_prompts_of_a_project_wait_and_the_refusal_says_when_to_come_back() -> None:
    now = [0.0]
    queue = make(2, most_queued=3, clock=lambda: now[0])
    first, second, *_ = enter(queue, "a", 4)
    now[0] = 6.2
    first.close()
    assert not second.waiting
    enter(queue, "a")
    with pytest.raises(ApiError, match=r"limit of 3 prompts waiting for the engine. Try again in 7s") as refused:
        enter(queue, "a")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.headers == {"retry-after": "7"}
    assert not enter(queue, "b")[0].waiting


def test_the_server_has_a_bound_of_its_own() -> None:
    queue = make(1, most_queued=1)
    for project in "abcdefghi":
        enter(queue, project)
    with pytest.raises(ApiError) as refused:
        enter(queue, "j")
    assert (refused.value.status, refused.value.code) == (503, "queue_full")
    assert refused.value.headers == {"retry-after": "1"}


def test_prompts_that_leave_the_queue_leave_nothing_behind() -> None:
    queue = make(2)
    enter(queue, "a")
    for _ in range(1000):
        for project in "ab":
            for ticket in enter(queue, project, 2):
                ticket.close()
    assert (queue.queued, queue.projects, queue.free) == (0, 0, 1)
    assert len(queue._absent) + len(queue._present) <= 2
    assert all(not project.waiting for project in queue._projects.values())


@pytest.mark.asyncio
async def test_a_turn_that_does_not_come_in_time_is_said_and_a_cancelled_wait_takes_nothing() -> None:
    queue = make(1, seconds=0.01)
    running, late = enter(queue, "a", 2)
    assert await running.wait(9.0)
    with closing(late):
        assert not await late.wait(9.0)
    (cancelled,) = enter(queue, "a")

    async def wait() -> None:
        with closing(cancelled):
            await cancelled.wait(9.0)

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    running.close()
    assert (queue.free, queue.queued) == (1, 0)


@pytest.mark.asyncio
async def test_a_wait_that_is_cancelled_just_as_its_turn_comes_gives_the_seat_back() -> None:
    queue = make(1)
    running, next_ = enter(queue, "a", 2)

    async def wait() -> None:
        with closing(next_):
            await next_.wait(9.0)

    waiting = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    running.close()
    assert not next_.waiting
    waiting.cancel()
    await asyncio.wait({waiting})
    assert queue.free == 1
