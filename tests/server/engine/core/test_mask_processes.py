"""The processes that follow constraints: few, limited, without secrets, and ended one by one."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from maskkit import (
    SECONDS,
    TOKENIZER,
    VOCABULARY,
    allowed,
    at_rest,
    begun_process,
    children_of,
    follow,
    forker_of,
    free_descriptors,
    process_of,
    until,
)

from flexgate.server.engine.core import followers as core_followers
from flexgate.server.engine.core.followers import Follower, Followers
from flexgate.server.engine.grammars.follow import MAX_OF_TENANT, MAX_PROCESSES, Child, Forker
from flexgate.server.engine.grammars.native import OUT_OF_MEMORY, beyond_limits
from flexgate.server.engine.protocol.endings import CONSTRAINT_BUSY, CONSTRAINT_UNAVAILABLE
from flexgate.server.engine.protocol.masks import COMPILED, MASK, pack


def followed_and_gone(followers: Followers, regex: str, tenant: str = "t") -> Follower:
    """The process of a request that is over."""

    def over() -> Follower:
        grammar = follow(followers, regex, tenant)
        until(followers, lambda: grammar.ready)
        return grammar._follower

    follower = over()
    gc.collect()
    assert not follower.followed
    return follower


def test_a_request_that_is_gone_is_forgotten_and_unneeded_processes_are_few(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_followers, "MAX_KEPT", 2)
    first, *_ = [followed_and_gone(followers, f"k{number}") for number in range(6)]
    assert not first.alive
    assert sum(one.alive and not one.followed for one in followers._all.values()) <= 2


def test_a_request_that_is_dropped_under_the_lock_waits_for_no_lock(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection of garbage may begin within `follow`, on the thread that holds the lock."""
    monkeypatch.setattr(core_followers, "MAX_KEPT", 1)
    running = [follow(followers, "ab", "t")]
    until(followers, lambda: running[0].ready)
    follower = running[0]._follower
    with followers._lock:
        running.clear()
        gc.collect()
        assert not follower.followed
        assert follower.alive
    followers.collect([], 0.0)
    assert not follower.alive


def test_processes_of_the_tenant_that_keeps_most_are_ended_first(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_followers, "MAX_KEPT", 3)
    small = followed_and_gone(followers, "ab", "small")
    large = [followed_and_gone(followers, f"j{number}", "large") for number in range(4)]
    assert small.alive
    assert not large[0].alive
    assert large[-1].alive


def test_one_tenant_waits_for_itself_to_compile_and_no_other_for_it(followers: Followers) -> None:
    flood = [follow(followers, f".{{1,{900 + number}}}x.{{1,900}}", "flooder") for number in range(8)]
    other = follow(followers, "lm", "other")
    until(followers, lambda: other.ready)
    assert allowed(followers, other) == {"l"}
    assert not all(grammar.ready for grammar in flood)


def test_the_forking_process_is_begun_again_when_it_was_killed(followers: Followers) -> None:
    before = follow(followers, "no")
    until(followers, lambda: before.ready)
    assert followers._forker is not None
    followers._forker.kill()
    followers._forker.wait()
    before.accept_tokens("r", [ord("n")])
    until(followers, lambda: before.failure is not None)
    assert before.failure == CONSTRAINT_UNAVAILABLE
    assert allowed(followers, follow(followers, "no")) == {"n"}


def test_a_request_that_is_gone_before_its_turn_to_be_compiled_is_dropped_everywhere(followers: Followers) -> None:
    forker = forker_of(followers)
    first, compiling = begun_process(followers, ".{1,890}y.{1,900}", "leaver")
    try:
        until(followers, lambda: at_rest(forker, compiling=1))
        before = forker.num_fds()
        leaving = [follow(followers, f"g{number}", "leaver") for number in range(20)]
        links = [grammar._follower for grammar in leaving]
        until(followers, lambda: forker.num_fds() == before + 20)
        del leaving
        gc.collect()
        assert not any(link.alive for link in links)
        until(followers, lambda: forker.num_fds() == before)
    finally:
        compiling.resume()
    until(followers, lambda: first.ready)


@pytest.mark.parametrize("left", [2, 3], ids=["none for the pipe", "none to watch the child"])
def test_a_job_that_no_process_or_descriptor_is_left_for_ends_alone(followers: Followers, left: int) -> None:
    forker = forker_of(followers)
    beside = follow(followers, f"pq{{{left}}}", "beside")
    assert allowed(followers, beside) == {"p"}
    first, compiling = begun_process(followers, f".{{1,{890 + left}}}y.{{1,900}}", "flooder")
    limits = forker.rlimit(psutil.RLIMIT_NOFILE)
    until(followers, lambda: at_rest(forker, compiling=1))
    try:
        forker.rlimit(psutil.RLIMIT_NOFILE, (free_descriptors(forker)[left], limits[1]))
        before = children_of(forker)
        no_process = follow(followers, f"rs{{{left}}}", "other")  # it has a descriptor
        until(followers, lambda: no_process.failure is not None)
        assert no_process.failure == CONSTRAINT_UNAVAILABLE
        assert children_of(forker) == before
        flood = [follow(followers, f"h{left}{number}", "flooder") for number in range(8)]
        until(followers, lambda: sum(grammar.failure is not None for grammar in flood) >= 8 - left)
    finally:
        forker.rlimit(psutil.RLIMIT_NOFILE, limits)
        compiling.resume()
    assert allowed(followers, follow(followers, f"rs{{{left}}}", "other")) == {"r"}
    beside.accept_tokens("r", [ord("p")])
    assert allowed(followers, beside) == {"q"}
    until(followers, lambda: first.ready)


def test_a_tenant_has_so_many_constraints_waiting_and_no_more(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_followers, "MAX_WAITING", 3)
    first, compiling = begun_process(followers, ".{1,892}y.{1,900}", "hoarder")
    try:
        waiting = [follow(followers, f"i{number}", "hoarder") for number in range(3)]
        assert [grammar.failure for grammar in waiting] == [None, None, CONSTRAINT_BUSY]
        assert allowed(followers, follow(followers, "tu", "other")) == {"t"}
    finally:
        compiling.resume()
    until(followers, lambda: first.ready and all(grammar.ready for grammar in waiting))


def test_a_process_that_reads_constraints_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLEXGATE_SEAL_KEY", "FLEXGATE_DATABASE_URL", "ANY_SECRET"):
        monkeypatch.setenv(name, "secret")
    begun = Followers()
    begun.start(TOKENIZER.serialize_json(), VOCABULARY)
    try:
        followed = follow(begun, "vw")
        assert allowed(begun, followed) == {"v"}
        for process in (process_of(followed, begun), psutil.Process(begun._forker.pid)):  # type: ignore[union-attr]
            assert "secret" not in process.environ().values()
            assert process.environ()["PATH"] == os.environ["PATH"]
    finally:
        begun.stop()


def test_a_process_that_reads_constraints_ends_first_where_memory_is_short(followers: Followers) -> None:
    followed = follow(followers, "xy")
    process = process_of(followed, followers)
    assert followers._forker is not None
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "1000\n"
    assert Path(f"/proc/{followers._forker.pid}/oom_score_adj").read_text() != "1000\n"


def test_a_tenant_has_so_many_processes_and_waits_for_itself(followers: Followers) -> None:
    mine = [follow(followers, f"o{number}", "crowd") for number in range(MAX_OF_TENANT + 2)]
    until(followers, lambda: sum(grammar.ready for grammar in mine) == MAX_OF_TENANT)
    assert allowed(followers, follow(followers, "oo", "other")) == {"o"}
    assert sum(grammar.ready for grammar in mine) == MAX_OF_TENANT
    del mine[0], mine[0]
    gc.collect()
    until(followers, lambda: all(grammar.ready for grammar in mine))
    assert [grammar.failure for grammar in mine] == [None] * MAX_OF_TENANT


def test_there_are_so_many_processes_in_all_and_unneeded_ones_make_room(followers: Followers) -> None:
    forker = forker_of(followers)
    kept = followed_and_gone(followers, "qr", "before")
    all_of_them = [follow(followers, f"m{number}", f"tenant {number % 5}") for number in range(MAX_PROCESSES + 3)]
    until(followers, lambda: sum(grammar.ready for grammar in all_of_them) == MAX_PROCESSES)
    assert not kept.alive
    assert len(forker.children()) == MAX_PROCESSES
    del all_of_them[:3]
    gc.collect()
    until(followers, lambda: all(grammar.ready for grammar in all_of_them))
    assert {grammar.failure for grammar in all_of_them} == {None}


def test_what_is_compiled_for_too_long_on_the_clock_is_ended() -> None:
    control, other_end = socket.socketpair()
    forker = Forker(control, None, None)
    pids = [os.posix_spawn("/bin/sleep", ["sleep", str(SECONDS)], os.environ) for _ in range(2)]
    with control, other_end:
        for number, (pid, left) in enumerate(zip(pids, (-1.0, SECONDS), strict=True)):
            child = forker._children[number] = Child(pid, "t", other_end)
            forker._compiling[number] = child, time.monotonic() + left
        forker._end_hung()
        assert os.waitpid(pids[0], 0) == (pids[0], signal.SIGKILL)
        assert os.waitpid(pids[1], os.WNOHANG) == (0, 0)
        os.kill(pids[1], signal.SIGTERM)
        os.waitpid(pids[1], 0)


@pytest.mark.parametrize(
    ("status", "limit"),
    [
        (signal.SIGPROF, "time"),
        (signal.SIGABRT, "memory"),
        (signal.SIGSEGV, "memory"),
        (OUT_OF_MEMORY << 8, "memory"),
        (signal.SIGKILL, None),
        (signal.SIGTERM, None),
        (0, None),
        (1 << 8, None),
    ],
)
def test_what_ended_a_process_was_its_limit_or_not(status: int, limit: str | None) -> None:
    assert beyond_limits(int(status)) == limit


def test_what_was_compiled_for_a_request_that_is_gone_is_kept_and_counted(followers: Followers) -> None:
    followed = follow(followers, "yz")
    process = followed._follower
    assert select.select([process.link], [], [], SECONDS)[0]
    assert not process.compiled
    del followed
    gc.collect()
    assert process.alive
    assert process.compiled


@pytest.mark.parametrize(
    "packet",
    [b"abc", b"", b"abcd", pack(COMPILED, 0), pack(MASK, 1, [-1] * 3), pack(MASK, 1, [-1] * 4096)],
    ids=["no integers", "nothing", "too short", "without a size", "short mask", "long mask"],
)
def test_a_process_that_sends_what_none_sends_ends_alone(packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    follower, grammar = Follower("t", ours, (VOCABULARY + 31) // 32), Told()
    with theirs:
        follower.open(grammar, [])
        theirs.send(packet)
        follower.receive()
    assert not follower.alive
    assert grammar.failures == [CONSTRAINT_UNAVAILABLE]


def test_a_process_that_sends_without_end_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_followers, "MAX_PACKETS", 4)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    follower = Follower("t", ours, 1)
    with ours, theirs:
        for number in range(6):
            theirs.send(pack(COMPILED, 0, [number]))
        follower.receive()
        assert follower.kib == 3
        follower.receive()
        assert follower.kib == 5


class Told:
    """A grammar that notes why it failed."""

    ready = False

    def __init__(self) -> None:
        self.failures: list[str] = []

    def masked(self, words: object) -> None: ...

    def ended(self) -> None: ...

    def failed(self, reason: str) -> None:
        self.failures.append(reason)
