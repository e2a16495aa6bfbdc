"""Promises of the running engine, on random checkpoints, bit for bit where that is promised."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from enginekit.checkpoints import rewrite
from enginekit.compare import agree, assert_usage_is_transformers, reference, same_bits, worst_difference
from enginekit.scripted import Ask, EngineScript, ScriptedEngine, scripted_engine

pytestmark = pytest.mark.engine

EXPERTS = 4
PROMPT = tuple(range(10, 40))
ALL = tuple(range(EXPERTS))
GATES = [gate for size in range(1, EXPERTS + 1) for gate in combinations(ALL, size)]


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_gate_equals_transformers_on_the_reduced_checkpoint(
    engine: ScriptedEngine, checkpoint: Path, tmp_path: Path, gate: tuple[int, ...]
) -> None:
    answer = engine.solo(Ask(PROMPT, gate))
    reduced = checkpoint if gate == ALL else rewrite(checkpoint, tmp_path, list(gate))
    assert worst_difference(reference(reduced), PROMPT, answer) <= 2e-5


def mixed_script() -> list[Ask]:
    """Gates of every size in one batch, arriving over several steps."""
    return [
        Ask(tuple(range(20 + 7 * i, 45 + 7 * i + i)), gate, max_tokens=6 + i % 4, at_step=i // 3)
        for i, gate in enumerate(GATES)
    ]


@pytest.mark.parametrize("kind", ["nan", "1e30", "-1e30", "random", "zero"])
def test_what_excluded_experts_and_free_slots_hold_changes_no_bit(engine: ScriptedEngine, kind: str) -> None:
    script = [replace(ask, gate=ask.gate) for ask in mixed_script() if 1 not in ask.gate]
    assert {len(ask.gate) for ask in script} == {1, 2, 3}
    engine.reset_cache()
    before = engine.run(script)
    engine.overwrite([1, 4, 5], kind)
    try:
        engine.reset_cache()
        after = engine.run(script)
    finally:
        engine.restore()
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


def test_what_an_expert_holds_changes_the_answers_of_its_users_and_no_bit_of_their_neighbours(
    engine: ScriptedEngine,
) -> None:
    """Users route differently afterwards, so that other numbers of tokens share the experts of those who are not."""
    script = mixed_script()
    engine.reset_cache()
    before = engine.run(script)
    engine.overwrite([3], "random")
    try:
        engine.reset_cache()
        after = engine.run(script)
    finally:
        engine.restore()
    for ask, one, other in zip(script, before, after, strict=True):
        assert same_bits(one, other) == (3 not in ask.gate)


def test_an_allowed_expert_does_change_the_answer(engine: ScriptedEngine) -> None:
    """The substitution above would be seen if the gate let it through."""
    ask = Ask(PROMPT, (0, 1))
    engine.reset_cache()
    before = engine.solo(ask)
    engine.overwrite([1], "random")
    try:
        engine.reset_cache()
        after = engine.solo(ask)
    finally:
        engine.restore()
    assert not same_bits(before, after)


def test_exclusion_equals_removal_with_slots_compacted(
    engine: ScriptedEngine, moe_kernels: str, checkpoint: Path, tmp_path: Path
) -> None:
    kept = [0, 2, 3]
    script = [ask for ask in mixed_script() if 1 not in ask.gate]
    compact = [replace(ask, gate=tuple(kept.index(slot) for slot in ask.gate)) for ask in script]
    engine.reset_cache()
    masked = engine.run(script)
    scored = Ask(PROMPT + engine.solo(Ask(PROMPT, ALL)).tokens, ALL, max_tokens=1, prompt_logprobs=True)
    passes = [scored, *(replace(scored, gate=tuple(slot for slot in ALL if slot != out)) for out in (1, 2, 3))]
    leave_one_out = engine.run(passes)
    reduced = rewrite(checkpoint, tmp_path, kept)
    with scripted_engine(EngineScript(reduced, max_experts=3, settings={"moe_kernels": moe_kernels})) as other:
        removed = other.run(compact)
        rescored = other.run([replace(scored, gate=(0, 1, 2))] * len(passes))
    assert all(same_bits(one, two) for one, two in zip(masked, removed, strict=True))
    assert leave_one_out[1].prompt_logprobs == rescored[1].prompt_logprobs, "the passes of a counterfactual"
    assert leave_one_out[0].prompt_logprobs != rescored[0].prompt_logprobs


def test_a_mixed_batch_equals_solo_runs(engine: ScriptedEngine) -> None:
    script = mixed_script()
    engine.reset_cache()
    together = engine.run(script)
    for ask, answer in zip(script, together, strict=True):
        engine.reset_cache()
        assert agree(engine.solo(replace(ask, at_step=0)), answer)


def test_attribution_is_the_routing_that_transformers_computes(engine: ScriptedEngine, checkpoint: Path) -> None:
    engine.reset_cache()
    asks = [Ask(PROMPT, gate) for gate in GATES]
    model = reference(checkpoint)
    for ask, answer in zip(asks, engine.run(asks), strict=True):
        assert_usage_is_transformers(model, ask, answer)


def test_all_choices_of_a_request_are_attributed_and_their_prompt_once(
    engine: ScriptedEngine, checkpoint: Path
) -> None:
    engine.reset_cache()
    ask = Ask(PROMPT, (0, 1, 3), max_tokens=12, choices=4, seed=1)
    answer = engine.solo(ask)
    assert len(set(answer.choices)) > 1
    assert [len(choice) for choice in answer.choices] == [12] * 4
    assert answer.prompt_positions == len(PROMPT)
    assert_usage_is_transformers(reference(checkpoint), ask, answer)


def test_an_aborted_request_is_attributed_what_it_had_got(engine: ScriptedEngine, checkpoint: Path) -> None:
    engine.reset_cache()
    asks = [
        Ask(PROMPT, ALL, max_tokens=400, abort_at_step=9),
        Ask(LONG, (0, 2), max_tokens=20),
        Ask(PROMPT, (1, 3), max_tokens=400, choices=3, seed=2, at_step=2, abort_at_step=14),
        Ask(LONG, ALL, max_tokens=400, at_step=3, abort_at_step=3),
    ]
    answers = engine.run(asks)
    assert [0 < len(answer.tokens) < 400 for answer in answers] == [True, True, True, False]
    assert [answer.finish_reason for answer in answers] == [None, "length", None, None]
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.prompt_positions == (len(ask.prompt) if answer.tokens else 0)
        assert_usage_is_transformers(reference(checkpoint), ask, answer)


@pytest.mark.parametrize("gate", [(0,), (0, 2), (1, 3), (0, 1, 3)], ids=str)
def test_an_excluded_expert_is_attributed_exactly_nothing(engine: ScriptedEngine, gate: tuple[int, ...]) -> None:
    answer = engine.solo(Ask(PROMPT, gate, client_salt=f"attribution-{gate}"))
    assert all(answer.mass[slot] == 0 and answer.chosen[slot] == 0 for slot in set(range(6)) - set(gate))
    assert max(answer.chosen) <= len(PROMPT) + len(answer.tokens) - 1
    assert sum(answer.chosen) > 0


LONG = tuple(2 + (7 * i) % 400 for i in range(300))


def test_a_prefix_is_shared_within_tenant_and_gate_and_never_across(engine: ScriptedEngine, checkpoint: Path) -> None:
    engine.reset_cache()
    first = engine.solo(Ask(LONG, ALL))
    assert first.cached == 0
    again = engine.solo(Ask(LONG, ALL))
    assert again.cached >= 128
    assert again.tokens == first.tokens
    for answer in (first, again):
        assert_usage_is_transformers(reference(checkpoint), Ask(LONG, ALL), answer)
    for stranger in (
        Ask(LONG, (0, 1)),
        Ask(LONG, ALL, tenant="other"),
        Ask(LONG, ALL, client_salt="mine"),
    ):
        assert engine.solo(stranger).cached == 0
    masked = engine.solo(Ask(LONG, (0, 1)))
    engine.reset_cache()
    assert agree(engine.solo(Ask(LONG, (0, 1))), masked)


def test_a_prefix_that_another_request_of_the_same_step_computes_is_attributed(
    engine: ScriptedEngine, checkpoint: Path
) -> None:
    engine.reset_cache()
    first, second = engine.run([Ask(LONG, ALL), Ask(LONG, ALL)])
    assert (first.cached, second.cached >= 128) == (0, True)
    for answer in (first, second):
        assert_usage_is_transformers(reference(checkpoint), Ask(LONG, ALL), answer)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("none", "request without a gate"),
        ("forged", "the gate's seal is broken"),
        ("another", "the gate was sealed for another request"),
        ("expired", "the gate has expired"),
        ("stale", "the gate names an expert that is no longer loaded"),
        ("free-slot", "the gate names an expert that is no longer loaded"),
    ],
)
def test_a_request_without_a_valid_gate_is_refused_and_the_engine_lives_on(
    engine: ScriptedEngine, how: str, reason: str
) -> None:
    assert engine.refusal(Ask(PROMPT, (0, 1)), how) == reason
    assert len(engine.solo(Ask(PROMPT, (0, 1))).tokens) == 8


@pytest.mark.parametrize(
    ("request_id", "reason"),
    [
        ("request-x-0123abcd", None),
        ("3_request-x-0123abcd", None),
        ("request-y-0123abcd", "the gate was sealed for another request"),
        ("request-x-y-0123abcd", "the gate was sealed for another request"),
        ("a_request-x-0123abcd", "the gate was sealed for another request"),
        ("request-x", "the gate was sealed for another request"),
    ],
)
def test_a_rank_registers_a_gate_for_its_own_request_alone(
    engine: ScriptedEngine, request_id: str, reason: str | None
) -> None:
    """Whatever passed the guard: every rank opens the seal and compares the request by itself."""
    assert engine.call("register_on_ranks", Ask(PROMPT, (0, 1)), request_id) == [reason]


def test_a_gate_that_expires_ends_its_request_also_when_nothing_else_runs(engine: ScriptedEngine) -> None:
    alone = engine.solo(Ask(PROMPT, ALL, max_tokens=400, valid_for=0.2))
    assert (alone.finish_reason, alone.stop_reason) == ("error", "gate_expired")
    assert len(alone.tokens) < 400


def test_a_gate_that_expires_in_mid_stream_ends_its_request_alone(engine: ScriptedEngine) -> None:
    short, other = engine.run([Ask(PROMPT, ALL, max_tokens=400, valid_for=0.2), Ask(PROMPT, (0,), max_tokens=20)])
    assert (short.finish_reason, short.stop_reason) == ("error", "gate_expired")
    assert len(short.tokens) < 400
    assert (other.finish_reason, len(other.tokens)) == ("length", 20)


def test_a_gate_ends_also_when_the_clock_is_set_back(engine: ScriptedEngine) -> None:
    engine.call("set_clock_back", 3600.0)
    try:
        alone = engine.solo(Ask(PROMPT, ALL, max_tokens=400, valid_for=3600.2))
    finally:
        engine.call("set_clock_back", 0.0)
    assert (alone.finish_reason, alone.stop_reason) == ("error", "gate_expired")


def test_nothing_is_held_for_requests_that_have_ended(engine: ScriptedEngine) -> None:
    engine.run(mixed_script())
    assert engine.call("leftovers") == (0, 0)
