"""A fault around the processes that follow constraints is blamed on its cause, and holds up nothing."""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from maskkit import SECONDS, TOKENIZER, VOCABULARY, allowed, begun_process, children_of, follow, forker_of, until

from flexgate.server.engine.core import followers as core_followers
from flexgate.server.engine.core.followers import Follower, Followers
from flexgate.server.engine.grammars.follow import Child, Forker
from flexgate.server.engine.protocol.endings import CONSTRAINT_SLOW, CONSTRAINT_UNAVAILABLE
from flexgate.server.engine.protocol.masks import BEYOND_LIMITS, COMPILED, MASK, OPEN, pack, unpack

MORE_THAN_A_SOCKET_HOLDS = 600


class Told:
    """A grammar that notes why it failed."""

    ready = False

    def __init__(self) -> None:
        self.failures: list[str] = []

    def masked(self, words: object) -> None: ...

    def ended(self) -> None: ...

    def failed(self, reason: str) -> None:
        self.failures.append(reason)


def linked() -> tuple[Follower, socket.socket]:
    """A process as the engine core sees it, and its end of the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return Follower("t", ours, (VOCABULARY + 31) // 32), theirs


def ended_by(signal_: signal.Signals) -> int:
    """The id of a child that has ended so, and was not waited for."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"kill -{signal_.value} $$"], os.environ)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_a_process_whose_requests_are_gone_while_it_compiles_is_killed_and_gives_its_place_back(
    followers: Followers,
) -> None:
    forker = forker_of(followers)
    before = children_of(forker)
    grammar, process = begun_process(followers, ".{1,893}y.{1,900}", "leaver")
    waiting = follow(followers, "ab", "leaver")  # which one constraint of the same tenant holds up
    del grammar
    gc.collect()
    until(followers, lambda: process.pid not in children_of(forker))
    assert allowed(followers, waiting) == {"a"}
    assert len(children_of(forker) - before) == 1


def test_more_requests_than_a_socket_holds_wait_for_one_constraint_and_some_leave(followers: Followers) -> None:
    first, compiling = begun_process(followers, ".{1,894}y.{1,900}", "crowd")
    try:
        regex = ".{1,894}y.{1,900}"
        crowd = [follow(followers, regex, "crowd") for _ in range(MORE_THAN_A_SOCKET_HOLDS)]
        del crowd[::2]
        gc.collect()
        assert len(first._follower._unsent) == len(crowd) + 1
        assert [grammar.failure for grammar in crowd] == [None] * len(crowd)
    finally:
        compiling.resume()
    until(followers, lambda: all(grammar.ready for grammar in crowd))
    assert {grammar.failure for grammar in (first, *crowd)} == {None}


def test_what_a_socket_has_no_room_for_is_sent_later_in_its_order() -> None:
    follower, theirs = linked()
    told = [Told() for _ in range(MORE_THAN_A_SOCKET_HOLDS)]
    follower.compiled = True
    with follower.link, theirs:
        numbers = [follower.open(one, [7]) for one in told]
        follower.send()
        assert follower.alive
        assert follower._unsent
        follower.close(numbers[-1])
        read = []
        while len(read) < len(numbers):
            read.append(unpack(theirs.recv(100))[:2])
            follower.send()
    assert [number for _, number in read] == numbers
    assert {what for what, _ in read[:-1]} == {OPEN}


def test_that_a_process_ended_at_a_limit_is_told_though_its_socket_is_full_of_masks() -> None:
    control, other_end = socket.socketpair()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask, masks = pack(MASK, 1, [-1]), 0  # small, so that nothing else has room beside the last one
    theirs.setblocking(False)
    with suppress(BlockingIOError):
        while theirs.send(mask):
            masks += 1
    forker = Forker(control, None, None)
    pid = ended_by(signal.SIGPROF)
    ended = os.pidfd_open(pid)
    forker._children[ended] = Child(pid, "t", theirs)
    forker._poll.register(ended, select.POLLIN)
    forker._bury(ended)  # before anything is read
    running = threading.Thread(target=forker.run)
    running.start()
    with control, ours:
        packets = [ours.recv(1 << 16) for _ in range(masks + 2)]
        other_end.close()
        running.join(SECONDS)
    assert packets == [mask] * masks + [pack(BEYOND_LIMITS, 0), b""]
    assert not forker._untold


def test_that_a_process_ended_at_a_limit_is_read_though_it_left_questions_unread() -> None:
    follower, theirs = linked()
    grammar = Told()
    follower.open(grammar, [])
    with theirs:
        theirs.send(pack(COMPILED, 0, [1]))
        follower.receive()
        follower.send()
        theirs.send(pack(BEYOND_LIMITS, 0))
    follower.receive()
    assert grammar.failures[0] == CONSTRAINT_SLOW


def test_a_process_that_answers_others_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_followers, "HUNG_SECONDS", 1)
    now = 100.0
    monkeypatch.setattr(core_followers.time, "monotonic", lambda: now)
    follower, theirs = linked()
    first, second = Told(), Told()
    with theirs:
        theirs.send(pack(COMPILED, 0, [1]))
        follower.receive()
        follower.open(first, [])
        number = follower.open(second, [])
        now = 102.0
        theirs.send(pack(MASK, number, [-1] * ((VOCABULARY + 31) // 32)))
        follower.receive()
        follower.end_if_hung()
        assert follower.alive
        now = 104.0
        follower.end_if_hung()
    assert (follower.alive, first.failures) == (False, [CONSTRAINT_UNAVAILABLE])


def test_a_constraint_that_has_no_turn_for_too_long_is_given_up(followers: Followers) -> None:
    grammar, process = begun_process(followers, ".{1,895}y.{1,900}", "late")
    follower = grammar._follower
    follower._asked = dict.fromkeys(follower._asked, -core_followers.UNCOMPILED_SECONDS * 1.0 - 1)
    until(followers, lambda: grammar.failure is not None)
    assert grammar.failure == CONSTRAINT_UNAVAILABLE
    until(followers, lambda: process.pid not in children_of(forker_of(followers)))


def test_no_descriptor_for_a_constraint_is_the_servers_fault_and_passes(followers: Followers) -> None:
    forker_of(followers)
    least = min(set(range(1000)) - {int(name) for name in os.listdir("/proc/self/fd")})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (least, limits[1]))
    try:
        without = follow(followers, "st")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert without.failure == CONSTRAINT_UNAVAILABLE
    assert allowed(followers, follow(followers, "st")) == {"s"}


def test_the_first_constraint_of_an_engine_core_without_descriptors_fails_alone() -> None:
    begun = Followers()
    begun.start(TOKENIZER.serialize_json(), VOCABULARY)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        without = follow(begun, "tu")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    try:
        assert without.failure == CONSTRAINT_UNAVAILABLE
        assert allowed(begun, follow(begun, "tu")) == {"t"}
    finally:
        begun.stop()


def test_a_forking_process_that_stands_still_is_ended_and_begun_again(followers: Followers) -> None:
    stopped = forker_of(followers)
    stopped.suspend()
    first = follow(followers, "uv")
    followers._taken_at -= core_followers.HUNG_SECONDS + 1
    assert allowed(followers, follow(followers, "vw")) == {"v"}
    until(followers, lambda: first.failure is not None)
    assert first.failure == CONSTRAINT_UNAVAILABLE
    assert forker_of(followers).pid != stopped.pid
    assert not Path(f"/proc/{stopped.pid}").exists()


def test_a_forking_process_that_takes_jobs_is_kept(followers: Followers) -> None:
    forker = forker_of(followers)
    for number in range(3):
        assert allowed(followers, follow(followers, f"wx{number}")) == {"w"}
        followers._taken_at -= core_followers.HUNG_SECONDS + 1
    assert forker_of(followers).pid == forker.pid
