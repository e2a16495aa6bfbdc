"""`--moe-kernels`: what is asked for is what computes, is reported, or the start is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from enginekit.checkpoints import Shape, rewrite, write_random
from enginekit.compare import TOLERANCE, agree, reference, same_bits, worst_difference
from enginekit.scripted import Ask, EngineScript, ScriptedEngine, scripted_engine

from flexgate.server.engine.frontend.capabilities import RefusedConfigurationError
from flexgate.server.engine.frontend.launch import EngineSettings, plan

TINY = Shape(hidden=64, heads=2, kv_heads=2, intermediate=48, layers=2, experts=3, vocab=64, seed=5)
PROMPT = (5, 9, 2, 33, 17, 40, 8)
GATES = [(0,), (0, 2), (0, 1, 2), (1, 2)]


@pytest.mark.engine
def test_every_rank_reports_the_kernels_it_holds(engine: ScriptedEngine, moe_kernels: str) -> None:
    (report,) = engine.call("handshake")
    program = {"vllm": "UnquantizedExperts", "flexgate": "torch reference"}[moe_kernels]
    assert report["moe_kernels"] == moe_kernels
    assert report["computed_by"].endswith(program)
    assert report["routed_by"] == "C"


@pytest.mark.engine
def test_a_slots_layout_is_the_kernels_own(engine: ScriptedEngine) -> None:
    """What `pack` makes of the checkpoint's tensors is bit for bit what a loaded slot holds."""
    assert engine.call("packs_like_loaded", [0, 1, 2, 3])


def test_kernels_that_this_gpu_cannot_run_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = write_random(tmp_path / "model", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 34, 1 << 34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    plan(EngineSettings(source, moe_kernels="vllm"))
    with pytest.raises(RefusedConfigurationError) as refused:
        plan(EngineSettings(source, moe_kernels="flexgate"))
    assert str(refused.value) == (
        "--moe-kernels flexgate: Tesla T4 has compute capability 7.5; bfloat16 matrix products need 8.0"
    )


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedConfigurationError, match=r"^--moe-kernels fast: use flexgate or vllm$"):
        plan(EngineSettings(write_random(tmp_path / "model", TINY), moe_kernels="fast"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("tiny"), TINY)


def interpreted(model: Path, slots: int) -> EngineScript:
    return EngineScript(
        model, max_experts=slots, settings={"moe_kernels": "flexgate", "max_model_len": 64}, interpret_kernels=True
    )


@pytest.fixture(scope="module")
def triton(tiny: Path) -> Iterator[ScriptedEngine]:
    """An engine whose routing and experts are our Triton kernels, interpreted."""
    with scripted_engine(interpreted(tiny, 4)) as running:
        yield running


def script() -> list[Ask]:
    return [Ask(PROMPT[: 3 + i], gate, max_tokens=3 + i, at_step=i // 2) for i, gate in enumerate(GATES)]


@pytest.mark.engine
@pytest.mark.slow
def test_both_triton_kernels_compute_every_layer_of_every_step(triton: ScriptedEngine) -> None:
    before = triton.call("calls_of_kernels")
    triton.solo(Ask(PROMPT, (0, 1), max_tokens=4))
    after = triton.call("calls_of_kernels")
    steps = 4
    assert {name: after[name] - before.get(name, 0) for name in after} == dict.fromkeys(
        ("gated_topk", "gated_experts"), steps * TINY.layers
    )


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_triton_kernels_equal_transformers_on_the_reduced_checkpoint(
    triton: ScriptedEngine, tiny: Path, tmp_path: Path, gate: tuple[int, ...]
) -> None:
    triton.reset_cache()
    answer = triton.solo(Ask(PROMPT, gate, max_tokens=4))
    reduced = tiny if len(gate) == TINY.experts else rewrite(tiny, tmp_path, list(gate))
    assert worst_difference(reference(reduced), PROMPT, answer) <= TOLERANCE


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "1e30", "random"])
def test_triton_kernels_never_see_excluded_experts_and_free_slots(triton: ScriptedEngine, kind: str) -> None:
    asks = [ask for ask in script() if 1 not in ask.gate]
    triton.reset_cache()
    before = triton.run(asks)
    triton.overwrite([1, 3], kind)
    try:
        triton.reset_cache()
        after = triton.run(asks)
    finally:
        triton.restore()
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.engine
@pytest.mark.slow
def test_triton_kernels_make_exclusion_equal_removal(triton: ScriptedEngine, tiny: Path, tmp_path: Path) -> None:
    asks = [ask for ask in script() if 1 not in ask.gate]
    triton.reset_cache()
    masked = triton.run(asks)
    compact = [replace(ask, gate=tuple({0: 0, 2: 1}[slot] for slot in ask.gate)) for ask in asks]
    with scripted_engine(interpreted(rewrite(tiny, tmp_path, [0, 2]), 2)) as other:
        removed = other.run(compact)
    assert all(same_bits(one, two) for one, two in zip(masked, removed, strict=True))


@pytest.mark.engine
@pytest.mark.slow
def test_triton_kernels_answer_a_mixed_batch_like_solo_runs(triton: ScriptedEngine) -> None:
    triton.reset_cache()
    together = triton.run(script())
    for ask, answer in zip(script(), together, strict=True):
        triton.reset_cache()
        assert agree(triton.solo(replace(ask, at_step=0)), answer)
