"""Memory that is used again says nothing of who used it before, even where NaN was computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from enginekit.compare import agree, same_bits
from enginekit.ranks import overwrite_embedding
from enginekit.scripted import Answer, Ask, EngineScript, ScriptedEngine, scripted_engine

pytestmark = pytest.mark.engine

SPOILED = 3  # the slot whose expert makes its users overflow
KINDS = ("nan", "1e30", "-1e30", "nan-weights")
LICENSED = [
    Ask(tuple(range(40 + i, 90 + 9 * i)), (0, 1, SPOILED), at_step=i // 2, tenant="licensed", prompt_logprobs=i == 3)
    for i in range(6)
]
EXCLUDED = [Ask(tuple(range(20 + 5 * i, 50 + 6 * i)), (0, 2), max_tokens=6, at_step=i // 3) for i in range(8)]
LONG = [
    Ask(tuple(2 + (i * 37 + 5 * t) % 500 for t in range(50 + 11 * i)), (0, 1, 2)[: 1 + i % 3], 40, at_step=i // 2)
    for i in range(10)
]


@contextmanager
def spoiled(engine: ScriptedEngine, kind: str) -> Iterator[None]:
    engine.overwrite([SPOILED], kind)
    try:
        yield
    finally:
        engine.restore()


def assert_overflowed(answers: list[Answer]) -> None:
    """Ended before a token of theirs was sent, with attribution that is none of NaN's."""
    assert {(answer.finish_reason, answer.stop_reason) for answer in answers} == {("error", "numbers_overflowed")}
    for answer in answers:
        assert all(value == value for position in answer.logprobs for _, value in position)
        assert min((*answer.mass, *answer.chosen), default=0) >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_who_comes_after_a_request_that_overflowed_gets_the_same_bits(engine: ScriptedEngine, kind: str) -> None:
    engine.reset_cache()
    before = engine.run(EXCLUDED)
    with spoiled(engine, kind):
        engine.reset_cache()
        assert_overflowed(engine.run(LICENSED))
        after = engine.run(EXCLUDED)
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_who_runs_beside_a_request_that_overflows_gets_the_same_answer(engine: ScriptedEngine, kind: str) -> None:
    engine.reset_cache()
    before = engine.run(EXCLUDED)
    with spoiled(engine, kind):
        engine.reset_cache()
        together = engine.run([*LICENSED, *EXCLUDED])
    assert_overflowed(together[: len(LICENSED)])
    for want, got in zip(before, together[len(LICENSED) :], strict=True):
        assert agree(want, got)
        assert want.chosen == got.chosen


def test_what_a_request_that_overflowed_has_cached_is_forgotten(engine: ScriptedEngine) -> None:
    ask = Ask(tuple(range(100, 400)), (0, 1, SPOILED), client_salt="forgotten")
    engine.reset_cache()
    want = engine.solo(ask)
    engine.reset_cache()
    with spoiled(engine, "nan"):
        assert_overflowed([engine.solo(ask)])
    got = engine.solo(ask)
    assert got.cached == 0
    assert same_bits(want, got)


def test_a_request_that_overflows_late_ends_with_what_it_had_sent(engine: ScriptedEngine) -> None:
    """Every token but one is answered as usual: the overflow begins where its embedding is used."""
    ask = Ask(tuple(range(10, 40)), (0, 1), max_tokens=12, client_salt="late")
    engine.reset_cache()
    whole = engine.solo(ask)
    token = next(token for token in whole.tokens[2:] if token not in ask.prompt)
    index = whole.tokens.index(token)
    engine.call("on_every_rank", overwrite_embedding, token)
    try:
        engine.reset_cache()
        late = engine.solo(ask)
    finally:
        engine.restore()
    assert_overflowed([late])
    assert late.tokens == whole.tokens[: index + 1]
    assert late.logprobs == whole.logprobs[: index + 1]


def assert_alone_with_its_overflow(tight: ScriptedEngine, roomy: ScriptedEngine, *kinds: str) -> None:
    """Little memory: blocks change hands by preemption, and prompts arrive in chunks, some of them spoiled late."""
    roomy.reset_cache()
    want = [roomy.solo(replace(ask, at_step=0)) for ask in LONG]
    for kind in kinds:
        tight.reset_cache()
        with spoiled(tight, kind):
            assert_overflowed(tight.run([replace(ask, prompt=ask.prompt * 2) for ask in LICENSED]))
            before = tight.call("preemptions")
            answers = tight.run([*LONG, *LICENSED])
            assert tight.call("preemptions") > before
        assert_overflowed(answers[len(LONG) :])
        for one, other in zip(want, answers, strict=False):
            assert agree(one, other)
            assert one.tokens != other.tokens or one.chosen == other.chosen
    assert tight.call("leftovers") == (0, 0)


TIGHT = EngineScript(
    Path(),
    max_experts=6,
    tuning={"block_size": 32, "max_model_len": 256},
    settings={"kv_cache_memory_bytes": 2 << 20, "max_num_batched_tokens": 64, "max_num_seqs": 8},
)


def test_preemption_and_chunks_carry_no_overflow_to_others(engine: ScriptedEngine, checkpoint: Path) -> None:
    with scripted_engine(replace(TIGHT, model=checkpoint)) as tight:
        assert_alone_with_its_overflow(tight, engine, *KINDS)


@pytest.mark.slow
def test_model_runner_v2_carries_no_overflow_to_others(engine: ScriptedEngine, checkpoint: Path) -> None:
    with scripted_engine(replace(TIGHT, model=checkpoint, interpret_triton=True)) as tight:
        (report,) = tight.call("handshake")
        assert (report["hook"], report["clears_blocks"]) == ("GatedModelState", True)
        assert_alone_with_its_overflow(tight, engine, "nan-weights")


@pytest.mark.slow
@pytest.mark.parametrize("interpret_triton", [False, True], ids=["v1", "v2"])
def test_in_bfloat16_neighbours_of_an_overflow_keep_every_bit(checkpoint: Path, interpret_triton: bool) -> None:
    script = replace(TIGHT, model=checkpoint, interpret_triton=interpret_triton)
    with scripted_engine(replace(script, settings={**TIGHT.settings, "dtype": "bfloat16"})) as halves:
        before = halves.run(EXCLUDED)
        for kind in KINDS:
            halves.reset_cache()
            with spoiled(halves, kind):
                assert_overflowed(halves.run(LICENSED))
                after = halves.run(EXCLUDED)
                halves.reset_cache()
                together = halves.run([*LICENSED, *EXCLUDED])
            assert_overflowed(together[: len(LICENSED)])
            assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))
            assert [answer.tokens for answer in before] == [answer.tokens for answer in together[len(LICENSED) :]]


@pytest.mark.slow
def test_two_ranks_carry_no_overflow_to_others(checkpoint: Path) -> None:
    script = EngineScript(
        checkpoint,
        max_experts=7,
        settings={"tensor_parallel_size": 2},
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    with scripted_engine(script) as ranks:
        before = ranks.run(EXCLUDED)
        for kind in KINDS:
            ranks.reset_cache()
            with spoiled(ranks, kind):
                assert_overflowed(ranks.run(LICENSED))
                after = ranks.run(EXCLUDED)
            assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))
