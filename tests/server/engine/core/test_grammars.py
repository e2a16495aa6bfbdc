"""The engine core has what this server tried and sealed followed elsewhere, and no step waits for a slow mask."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import xgrammar
from transformers import AutoTokenizer
from vllm.v1 import structured_output

from flexgate.server.engine.core import followers as core_followers
from flexgate.server.engine.core import grammars
from flexgate.server.engine.core.followers import Follower, Followers
from flexgate.server.engine.core.grammars import MAX_PATIENCE, FollowedGrammar, wait_in_patience
from flexgate.server.engine.protocol.constraints import GrammarError, open_constraint, seal_constraint
from flexgate.server.engine.protocol.endings import CONSTRAINT_BUSY, CONSTRAINT_FAILED, CONSTRAINT_SLOW
from flexgate.server.engine.protocol.gates import new_seal_key
from flexgate.server.engine.protocol.masks import COMPILED, MASK, pack

KEY = new_seal_key()
LONGER = [b'":', b"abc", b"aab", b"true"]
VOCABULARY = 257 + len(LONGER)
END = VOCABULARY - 1
TOKENIZER = xgrammar.TokenizerInfo(
    [*(bytes([byte]) for byte in range(256)), *LONGER, b"<end>"], stop_token_ids=[VOCABULARY - 1]
)
SLOW = "(" + "|".join(["a?", *["a?b"] * 2500]) + "){1024}"
SECONDS = 60
"""A busy machine may take so long for what takes no time on another."""


@pytest.fixture(scope="module")
def followers() -> Iterator[Followers]:
    begun = Followers()
    begun.start(TOKENIZER.serialize_json(), VOCABULARY)
    yield begun
    begun.stop()


def follow(followers: Followers, regex: str, tenant: str = "t") -> FollowedGrammar:
    return FollowedGrammar(followers, f"{tenant}.{regex}", {"tenant": tenant, "kind": "regex", "text": regex}, [])


def until(followers: Followers, come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not come():
        followers.collect((), 0.0)
        assert time.monotonic() < deadline
        time.sleep(0.001)


def allowed(followers: Followers, grammar: FollowedGrammar) -> set[str]:
    """The tokens that may come next."""
    until(followers, lambda: grammar.ready)
    mask = xgrammar.allocate_token_bitmask(2, VOCABULARY)
    grammar.fill_bitmask(mask, 1)
    bits = torch.tensor([[mask[1][token // 32] >> (token % 32) & 1 for token in range(VOCABULARY)]])
    return {TOKENIZER.decoded_vocab[token].decode("latin-1") for token in bits[0].nonzero().flatten().tolist()}


def process_of(grammar: FollowedGrammar, followers: Followers) -> psutil.Process:
    """The youngest process, which a new grammar is followed in."""
    assert followers._forker is not None
    until(followers, lambda: grammar._follower.compiled)
    return max(psutil.Process(followers._forker.pid).children(), key=lambda child: (started(child), child.pid))


def started(process: psutil.Process) -> int:
    """When it began, in clock ticks: psutil's seconds lie around a time of boot that is rounded anew at each call."""
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])


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


def begun_process(followers: Followers, regex: str, tenant: str) -> tuple[FollowedGrammar, psutil.Process]:
    """A request whose constraint is still compiled, in a process that does not go on."""
    assert followers._forker is not None
    forker = psutil.Process(followers._forker.pid)
    before = set(forker.children())
    grammar = follow(followers, regex, tenant)
    until(followers, lambda: set(forker.children()) - before)
    (process,) = set(forker.children()) - before
    process.suspend()
    followers.collect((), 0.0)
    assert not grammar._follower.compiled
    return grammar, process


def free_descriptors(process: psutil.Process) -> list[int]:
    """Descriptors that it may open, the next one first."""
    return sorted(set(range(1000)) - {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")})


def test_only_what_this_server_sealed_is_followed() -> None:
    sealed = seal_constraint("proj_1", "regex", "a.b", KEY)
    tenant, kind, text = open_constraint(sealed, KEY)
    assert (kind, text) == ("regex", "a.b")
    assert "proj_1" not in sealed
    assert tenant != open_constraint(seal_constraint("proj_2", "regex", "a.b", KEY), KEY)[0]
    for other in ("root ::= [a]", None, sealed + "A", seal_constraint("proj_1", "regex", "a.b", new_seal_key())):
        with pytest.raises(GrammarError):
            open_constraint(other, KEY)


def test_vllm_has_a_sealed_constraint_followed_and_no_other(
    text_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_output, "XgrammarBackend", structured_output.XgrammarBackend)  # put back after
    begun = grammars.take_sealed_constraints(KEY)
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint)
    backend: Any = structured_output.XgrammarBackend
    core = backend(SimpleNamespace(), tokenizer=tokenizer, vocab_size=len(tokenizer))
    try:
        made = core.compile_grammar(None, seal_constraint("t", "regex", "[a-z]{0,1000}", KEY), {0})
        until(begun, lambda: made.ready)
        assert made.failure is None
        with pytest.raises(GrammarError):
            core.compile_grammar(None, "root ::= [a-z]", {0})
    finally:
        core.destroy()


def test_a_grammar_is_followed_to_its_end(followers: Followers) -> None:
    followed = follow(followers, "a(b|true)")
    assert allowed(followers, followed) == {"a"}
    followed.accept_tokens("r", [ord("a")])
    assert not followed.ready
    assert allowed(followers, followed) == {"b", "t", "true"}
    followed.accept_tokens("r", [256 + LONGER.index(b"true")])
    assert allowed(followers, followed) == {"<end>"}
    assert not followed.is_terminated()
    followed.accept_tokens("r", [END])
    until(followers, lambda: followed.ready)
    assert followed.is_terminated()


def test_what_may_not_come_next_ends_its_request_alone(followers: Followers) -> None:
    broken, beside = follow(followers, "ab"), follow(followers, "ab")
    until(followers, lambda: broken.ready)
    broken.accept_tokens("r", [ord("x")])
    until(followers, lambda: broken.ready)
    assert broken.failure == CONSTRAINT_FAILED
    assert allowed(followers, beside) == {"a"}
    assert beside.failure is None


def test_what_its_mask_does_not_allow_fails_before_it_is_accepted(followers: Followers) -> None:
    high = 256 + LONGER.index(b"true")
    for regex, token, failure in (("true", high, None), ("a", high, CONSTRAINT_FAILED), ("a", 0, CONSTRAINT_FAILED)):
        followed = follow(followers, regex)
        followed.check(0)  # without a mask there is nothing to look it up in
        assert followed.failure is None
        allowed(followers, followed)
        followed.check(token)
        assert followed.failure == failure


def test_a_slow_mask_ends_with_its_process_and_no_other_is_touched(followers: Followers) -> None:
    slow, beside = follow(followers, "x?" + SLOW), follow(followers, "ab", "other")
    until(followers, lambda: slow.ready)
    assert slow.failure == CONSTRAINT_SLOW
    mask = xgrammar.allocate_token_bitmask(1, VOCABULARY)
    slow.fill_bitmask(mask, 0)
    assert (mask == -1).all()
    assert allowed(followers, beside) == {"a"}


def test_a_killed_process_ends_its_requests_alone_and_the_next_request_begins_another(followers: Followers) -> None:
    first = follow(followers, "cd")
    assert allowed(followers, first) == {"c"}  # a request has one question at a time
    killed, beside = process_of(first, followers), follow(followers, "ab")
    killed.kill()
    first.accept_tokens("r", [ord("c")])
    until(followers, lambda: first.failure is not None)
    assert allowed(followers, beside) == {"a"}
    assert allowed(followers, follow(followers, "cd")) == {"c"}


def test_the_same_constraint_of_a_tenant_has_one_process_and_of_two_tenants_two(followers: Followers) -> None:
    one, again, other = (follow(followers, "ef", tenant) for tenant in ("a", "a", "b"))
    for grammar in (one, again, other):
        assert allowed(followers, grammar) == {"e"}
    assert one._follower is again._follower is not other._follower


def test_a_step_is_patient_for_milliseconds_and_with_what_is_always_late_for_none(followers: Followers) -> None:
    late = follow(followers, "gh")
    process = process_of(late, followers)
    until(followers, lambda: late.ready)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        late.accept_tokens("r", [ord("g")])
        began = time.thread_time()
        for _ in range(50):
            wait_in_patience(followers, [late])
        assert late.patience < 0.001
        assert not late.ready
        assert time.thread_time() - began < SECONDS * MAX_PATIENCE
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert allowed(followers, late) == {"h"}


def test_a_process_without_processor_time_is_given_up(followers: Followers, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = follow(followers, "ij")
    process = process_of(hung, followers)
    until(followers, lambda: hung.ready)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(core_followers, "HUNG_SECONDS", 0.0)
    hung.accept_tokens("r", [ord("i")])
    until(followers, lambda: hung.failure is not None)
    os.kill(process.pid, signal.SIGCONT)
    process.wait(SECONDS)


def test_a_request_that_is_gone_is_forgotten_and_unneeded_processes_are_few(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_followers, "MAX_KEPT", 2)
    first, *_ = [followed_and_gone(followers, f"k{number}") for number in range(6)]
    assert not first.alive
    assert sum(one.alive and not one.followed for one in followers._all.values()) <= 2


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
    assert allowed(followers, follow(followers, "no")) == {"n"}


def test_a_request_that_is_gone_before_its_turn_to_be_compiled_is_dropped_everywhere(followers: Followers) -> None:
    assert followers._forker is not None
    forker = psutil.Process(followers._forker.pid)
    first, compiling = begun_process(followers, ".{1,890}y.{1,900}", "leaver")
    try:
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


def test_a_job_that_no_process_or_descriptor_is_left_for_ends_alone(followers: Followers) -> None:
    assert followers._forker is not None
    forker = psutil.Process(followers._forker.pid)
    beside = follow(followers, "pq", "beside")
    assert allowed(followers, beside) == {"p"}
    first, compiling = begun_process(followers, ".{1,891}y.{1,900}", "flooder")
    limits = forker.rlimit(psutil.RLIMIT_NOFILE)
    try:
        forker.rlimit(psutil.RLIMIT_NOFILE, (free_descriptors(forker)[2], limits[1]))
        no_process = follow(followers, "rs", "other")  # it has a descriptor, and none for the pipe
        until(followers, lambda: no_process.failure is not None)
        flood = [follow(followers, f"h{number}", "flooder") for number in range(8)]
        until(followers, lambda: sum(grammar.failure is not None for grammar in flood) >= 6)
    finally:
        forker.rlimit(psutil.RLIMIT_NOFILE, limits)
        compiling.resume()
    assert allowed(followers, follow(followers, "rs", "other")) == {"r"}
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
    assert grammar.failures == [CONSTRAINT_SLOW]


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
