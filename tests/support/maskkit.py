"""Constraints that are followed in processes of their own, over a tokenizer of bytes and a few longer tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import xgrammar

from flexgate.server.engine.core.followers import Followers
from flexgate.server.engine.core.grammars import FollowedGrammar

LONGER = [b'":', b"abc", b"aab", b"true"]
VOCABULARY = 257 + len(LONGER)
END = VOCABULARY - 1
TOKENIZER = xgrammar.TokenizerInfo(
    [*(bytes([byte]) for byte in range(256)), *LONGER, b"<end>"], stop_token_ids=[VOCABULARY - 1]
)
SECONDS = 60
"""A busy machine may take so long for what takes no time on another."""


def follow(followers: Followers, regex: str, tenant: str = "t") -> FollowedGrammar:
    """A request of a tenant that a pattern constrains."""
    return FollowedGrammar(followers, f"{tenant}.{regex}", {"tenant": tenant, "kind": "regex", "text": regex}, [])


def until(followers: Followers, come: Callable[[], bool]) -> None:
    """Take what the processes send until something has come."""
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


def forker_of(followers: Followers) -> psutil.Process:
    """The process that forks the others, which the first request begins."""
    if followers._forker is None:
        allowed(followers, follow(followers, "first"))
    assert followers._forker is not None
    return psutil.Process(followers._forker.pid)


def children_of(process: psutil.Process) -> set[int]:
    """Its children, without a walk over all processes, which takes so long that the youngest have gone on."""
    return {int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}


def process_of(grammar: FollowedGrammar, followers: Followers) -> psutil.Process:
    """The youngest process, which a new grammar is followed in."""
    assert followers._forker is not None
    until(followers, lambda: grammar._follower.compiled)
    return max(psutil.Process(followers._forker.pid).children(), key=lambda child: (started(child), child.pid))


def started(process: psutil.Process) -> int:
    """When it began, in clock ticks: psutil's seconds lie around a time of boot that is rounded anew at each call."""
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])


def begun_process(followers: Followers, regex: str, tenant: str) -> tuple[FollowedGrammar, psutil.Process]:
    """A request whose constraint is still compiled, in a process that does not go on."""
    forker = forker_of(followers)
    before = children_of(forker)
    grammar = follow(followers, regex, tenant)
    deadline = time.monotonic() + SECONDS
    while not (begun := children_of(forker) - before):
        assert time.monotonic() < deadline
    process = psutil.Process(*begun)
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
    followers.collect((), 0.0)
    if grammar._follower.compiled:  # before it was stopped, on a busy machine
        process.kill()
        until(followers, lambda: grammar.failure is not None)
        return begun_process(followers, regex, tenant)
    return grammar, process


def free_descriptors(process: psutil.Process) -> list[int]:
    """Descriptors that it may open, the next one first."""
    return sorted(set(range(1000)) - {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")})


def at_rest(forker: psutil.Process, *, compiling: int) -> bool:
    """Whether it has descriptors for its children alone, and none of those that have just ended or compiled."""
    folder = f"/proc/{forker.pid}/fd"
    kinds = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder) if int(name) > 2]
    children = len(children_of(forker))
    counted = [sum(kind in link for link in kinds) for kind in ("pidfd", "pipe:", "socket:")]
    return counted == [children, compiling, children + 1]
