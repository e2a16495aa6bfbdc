"""The engine core has what this server tried and sealed followed elsewhere, and no step waits for a slow mask."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar
from maskkit import END, LONGER, SECONDS, VOCABULARY, allowed, follow, process_of, until
from transformers import AutoTokenizer
from vllm.v1 import structured_output

from flexgate.server.engine.core import followers as core_followers
from flexgate.server.engine.core import grammars
from flexgate.server.engine.core.followers import Followers
from flexgate.server.engine.core.grammars import MAX_PATIENCE, PATIENCE_PER_STEP, Patience
from flexgate.server.engine.protocol.constraints import GrammarError, open_constraint, seal_constraint
from flexgate.server.engine.protocol.endings import CONSTRAINT_FAILED, CONSTRAINT_SLOW, CONSTRAINT_UNAVAILABLE
from flexgate.server.engine.protocol.gates import new_seal_key

KEY = new_seal_key()
SLOW = "(" + "|".join(["a?", *["a?b"] * 2500]) + "){1024}"


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
    assert first.failure == CONSTRAINT_UNAVAILABLE
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
        began, patience = time.thread_time(), Patience(followers)
        for _ in range(50):
            patience.wait([late])
        assert late.patience < 0.001
        assert not late.ready
        assert time.thread_time() - began < SECONDS * MAX_PATIENCE
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert allowed(followers, late) == {"h"}


def test_steps_wait_no_longer_for_many_new_requests_than_for_one() -> None:
    waits: list[float] = []

    def collect(_wanted: object, seconds: float) -> float:
        waits.append(seconds)
        return seconds

    patience = Patience(SimpleNamespace(collect=collect))  # type: ignore[arg-type]
    for _ in range(100):
        new: Any = SimpleNamespace(ready=False, patience=MAX_PATIENCE)
        patience.wait([new])
    assert MAX_PATIENCE < sum(waits) <= MAX_PATIENCE + 100 * PATIENCE_PER_STEP


def test_a_machine_that_stood_still_for_a_second_costs_later_steps_no_patience() -> None:
    patience = Patience(SimpleNamespace(collect=lambda _wanted, seconds: 1.0 if seconds else 0.0))  # type: ignore[arg-type]
    late: Any = SimpleNamespace(ready=False, patience=MAX_PATIENCE)
    patience.wait([late])
    assert (patience.left, late.patience) == (0.0, 0.0)


def test_a_process_without_processor_time_is_given_up(followers: Followers, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = follow(followers, "ij")
    process = process_of(hung, followers)
    until(followers, lambda: hung.ready)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(core_followers, "HUNG_SECONDS", 0.0)
    hung.accept_tokens("r", [ord("i")])
    until(followers, lambda: hung.failure is not None)
    assert hung.failure == CONSTRAINT_UNAVAILABLE
    process.wait(SECONDS)
