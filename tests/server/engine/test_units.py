"""Units of several experts, other ones in each layer, in a running engine: bit for bit where that is promised."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from enginekit.checkpoints import Shape, assign_units, expert_ticket, keep_by_layer, write_random
from enginekit.compare import agree, cut_reference, reference, same_bits, worst_difference
from enginekit.ranks import slot_is_zero
from enginekit.scripted import Answer, Ask, EngineScript, ScriptedEngine, SlotChange, scripted_engine

from flexgate.experts.package.weights import WeightsTicket

pytestmark = pytest.mark.engine

NAMES = ("public", "two", "uneven", "one")
UNIT_LE = ([0, 1, 1, 2, 2, 3, 0], [2, 1, 3, 0, 1, 2, 2], [3, 1, 0, 0, 2, 1, 0])
"""Unit 1 has two experts in every layer, unit 2 two, three and one, unit 3 one; all in other places of each layer."""
FREE = 4  # the first slot that no unit of the checkpoint has
SLOTS = 6
PROMPT = tuple(range(10, 40))
SHAPE = Shape(experts=7, top_k=3)
GATES = [gate for size in range(1, 5) for gate in combinations(range(4), size)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven experts in a layer, top-3, of four units."""
    path = write_random(tmp_path_factory.mktemp("units"), SHAPE)
    return assign_units(path, NAMES, UNIT_LE)


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> WeightsTicket:
    """Expert 5 of the model on its own: one expert of every layer, as a package has."""
    folder = tmp_path_factory.mktemp("expert")
    return expert_ticket(write_random(folder / "model", SHAPE), 5, folder)


@pytest.fixture(scope="module")
def running(model: Path, moe_kernels: str) -> Iterator[ScriptedEngine]:
    """Four units and two free slots, which have an expert in every layer each."""
    with scripted_engine(EngineScript(model, max_experts=SLOTS, settings={"moe_kernels": moe_kernels})) as engine:
        yield engine


def kept_L(gate: tuple[int, ...]) -> list[list[int]]:
    """The experts of each layer that a gate allows."""
    return [[expert for expert, unit in enumerate(unit_E) if unit in gate] for unit_E in UNIT_LE]


def crowd(gates: list[tuple[int, ...]]) -> list[Ask]:
    return [
        Ask(tuple(20 + 7 * i + t for t in range(25 + i)), gate, max_tokens=6 + i % 4, at_step=i // 3)
        for i, gate in enumerate(gates)
    ]


def fresh(engine: ScriptedEngine, script: list[Ask], changes: tuple[SlotChange, ...] = ()) -> list[Answer]:
    engine.reset_cache()
    return engine.run(script, changes)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_gate_equals_transformers_with_its_layers_cut(
    running: ScriptedEngine, model: Path, gate: tuple[int, ...]
) -> None:
    answer = running.solo(Ask(PROMPT, gate))
    assert worst_difference(cut_reference(model, kept_L(gate)), PROMPT, answer) <= 2e-5


@pytest.mark.parametrize("excluded", [1, 2, 3])
@pytest.mark.parametrize("kind", ["nan", "random"])
def test_what_an_excluded_unit_holds_changes_no_bit(running: ScriptedEngine, kind: str, excluded: int) -> None:
    script = crowd([gate for gate in GATES if excluded not in gate])
    before = fresh(running, script)
    running.overwrite([excluded, 4, 5], kind)
    try:
        after = fresh(running, script)
    finally:
        running.restore()
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


def test_every_expert_of_an_allowed_unit_can_change_the_answer(running: ScriptedEngine) -> None:
    """The substitution above would be seen if the gate let it through."""
    asks = [Ask(PROMPT, (0, unit)) for unit in (1, 2, 3)]
    before = fresh(running, asks)
    for ask, answer in zip(asks, before, strict=True):
        running.overwrite([ask.gate[1]], "random")
        try:
            (after,) = fresh(running, [ask])
        finally:
            running.restore()
        assert not same_bits(answer, after)


@pytest.mark.parametrize("excluded", [1, 3], ids=NAMES.__getitem__)
def test_excluding_a_unit_equals_removing_its_experts_from_every_layer(
    running: ScriptedEngine, model: Path, moe_kernels: str, tmp_path: Path, excluded: int
) -> None:
    kept = [unit for unit in range(4) if unit != excluded]
    script = crowd([gate for gate in GATES if excluded not in gate])
    masked = fresh(running, script)
    reduced = keep_by_layer(model, tmp_path, kept_L(tuple(kept)))
    rest = [[kept.index(unit) for unit in unit_E if unit != excluded] for unit_E in UNIT_LE]
    assign_units(reduced, [NAMES[unit] for unit in kept], rest)
    with scripted_engine(EngineScript(reduced, max_experts=3, settings={"moe_kernels": moe_kernels})) as other:
        removed = other.run([replace(ask, gate=tuple(kept.index(unit) for unit in ask.gate)) for ask in script])
    assert all(same_bits(one, two) for one, two in zip(masked, removed, strict=True))


def test_a_mixed_batch_of_units_equals_solo_runs(running: ScriptedEngine) -> None:
    script = crowd(GATES)
    for ask, answer in zip(script, fresh(running, script), strict=True):
        (alone,) = fresh(running, [replace(ask, at_step=0)])
        assert agree(alone, answer)


def test_a_units_experts_are_attributed_together(running: ScriptedEngine, model: Path) -> None:
    (answer,) = fresh(running, [Ask(PROMPT, (0, 1, 2, 3))])
    with torch.no_grad():
        ids = torch.tensor([PROMPT + answer.tokens[:-1]])
        logits = reference(model)(ids, output_router_logits=True).router_logits
    mass = torch.zeros(4, dtype=torch.float64)
    chosen = torch.zeros(ids.shape[1], 4, dtype=torch.bool)
    for layer, unit_E in zip(logits, UNIT_LE, strict=True):
        weights, picks = torch.softmax(layer.float(), dim=-1).topk(3, dim=-1)
        units = torch.tensor(unit_E)[picks]
        mass.scatter_add_(0, units.flatten(), weights.double().flatten())
        chosen.scatter_(1, units, True)
    got = torch.tensor(answer.mass[:4], dtype=torch.float64) / 2**32
    assert torch.allclose(got, mass, rtol=1e-4, atol=0)
    assert list(answer.chosen) == [*chosen.sum(0).tolist(), 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("whole_experts", [False, True], ids=["tensor-parallel", "expert-parallel"])
def test_units_are_gated_alike_on_two_ranks(running: ScriptedEngine, model: Path, whole_experts: bool) -> None:
    """With whole experts, those of a unit lie on both ranks."""
    script = [replace(ask, at_step=0) for ask in crowd(GATES)]
    bystanders = [ask for ask in script if 1 not in ask.gate]
    settings = {"tensor_parallel_size": 2, "enable_expert_parallel": whole_experts}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    alone = [fresh(running, [ask])[0] for ask in script]
    with scripted_engine(EngineScript(model, SLOTS, settings=settings, environment=environment)) as ranks:
        for one, other in zip(alone, fresh(ranks, script), strict=True):
            assert agree(one, other)
            assert one.chosen == other.chosen
        before = fresh(ranks, bystanders)
        ranks.overwrite([1], "nan")
        after = fresh(ranks, bystanders)
        ranks.restore()
        ranks.change(*(SlotChange(0, do, 1) for do in ("close", "clear", "settle")))
        assert ranks.call("on_every_rank", slot_is_zero, 1) == [True, True]
        revoked = fresh(ranks, bystanders)
    for one, two, three in zip(before, after, revoked, strict=True):
        assert same_bits(one, two)
        assert same_bits(one, three)


@pytest.fixture(scope="module")
def one_layer_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer has no expert of units 0 and 1."""
    path = write_random(tmp_path_factory.mktemp("short"), Shape(experts=3, layers=2))
    return assign_units(path, NAMES[:3], ([0, 1, 2], [2, 2, 2]))


def test_a_gate_that_leaves_a_layer_without_an_expert_is_refused(one_layer_short: Path) -> None:
    with scripted_engine(EngineScript(one_layer_short, max_experts=3)) as engine:
        assert engine.refusal(Ask(PROMPT, (0, 1)), "nothing") == "the gate leaves a layer without an expert"
        answer = engine.solo(Ask(PROMPT, (1, 2)))
    assert worst_difference(cut_reference(one_layer_short, [[1, 2], [0, 1, 2]]), PROMPT, answer) <= 2e-5


def test_an_engine_starts_with_a_layer_of_which_all_experts_were_revoked(one_layer_short: Path) -> None:
    settings = {"revoked": frozenset({NAMES[2]})}
    with scripted_engine(EngineScript(one_layer_short, max_experts=4, settings=settings)) as engine:
        assert engine.refusal(Ask(PROMPT, (0, 1)), "nothing") == "the gate leaves a layer without an expert"


def test_a_unit_of_several_experts_leaves_no_bit_when_it_is_revoked(running: ScriptedEngine) -> None:
    bystanders = crowd([gate for gate in GATES if 1 not in gate])
    before = fresh(running, bystanders)
    running.overwrite([1], "random")  # to be restored
    running.change(*(SlotChange(0, do, 1) for do in ("close", "clear", "settle")))
    try:
        assert running.call("on_every_rank", slot_is_zero, 1) == [True]
        assert running.refusal(Ask(PROMPT, (0, 1)), "nothing") == "the gate names an expert that is no longer loaded"
        after = fresh(running, bystanders)
    finally:
        running.restore()
        running.change(SlotChange(0, "open", 1, 2))
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


def test_a_revoked_units_experts_are_not_loaded(running: ScriptedEngine, model: Path, moe_kernels: str) -> None:
    bystanders = crowd([gate for gate in GATES if 2 not in gate])
    settings = {"moe_kernels": moe_kernels, "revoked": frozenset({NAMES[2]})}
    with scripted_engine(EngineScript(model, max_experts=SLOTS, settings=settings)) as other:
        assert other.call("on_every_rank", slot_is_zero, 2) == [True]
        (digests,) = other.call("digests")
        answers = other.run(bystanders)
    (whole,) = running.call("digests")
    assert [one == two for one, two in zip(digests, whole, strict=True)] == [True, True, False, True, True, True]
    assert all(same_bits(one, two) for one, two in zip(fresh(running, bystanders), answers, strict=True))


def test_a_package_goes_into_a_free_slot_after_the_experts_of_each_layer(
    running: ScriptedEngine, model: Path, ticket: WeightsTicket
) -> None:
    fill = [SlotChange(0, "fill", FREE, ticket=ticket), SlotChange(0, "settle", FREE)]
    running.change(*fill, SlotChange(0, "open", FREE, 77))
    (answer,) = fresh(running, [Ask(PROMPT, (0, FREE))])
    running.change(*(SlotChange(0, do, FREE) for do in ("close", "clear", "settle")))
    added = [[*kept, 5] for kept in kept_L((0,))]
    assert worst_difference(cut_reference(model, added), PROMPT, answer) <= 2e-5
    assert answer.chosen[FREE] > 0


def test_a_package_is_not_written_into_a_slot_of_several_experts(
    running: ScriptedEngine, ticket: WeightsTicket
) -> None:
    before = running.call("digests")
    running.change(SlotChange(0, "close", 1))
    try:
        with pytest.raises(RuntimeError, match="slot 1 has 2 experts in a layer; a package has one"):
            running.change(SlotChange(0, "fill", 1, ticket=ticket), SlotChange(0, "settle", 1))
        assert running.call("digests") == before
    finally:
        running.change(SlotChange(0, "open", 1, 3))
