"""The same promises on other engines: little memory, other dimensions, Model Runner V2, two ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from enginekit.checkpoints import Shape, add_router_bias, rewrite, write_random
from enginekit.compare import (
    TOLERANCE,
    agree,
    assert_usage_is_transformers,
    biased_reference,
    reference,
    same_bits,
    worst_difference,
)
from enginekit.ranks import overwrite_zero_slot
from enginekit.scripted import (
    Answer,
    Ask,
    EngineScript,
    ScriptedEngine,
    SlotChange,
    scripted_engine,
)

pytestmark = pytest.mark.engine

GATES = [(0,), (0, 2), (1, 3), (0, 1, 2, 3), (3,), (0, 1, 3), (2, 3), (0, 3), (0, 2, 3), (1, 2, 3)]


def crowd() -> list[Ask]:
    """More tokens than a small KV cache holds, prompts longer than a step takes."""
    return [
        Ask(
            tuple(2 + (i * 37 + 5 * t) % 500 for t in range(40 + 11 * i)),
            GATES[i % len(GATES)],
            max_tokens=20 + 5 * (i % 5),
            at_step=i // 2,
            tenant=f"tenant-{i % 3}",
        )
        for i in range(12)
    ]


TIGHT = EngineScript(
    Path(),
    max_experts=6,
    tuning={"block_size": 32, "max_model_len": 256},
    settings={"kv_cache_memory_bytes": 2 << 20, "max_num_batched_tokens": 64, "max_num_seqs": 8},
)


def tight_script(model: Path, **settings: Any) -> EngineScript:
    return replace(TIGHT, model=model, settings=TIGHT.settings | settings)


def assert_crowd_equals_solo(tight: ScriptedEngine, roomy: ScriptedEngine) -> None:
    together = tight.run(crowd())
    assert tight.call("preemptions") > 0
    for ask, answer in zip(crowd(), together, strict=True):
        roomy.reset_cache()
        alone = roomy.solo(replace(ask, at_step=0))
        assert agree(alone, answer)
        assert_counted_once(ask, answer)
        if alone.tokens == answer.tokens:
            assert answer.cached == 0
            assert answer.chosen == alone.chosen
            assert all(abs(a - b) <= 1e-4 * 2**32 for a, b in zip(answer.mass, alone.mass, strict=True))
    assert tight.call("leftovers") == (0, 0)


def assert_counted_once(ask: Ask, answer: Answer) -> None:
    """Routing weights of a position sum to at most one per layer, so a double count shows."""
    positions = len(ask.prompt) + len(answer.tokens) - 1
    assert max(answer.chosen) <= positions
    if len(ask.gate) <= 2:  # every allowed expert is chosen everywhere
        assert sum(answer.mass) == pytest.approx(positions * 3 * 2**32, rel=1e-6)
        assert [count for count in answer.chosen if count] == [positions] * len(ask.gate)


SHARED_GATES = [(0, 2), (0, 1, 2, 3), (1, 3)]


def assert_shared_prefixes_count_once(tight: ScriptedEngine, checkpoint: Path) -> None:
    """Requests that read what others computed, that are preempted, and read what they computed themselves."""
    prefix, before = tuple(2 + (11 * t) % 400 for t in range(100)), tight.call("preemptions")
    asks = [
        Ask((*prefix, *range(20 + i, 30 + 3 * i)), SHARED_GATES[i % 3], max_tokens=30 + i, at_step=2 * i)
        for i in range(12)
    ]
    tight.reset_cache()
    answers = tight.run(asks)
    assert tight.call("preemptions") > before
    assert any(answer.cached for answer in answers)
    model = reference(checkpoint)
    for ask, answer in zip(asks, answers, strict=True):
        assert_counted_once(ask, answer)
        assert_usage_is_transformers(model, ask, answer)


def assert_choices_and_aborts_count_once(tight: ScriptedEngine, checkpoint: Path) -> None:
    """Choices that read one another's prompt, that are preempted, and that are aborted on the way."""
    prefix, before = tuple(2 + (13 * t) % 400 for t in range(100)), tight.call("preemptions")
    asks = [
        Ask(
            (*prefix, *range(20 + i, 30 + 3 * i)),
            SHARED_GATES[i % 3],
            max_tokens=25 + i,
            at_step=2 * i,
            choices=1 + i % 3,
            seed=(None, 5, 6)[i % 3],
            abort_at_step=(None, 2 * i + 3, None, 2 * i + 20)[i % 4],
        )
        for i in range(10)
    ]
    tight.reset_cache()
    answers = tight.run(asks)
    assert tight.call("preemptions") > before
    model = reference(checkpoint)
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.prompt_positions == (len(ask.prompt) if answer.tokens else 0)
        assert_usage_is_transformers(model, ask, answer)
    assert tight.call("leftovers") == (0, 0)


def assert_seeded_prompts_may_be_computed_in_parts(tight: ScriptedEngine, roomy: ScriptedEngine) -> None:
    asks = [Ask(tuple(2 + (19 * t + i) % 400 for t in range(200)), (0, 1, 3), seed=i, at_step=i) for i in range(3)]
    for ask, answer in zip(asks, tight.run(asks), strict=True):
        roomy.reset_cache()
        assert roomy.solo(replace(ask, at_step=0)).tokens == answer.tokens


def assert_what_ends_in_its_prompt_has_parts(tight: ScriptedEngine, checkpoint: Path) -> None:
    """A request that the engine ends before its first output reports what was computed of its prompt."""
    tight.reset_cache()
    ask = Ask(tuple(2 + (17 * t) % 400 for t in range(220)), (0, 1))
    (answer,) = tight.run([ask], [SlotChange(2, "close", 1)])
    tight.change(SlotChange(0, "open", 1, 1))
    assert (answer.tokens, answer.stop_reason) == ((), "expert_revoked")
    assert 0 < answer.prompt_positions < len(ask.prompt)
    assert_usage_is_transformers(reference(checkpoint), ask, answer)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_preempted_and_chunked_requests_equal_solo_runs_and_count_once(
    engine: ScriptedEngine, moe_kernels: str, checkpoint: Path, asynchronous: bool
) -> None:
    script = tight_script(checkpoint, async_scheduling=asynchronous, moe_kernels=moe_kernels)
    with scripted_engine(script) as tight:
        assert_crowd_equals_solo(tight, engine)
        assert_shared_prefixes_count_once(tight, checkpoint)
        assert_seeded_prompts_may_be_computed_in_parts(tight, engine)
        assert_choices_and_aborts_count_once(tight, checkpoint)
        assert_what_ends_in_its_prompt_has_parts(tight, checkpoint)


SHAPES = {
    "grouped-heads-top-1": Shape(hidden=128, heads=4, kv_heads=2, intermediate=352, experts=6, top_k=1, seed=1),
    "renormalised-top-3": Shape(
        hidden=256, heads=8, kv_heads=4, intermediate=88, experts=6, top_k=3, renormalize=True, layers=2, seed=2
    ),
    "tied": Shape(hidden=128, heads=4, kv_heads=4, intermediate=96, experts=6, top_k=2, layers=2, seed=4, tied=True),
    "all-experts": Shape(hidden=128, heads=2, kv_heads=1, intermediate=160, experts=6, top_k=6, layers=2, seed=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_other_dimensions_equal_transformers_under_every_kind_of_gate(tmp_path: Path, shape: Shape) -> None:
    source = write_random(tmp_path / "whole", shape)
    prompt = tuple(range(30, 60))
    gates = [tuple(range(6)), (0,), (0, 5), (1, 2, 4), (0, 2, 3, 4, 5)]
    with scripted_engine(EngineScript(source)) as engine:
        answers = engine.run([Ask(prompt, gate) for gate in gates])
    for gate, answer in zip(gates, answers, strict=True):
        reduced = rewrite(source, tmp_path / "reduced", list(gate)) if len(gate) < 6 else source
        assert worst_difference(reference(reduced), prompt, answer) <= TOLERANCE


BIAS_LE = torch.tensor([[0.0, -2.0, 3.0, -0.5], [-1.0, 0.0, 0.0, -3.0], [4.0, -0.3, -2.0, 0.0]])


@pytest.mark.slow
def test_a_router_bias_lowers_logits_and_never_raises_one(checkpoint: Path, tmp_path: Path) -> None:
    biased = add_router_bias(checkpoint, tmp_path / "biased", BIAS_LE)
    prompt = tuple(range(30, 60))
    gates = [(0, 1, 2, 3), (1,), (0, 2), (1, 2, 3)]
    with scripted_engine(EngineScript(biased, max_experts=6)) as engine:
        answers = engine.run([Ask(prompt, gate) for gate in gates])
    for gate, answer in zip(gates, answers, strict=True):
        kept = list(gate)
        reduced = rewrite(checkpoint, tmp_path / "reduced", kept)
        assert worst_difference(biased_reference(reduced, BIAS_LE[:, kept]), prompt, answer) <= TOLERANCE
        if len(gate) > 1:
            assert worst_difference(reference(reduced), prompt, answer) > 100 * TOLERANCE


# Each of these engines takes long to start; in CI the commit chooses whether with one kernel or the other.
ONE_OF_THE_KERNELS = pytest.mark.sliced(1, of="moe_kernels", family="kernels")


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, moe_kernels: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedEngine]:
    """The default start, with nothing compiled before."""
    caches = tmp_path_factory.mktemp("caches")
    script = EngineScript(
        checkpoint,
        max_experts=6,
        settings={"enforce_eager": False, "moe_kernels": moe_kernels},
        environment={"VLLM_CACHE_ROOT": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")},
    )
    with scripted_engine(script) as running:
        assert any(path.is_file() for path in caches.glob("torch_compile_cache/**/model")), "nothing was compiled"
        yield running


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_the_compiled_engine_equals_the_eager_one_under_mixed_gates(
    compiled: ScriptedEngine, engine: ScriptedEngine
) -> None:
    prompt = tuple(range(60, 100))
    asks = [Ask(prompt, gate) for gate in GATES]
    engine.reset_cache()
    eager, answers = engine.run(asks), compiled.run(asks)
    for want, got in zip(eager, answers, strict=True):
        assert agree(want, got)
        assert want.chosen == got.chosen
    assert len({answer.logprobs for answer in answers}) == len(GATES)
    for gate, answer in zip(GATES, answers, strict=True):
        assert {slot for slot, count in enumerate(answer.chosen) if count} <= set(gate)


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_compiled_code_reads_gates_and_weights_of_the_moment(compiled: ScriptedEngine) -> None:
    script = [ask for ask in crowd() if 1 not in ask.gate]
    compiled.reset_cache()
    before = compiled.run(script)
    for slots, same in (([1, 4, 5], True), ([3], False)):
        compiled.overwrite(slots, "nan" if same else "random")
        try:
            compiled.reset_cache()
            after = compiled.run(script)
        finally:
            compiled.restore()
        for ask, one, other in zip(script, before, after, strict=True):
            assert same_bits(one, other) == (not set(slots) & set(ask.gate))


@pytest.fixture(scope="module")
def runner_v2(checkpoint: Path, moe_kernels: str) -> Iterator[ScriptedEngine]:
    script = replace(tight_script(checkpoint, moe_kernels=moe_kernels), interpret_triton=True)
    with scripted_engine(script) as running:
        yield running


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_model_runner_v2_gates_and_counts_like_v1(
    runner_v2: ScriptedEngine, engine: ScriptedEngine, checkpoint: Path
) -> None:
    (report,) = runner_v2.call("handshake")
    assert report["hook"] == "GatedModelState"
    assert_crowd_equals_solo(runner_v2, engine)
    assert_shared_prefixes_count_once(runner_v2, checkpoint)


def two_ranks(model: Path, **settings: Any) -> EngineScript:
    return EngineScript(
        model,
        max_experts=7,
        settings={"tensor_parallel_size": 2, **settings},
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )


def asks_of_two_ranks() -> list[Ask]:
    return [Ask(tuple(range(10 + i, 40 + i)), gate) for i, gate in enumerate(GATES)]


def assert_ranks_equal_one(ranks: ScriptedEngine, one: ScriptedEngine, checkpoint: Path) -> None:
    one.reset_cache()
    for want, got in zip(one.run(asks_of_two_ranks()), ranks.run(asks_of_two_ranks()), strict=True):
        assert agree(want, got)
        assert want.chosen == got.chosen[:6]
    long = Ask(tuple(2 + t % 400 for t in range(300)), (0, 1, 2, 3))
    first, second = ranks.solo(long), ranks.solo(long)
    assert (first.cached, second.cached >= 128) == (0, True)
    for answer in (first, second):
        assert_usage_is_transformers(reference(checkpoint), long, answer)


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_two_tensor_parallel_ranks_gate_alike(checkpoint: Path, engine: ScriptedEngine, moe_kernels: str) -> None:
    with scripted_engine(two_ranks(checkpoint, moe_kernels=moe_kernels)) as ranks:
        reports = ranks.call("handshake")
        assert [(report["rank"], report["moe_kernels"]) for report in reports] == [(0, moe_kernels), (1, moe_kernels)]
        assert_ranks_equal_one(ranks, engine, checkpoint)


@pytest.fixture(scope="module")
def expert_parallel(checkpoint: Path, moe_kernels: str) -> Iterator[ScriptedEngine]:
    """Four experts and three free slots over two ranks: 0, 2, 4, 6 and 1, 3, 5."""
    with scripted_engine(two_ranks(checkpoint, enable_expert_parallel=True, moe_kernels=moe_kernels)) as running:
        yield running


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_expert_parallel_ranks_equal_one_rank(
    expert_parallel: ScriptedEngine, engine: ScriptedEngine, checkpoint: Path
) -> None:
    reports = expert_parallel.call("handshake")
    assert [report["experts_here"] for report in reports] == [[0, 2, 4, 6], [1, 3, 5]]
    assert all(report["zero_slot"] for report in reports)
    assert_ranks_equal_one(expert_parallel, engine, checkpoint)


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_ranks_that_refuse_something_answer_the_next_question_in_turn(expert_parallel: ScriptedEngine) -> None:
    before = expert_parallel.call("digests")
    for slot in (0, 1):
        with pytest.raises(RuntimeError, match=f"rank 0: SlotError: slot {slot} is live"):
            expert_parallel.change(SlotChange(0, "clear", slot))
        assert [report["rank"] for report in expert_parallel.call("handshake")] == [0, 1]
    assert expert_parallel.call("digests") == before


@pytest.mark.slow
@ONE_OF_THE_KERNELS
@pytest.mark.parametrize("local_expert_0", [0, 1], ids=["of-rank-0", "of-rank-1"])
@pytest.mark.parametrize("kind", ["nan", "1e30", "random"])
def test_the_first_expert_of_a_rank_changes_no_bit_where_it_is_excluded(
    expert_parallel: ScriptedEngine, kind: str, local_expert_0: int
) -> None:
    script = [ask for ask in asks_of_two_ranks() if local_expert_0 not in ask.gate]
    assert {len(ask.gate) for ask in script} >= {1, 2}
    expert_parallel.reset_cache()
    before = expert_parallel.run(script)
    expert_parallel.overwrite([local_expert_0, 4, 5, 6], kind)
    try:
        expert_parallel.reset_cache()
        after = expert_parallel.run(script)
    finally:
        expert_parallel.restore()
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.slow
@ONE_OF_THE_KERNELS
def test_a_rank_whose_zero_slot_holds_weights_fails_the_handshake(expert_parallel: ScriptedEngine) -> None:
    expert_parallel.call("on_every_rank", overwrite_zero_slot)
    try:
        reports = expert_parallel.call("handshake")
    finally:
        expert_parallel.restore()
    assert [report["zero_slot"] for report in reports] == [False, False]
