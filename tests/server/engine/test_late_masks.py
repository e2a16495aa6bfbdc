"""A mask that is late holds up no step: its request is left out, and ends alone where no mask will come."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from enginekit.scripted import Ask, EngineScript, ScriptedEngine, scripted_engine

from flexgate.server.engine.protocol.endings import CONSTRAINT_FAILED, CONSTRAINT_SLOW, CONSTRAINT_UNAVAILABLE

pytestmark = pytest.mark.engine

PROMPT = tuple(range(20, 40))
LATE = Ask(PROMPT, (0, 1), max_tokens=40, regex="[a-z ]{900}")
BESIDE = Ask(PROMPT[::-1], (0, 2), max_tokens=12)


@pytest.fixture(scope="module")
def texts(text_checkpoint: Path) -> Iterator[ScriptedEngine]:
    """An engine with a tokenizer."""
    with scripted_engine(EngineScript(text_checkpoint, max_experts=6)) as running:
        yield running


def test_a_request_whose_mask_is_late_is_left_out_of_steps_and_goes_on_when_it_is_there(texts: ScriptedEngine) -> None:
    alone = texts.solo(LATE)
    beside, late, counts = texts.call("run_beside_a_late_mask", LATE, BESIDE, signal.SIGSTOP)
    assert [count for count, _ in counts] == list(range(1, BESIDE.max_tokens + 1))  # a token in each step
    assert max(count for _, count in counts) <= 4  # the mask of one more may have been made before
    assert late.tokens == alone.tokens
    assert late.finish_reason == "length"
    assert late.chosen == alone.chosen
    assert beside.finish_reason == "length"
    assert texts.call("leftovers") == (0, 0)
    assert texts.call("followed") == 0


def test_a_request_whose_masks_are_made_no_more_ends_alone(texts: ScriptedEngine) -> None:
    beside, late, counts = texts.call("run_beside_a_late_mask", LATE, BESIDE, signal.SIGKILL)
    assert [count for count, _ in counts] == list(range(1, BESIDE.max_tokens + 1))
    assert (late.finish_reason, late.stop_reason) == ("error", CONSTRAINT_UNAVAILABLE)
    assert beside.finish_reason == "length"
    assert texts.call("leftovers") == (0, 0)
    assert texts.call("followed") == 0


def test_constrained_requests_of_one_batch_equal_those_alone(texts: ScriptedEngine) -> None:
    asks = [Ask(PROMPT[i:], (0, 1 + i % 3), max_tokens=16, regex=f"[a-{c}]{{3,12}}") for i, c in enumerate("bcdxyz")]
    together = texts.run(asks)
    for ask, answer in zip(asks, together, strict=True):
        assert answer.finish_reason in ("stop", "length")
        assert answer.stop_reason not in (CONSTRAINT_SLOW, CONSTRAINT_FAILED, CONSTRAINT_UNAVAILABLE)
        assert answer.tokens == texts.solo(ask).tokens
