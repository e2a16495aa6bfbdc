"""The engine core compiles what this server tried and sealed, and no step waits for a slow mask."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from transformers import AutoTokenizer
from vllm.v1 import structured_output

from flexgate.server.engine.core import grammars
from flexgate.server.engine.core.grammars import WatchedGrammar
from flexgate.server.engine.core.step_thread import MAX_LEFT, MAX_SECONDS, StepThread, TooLate
from flexgate.server.engine.protocol.constraints import GrammarError, open_constraint, seal_constraint
from flexgate.server.engine.protocol.gates import new_seal_key

KEY = new_seal_key()
LONGER = [b'":', b"abc", b"aab", b"true"]
VOCABULARY = 257 + len(LONGER)
TOKENIZER = xgrammar.TokenizerInfo(
    [*(bytes([byte]) for byte in range(256)), *LONGER, b"<end>"], stop_token_ids=[VOCABULARY - 1]
)


def grammar(regex: str) -> WatchedGrammar:
    compiled = xgrammar.GrammarCompiler(TOKENIZER, max_threads=1).compile_regex(regex)
    return WatchedGrammar(vocab_size=VOCABULARY, matcher=xgrammar.GrammarMatcher(compiled), ctx=compiled)


def mask_of(grammar: WatchedGrammar) -> torch.Tensor:
    mask = xgrammar.allocate_token_bitmask(2, VOCABULARY)
    grammar.fill_bitmask(mask, 1)
    return mask[1]


def test_only_what_this_server_sealed_is_compiled() -> None:
    sealed = seal_constraint("regex", "a.b", KEY)
    assert open_constraint(sealed, KEY) == ("regex", "a.b")
    for other in ("root ::= [a]", None, sealed + "A", seal_constraint("regex", "a.b", new_seal_key())):
        with pytest.raises(GrammarError):
            open_constraint(other, KEY)


def test_a_sealed_constraint_is_compiled_as_it_was_tried_and_kept(
    text_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own compiler shares work between rules, and fails at a count within an object."""
    monkeypatch.setattr(structured_output, "XgrammarBackend", structured_output.XgrammarBackend)  # put back after
    grammars.take_sealed_constraints(KEY)
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint)
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type="flex_olmo"))
    options = SimpleNamespace(disable_any_whitespace=True)
    config: Any = SimpleNamespace(structured_outputs_config=options, model_config=model, speculative_config=None)
    core: Any = structured_output.XgrammarBackend(config, tokenizer=tokenizer, vocab_size=len(tokenizer))
    text = {"type": "string", "pattern": "^[a-z]{0,1000}$"}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"], "additionalProperties": False}
    sealed = seal_constraint("json", json.dumps(schema), KEY)
    made = core.compile_grammar(None, sealed, {0})
    assert isinstance(made, WatchedGrammar)
    assert made.matcher.accept_string('{"a":"xyz"}')
    assert core.compile_grammar(None, sealed, {0}).ctx is made.ctx
    with pytest.raises(GrammarError):
        core.compile_grammar(None, json.dumps(schema), {0})


def test_kept_grammars_are_bounded_and_the_least_used_goes_first() -> None:
    made = grammars.MadeGrammars(20)
    for name in "aba":
        made.get(name, lambda: SimpleNamespace(memory_size_bytes=10))
    made.get("c", lambda: SimpleNamespace(memory_size_bytes=10))
    assert list(made._made) == ["a", "c"]


def test_a_grammar_is_followed() -> None:
    followed = grammar("ab")
    assert mask_of(followed)[3].item() == 1 << (ord("a") - 96)
    assert followed.accept_tokens("r", [ord("a")])
    assert mask_of(followed)[3].item() == 1 << (ord("b") - 96)
    assert not followed.accept_tokens("r", [ord("x")])
    assert not followed.slow


def test_no_step_waits_for_a_slow_mask() -> None:
    slow = grammar("(" + "|".join(["a?", *["a?b"] * 400]) + "){256}")
    grammars._thread().run(int)
    (beside,) = [thread for thread in threading.enumerate() if thread.name == "flexgate-masks"][-1:]
    began = time.thread_time()
    mask = mask_of(slow)
    assert slow.slow
    assert (mask == -1).all()
    assert slow.accept_tokens("r", [1])  # the matcher is in use: it is not asked
    assert time.thread_time() - began < 0.1
    beside.join(timeout=60)  # a process that ends while a thread is in native code aborts
    assert not beside.is_alive()


def test_what_is_late_is_left_behind_and_the_next_is_in_time() -> None:
    thread, free = StepThread(), threading.Event()

    def busy() -> None:
        while not free.is_set():
            pass

    with pytest.raises(TooLate):
        thread.run(busy)
    assert thread.run(lambda: 3) == 3
    free.set()


def test_while_threads_that_were_left_behind_are_busy_no_more_is_begun() -> None:
    thread, free = StepThread(), threading.Event()

    def busy() -> None:
        while not free.is_set():
            pass

    for _ in range(MAX_LEFT):
        with pytest.raises(TooLate):
            thread.run(busy)
    begun: list[int] = []
    with pytest.raises(TooLate):
        thread.run(lambda: begun.append(1))
    assert not begun
    free.set()
    for left in thread._left:
        left.join()
    assert thread.run(lambda: 3) == 3


def test_waiting_for_a_processor_makes_nothing_late() -> None:
    assert StepThread().run(lambda: time.sleep(3 * MAX_SECONDS) or 4) == 4


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        StepThread().run(lambda: 1 // 0)
