"""Denied requests reach the audit log: all of them, in few entries, however the store fares."""

from __future__ import annotations

from typing import Any

import pytest

from flexgate.policies.audit import Event
from flexgate.policies.errors import StoreUnavailable
from flexgate.policies.store import Store
from flexgate.server.policy.denial_log import (
    ANONYMOUS,
    BURST,
    BURST_OF_ONE,
    ENTRY_EVERY_S,
    ENTRY_OF_ONE_EVERY_S,
    MANY,
    MAX_KINDS,
    MAX_KINDS_OF_ONE,
    MAX_REQUEST_IDS,
    Denial,
    Denials,
)


class Sink:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.broken = False

    def record(self, events: list[Event]) -> None:
        if self.broken:
            raise StoreUnavailable("disk full")
        self.events += events

    def requests(self) -> int:
        return sum(event.detail["requests"] for event in self.events)


def denial(number: int = 0) -> Denial:
    return Denial(f"key_{number}", "t", "/v1/completions", 403, "expert_policy_denied")


def test_equal_denials_are_one_entry_with_a_count() -> None:
    sink, times = Sink(), iter(range(100))
    denials = Denials(sink, clock=lambda: float(next(times)))
    for number in range(20):
        denials.add(denial(), f"req_{number}")
    denials.flush()
    denials.flush()
    (event,) = sink.events
    assert (event.action, event.actor, event.at) == ("request.denied", "key_0", 0.0)
    assert event.detail["requests"] == 20
    assert event.detail["last"] == 19.0
    assert event.detail["request_ids"] == [f"req_{n}" for n in range(MAX_REQUEST_IDS)]


def test_a_flood_of_kinds_is_bounded_and_counted() -> None:
    sink = Sink()
    denials = Denials(sink)
    for number in range(3 * MAX_KINDS):
        denials.add(denial(number), "req")
    assert denials.waiting() == 3 * MAX_KINDS
    denials.flush()
    assert len(sink.events) == MAX_KINDS + 1
    assert sink.requests() == 3 * MAX_KINDS
    assert sink.events[-1].actor == MANY


def test_one_actor_cannot_fill_the_log_by_varying_what_it_asks_for() -> None:
    sink = Sink()
    denials = Denials(sink)
    for number in range(500):
        rules = ((f"expert-{number}", "no_agreement", "default"),)
        denials.add(denial()._replace(rules=rules), "req")
    denials.flush()
    assert len(sink.events) == MAX_KINDS_OF_ONE + 1
    assert sink.requests() == 500
    assert sink.events[-1].detail["rules"] == []


DAY = 86_400


class Day:
    """Denials under a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sink = Sink()
        self.denials = Denials(self.sink, clock=lambda: self.now, steady=lambda: self.now)
        self.denied = 0

    def flood(self, denied: list[Denial], *, seconds: int, every_s: int) -> None:
        """Each of them again and again, and an attempt to write after each round."""
        for _ in range(0, seconds, every_s):
            for one in denied:
                self.denials.add(one, "req")
            self.denied += len(denied)
            self.denials.flush()
            self.now += every_s


def anonymous(kinds: int) -> list[Denial]:
    """What is denied to whoever has no key."""
    return [Denial(ANONYMOUS, None, f"/v1/{number}", 401, "invalid_api_key") for number in range(kinds)]


def test_a_day_without_a_key_is_few_entries_in_which_every_request_is_counted() -> None:
    day = Day()
    day.flood(anonymous(17), seconds=DAY, every_s=10)
    assert len(day.sink.events) <= BURST_OF_ONE + DAY / ENTRY_OF_ONE_EVERY_S == 1504
    assert day.sink.requests() + day.denials.waiting() == day.denied == 17 * DAY / 10
    assert {event.detail["route"] for event in day.sink.events} == {one.route for one in anonymous(17)}
    day.denials.close()
    assert day.sink.requests() == day.denied


def test_a_flood_delays_no_entry_of_another_key() -> None:
    day = Day()
    day.flood(anonymous(17), seconds=3600, every_s=1)
    day.denials.add(denial(), "req_1")
    day.denials.flush()
    assert day.sink.events[-1].actor == "key_0"


def test_many_keys_together_have_a_bounded_number_of_entries_in_a_day() -> None:
    day = Day()
    day.flood([denial(number) for number in range(500)], seconds=DAY, every_s=600)
    assert len(day.sink.events) <= BURST + DAY / ENTRY_EVERY_S == 23_648
    assert day.sink.requests() + day.denials.waiting() == day.denied


def test_an_actor_that_was_quiet_is_written_at_once_again() -> None:
    day = Day()
    day.flood(anonymous(17), seconds=600, every_s=1)
    day.now += BURST_OF_ONE * ENTRY_OF_ONE_EVERY_S
    written = len(day.sink.events)
    day.flood(anonymous(17), seconds=1, every_s=1)
    assert len(day.sink.events) == written + 17


def test_what_cannot_be_written_is_kept_and_written_later() -> None:
    sink = Sink()
    denials = Denials(sink)
    sink.broken = True
    denials.add(denial(), "req_1")
    with pytest.raises(StoreUnavailable):
        denials.flush()
    denials.add(denial(), "req_2")
    sink.broken = False
    denials.flush()
    assert sink.requests() == 2
    assert sink.events[0].detail["request_ids"] == ["req_1", "req_2"]


def test_what_is_lost_at_the_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    denials = Denials(sink)
    sink.broken = True
    denials.add(denial(), "req_1")
    denials.close()
    assert "1 audit entries of denied requests were lost" in caplog.text


def test_entries_are_part_of_the_hash_chain(real_store: Store) -> None:
    denials: Any = Denials(real_store)
    denials.add(denial(), "req_1")
    before = real_store.audit_heads()
    denials.flush()
    found = real_store.verify_audit(outside=before)
    assert found.requests.sequence == before[0].sequence + 1
    assert found.changes == before[0]
