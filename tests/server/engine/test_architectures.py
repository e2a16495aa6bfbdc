"""Every kind of model that is served, gated in a running engine and compared with transformers; one engine per kind."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from enginekit.checkpoints import add_further_layer, assign_units, keep_by_layer, write_mixture
from enginekit.compare import agree, cut_reference, same_bits, usage_of_routing, worst_difference
from enginekit.ranks import slot_is_zero
from enginekit.scripted import Answer, Ask, EngineScript, ScriptedEngine, SlotChange, scripted_engine

from flexgate.experts.checkpoint.served import SERVED
from flexgate.kernels.gated_topk import MASS_SCALE
from flexgate.server.engine.seam.models import MODELS, class_of

NAMES = ("public", "two", "uneven", "one")
UNIT_LE = ([0, 1, 1, 2, 2, 3, 0], [2, 1, 3, 0, 1, 2, 2], [3, 1, 0, 0, 2, 1, 0])
"""Seven experts in a layer: unit 1 has two in each, unit 2 two, three and one, unit 3 one; in other places of each."""
GATES = [gate for size in range(1, 5) for gate in combinations(range(4), size)]
PROMPT = tuple(range(10, 40))
SIZES: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 128,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}


@dataclass(frozen=True)
class Kind:
    """A random checkpoint of one kind: ``config.json`` beside `SIZES`, and the unit of each expert of each layer."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    unit_LE: tuple[list[int], ...] = UNIT_LE

    def write(self, directory: Path) -> Path:
        """A random checkpoint, with its ownership file."""
        sizes = SIZES | self.options
        if name := {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts"}.get(self.model_type):
            sizes[name] = sizes.pop("num_experts")
        return assign_units(write_mixture(directory, self.model_type, **sizes), NAMES, self.unit_LE)

    def kept_L(self, gate: tuple[int, ...]) -> list[list[int]]:
        """The experts of each layer that a gate allows."""
        return [[expert for expert, unit in enumerate(unit_E) if unit in gate] for unit_E in self.unit_LE]


QWEN: dict[str, Any] = {"intermediate_size": 72, "moe_intermediate_size": 40, "num_hidden_layers": 4}
DENSE_FIRST = ([], *UNIT_LE)
DENSE_BETWEEN = (UNIT_LE[0], [], *UNIT_LE[1:])
GLM: dict[str, Any] = {**QWEN, "head_dim": 64, "attention_bias": True, "num_mtp_layers": 0}
"""Layer 0 has no experts."""
EIGHT = ([], [0, 1, 1, 2, 2, 3, 0, 0], [2, 1, 3, 0, 1, 2, 2, 1], [3, 1, 0, 0, 2, 1, 0, 3])
KINDS = {
    "olmoe": Kind("olmoe"),
    "olmoe-renormalized": Kind("olmoe", {"norm_topk_prob": True}),
    "mixtral": Kind("mixtral", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3_moe": Kind("qwen3_moe", {**QWEN, "head_dim": 64, "mlp_only_layers": [1]}, DENSE_BETWEEN),
    "qwen3_moe-renormalized": Kind(
        "qwen3_moe", {**QWEN, "norm_topk_prob": True, "tie_word_embeddings": True, "mlp_only_layers": [0]}, DENSE_FIRST
    ),
    "qwen2_moe": Kind(
        "qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 56, "mlp_only_layers": [0]}, DENSE_FIRST
    ),
    "qwen2_moe-renormalized": Kind(
        "qwen2_moe",
        {
            **QWEN,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
        },
        ([], UNIT_LE[0], [], UNIT_LE[1], [], UNIT_LE[2]),
    ),
    "glm4_moe": Kind("glm4_moe", {**GLM, "routed_scaling_factor": 2.5}, DENSE_FIRST),
    "glm4_moe-grouped": Kind(
        "glm4_moe", {**GLM, "num_experts": 8, "n_group": 4, "topk_group": 2, "norm_topk_prob": False}, EIGHT
    ),
}


RENORMALIZED = {"mixtral", "glm4_moe"} | {name for name in KINDS if name.endswith("-renormalized")}


@dataclass(frozen=True)
class Running:
    """An engine and what it runs."""

    name: str
    kind: Kind
    model: Path
    engine: ScriptedEngine

    def fresh(self, script: list[Ask]) -> list[Answer]:
        """Answers of requests that find nothing cached."""
        self.engine.reset_cache()
        return self.engine.run(script)


BFLOAT16 = {"dtype": "bfloat16"}
SLICED = [pytest.mark.slow, pytest.mark.sliced(1, of="in_bfloat16", family="bfloat16")]
RARELY = [pytest.mark.slow, pytest.mark.sliced(1, of="running", family="kinds")]
"""The other value of `norm_topk_prob`, where another test has one; CI takes one kind with it."""


def some(kinds: Collection[str]) -> pytest.MarkDecorator:
    """Run a test of these kinds alone."""
    return pytest.mark.parametrize("running", of_kinds(kinds), indirect=True, scope="module")


def of_kinds(kinds: Collection[str]) -> list[Any]:
    return [pytest.param(kind, marks=RARELY if "-" in kind else []) for kind in kinds]


@pytest.fixture(scope="module", params=of_kinds(KINDS))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Four units, which have all slots that there are."""
    kind = KINDS[request.param]
    model = kind.write(tmp_path_factory.mktemp("model"))
    with scripted_engine(EngineScript(model)) as engine:
        yield Running(request.param, kind, model, engine)


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=SLICED) for kind in KINDS if "-" not in kind])
def in_bfloat16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """What is served by default; no tolerance compares it with transformers, but bits are bits."""
    kind = KINDS[request.param]
    model = kind.write(tmp_path_factory.mktemp("model"))
    with scripted_engine(EngineScript(model, settings=BFLOAT16)) as engine:
        yield Running(request.param, kind, model, engine)


def crowd(gates: list[tuple[int, ...]]) -> list[Ask]:
    return [
        Ask(tuple(20 + 7 * i + t for t in range(25 + i)), gate, max_tokens=6 + i % 4, at_step=i // 3)
        for i, gate in enumerate(gates)
    ]


def test_every_kind_that_is_served_has_a_class_and_is_compared_here() -> None:
    assert {kind.architecture for kind in SERVED.values()} == MODELS.keys()
    assert {kind.model_type for kind in KINDS.values()} | {"flex_olmo"} == SERVED.keys()


@pytest.mark.engine
def test_every_layer_of_experts_is_routed_by_a_gate(running: Running) -> None:
    (report,) = running.engine.call("handshake")
    assert report["model"] == "flexgate.server.engine.worker.moe.GatedModel"
    assert report["computes"] == class_of(SERVED[running.kind.model_type].architecture)
    assert report["ungated"] == []
    top_k, renormalized, *_ = report["routing"]
    assert (top_k, renormalized) == (3, running.name in RENORMALIZED)
    assert report["moe_layers"] == sum(map(bool, running.kind.unit_LE))


@pytest.mark.engine
def test_a_gate_equals_transformers_with_its_layers_cut(running: Running) -> None:
    answers = running.fresh([Ask(PROMPT, gate) for gate in GATES])
    for gate, answer in zip(GATES, answers, strict=True):
        assert worst_difference(cut_reference(running.model, running.kind.kept_L(gate)), PROMPT, answer) <= 2e-5, gate


@pytest.mark.engine
def test_what_an_excluded_unit_holds_changes_no_bit(running: Running) -> None:
    assert_excluded_units_change_no_bit(running)


def assert_excluded_units_change_no_bit(running: Running) -> None:
    for excluded, kind in ((1, "nan"), (2, "random"), (3, "nan")):
        script = crowd([gate for gate in GATES if excluded not in gate])
        before = running.fresh(script)
        running.engine.overwrite([excluded], kind)
        try:
            after = running.fresh(script)
        finally:
            running.engine.restore()
        assert all(same_bits(one, other) for one, other in zip(before, after, strict=True)), excluded


@pytest.mark.engine
def test_what_an_allowed_unit_holds_changes_the_answer(running: Running) -> None:
    """The substitution above would be seen if the gate let it through."""
    for unit in (1, 2, 3):
        ask = Ask(PROMPT, (0, unit))
        (before,) = running.fresh([ask])
        running.engine.overwrite([unit], "random")
        try:
            (after,) = running.fresh([ask])
        finally:
            running.engine.restore()
        assert not same_bits(before, after), unit


@pytest.mark.engine
@pytest.mark.parametrize("excluded", [1, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.sliced(1)])])
@some([name for name, kind in KINDS.items() if kind.options.get("n_group", 1) == 1])
def test_excluding_a_unit_equals_removing_its_experts_from_every_layer(
    running: Running, tmp_path: Path, excluded: int
) -> None:
    """Of units whose layers all lose equally many experts, which a checkpoint needs.

    With several groups what is excluded leaves a hole, since groups go by place.
    """
    assert_excluding_equals_removing(running, tmp_path, excluded)


def assert_excluding_equals_removing(running: Running, folder: Path, excluded: int, **settings: Any) -> None:
    kept = tuple(unit for unit in range(4) if unit != excluded)
    script = crowd([gate for gate in GATES if excluded not in gate])
    masked = running.fresh(script)
    reduced = keep_by_layer(running.model, folder, running.kind.kept_L(kept))
    rest = [[kept.index(unit) for unit in unit_E if unit in kept] for unit_E in running.kind.unit_LE]
    assign_units(reduced, [NAMES[unit] for unit in kept], rest)
    with scripted_engine(EngineScript(reduced, settings=settings)) as other:
        removed = other.run([replace(ask, gate=tuple(map(kept.index, ask.gate))) for ask in script])
    assert all(same_bits(one, two) for one, two in zip(masked, removed, strict=True))


@pytest.mark.engine
def test_in_bfloat16_too_an_excluded_unit_leaves_no_bit(in_bfloat16: Running, tmp_path: Path) -> None:
    assert_excluded_units_change_no_bit(in_bfloat16)
    assert_excluding_equals_removing(in_bfloat16, tmp_path, 1, **BFLOAT16)


@pytest.mark.engine
def test_a_mixed_batch_equals_solo_runs(running: Running) -> None:
    script = crowd(GATES)
    for ask, answer in zip(script, running.fresh(script), strict=True):
        (alone,) = running.fresh([replace(ask, at_step=0)])
        assert agree(alone, answer)


@pytest.mark.engine
def test_a_prefix_is_cached_for_its_gate_alone(running: Running) -> None:
    long = tuple(3 + t % 200 for t in range(290))
    first, again, other = (Ask(long, gate) for gate in ((0, 1), (0, 1), (0, 2)))
    (computed,) = running.fresh([first])
    read, apart = running.engine.solo(again), running.engine.solo(other)
    assert (computed.cached, apart.cached) == (0, 0)
    assert read.cached >= 256
    assert agree(computed, read)
    assert (read.chosen, read.tokens) == (computed.chosen, computed.tokens)
    assert agree(*running.fresh([other]), apart)


@pytest.mark.engine
def test_what_is_attributed_is_what_transformers_routes(running: Running) -> None:
    for gate in ((0, 1, 2, 3), (0, 2), (1, 3)):
        (answer,) = running.fresh([Ask(PROMPT, gate)])
        kept_L = running.kind.kept_L(gate)
        read = PROMPT + answer.tokens[:-1]
        model = cut_reference(running.model, kept_L)
        chosen_U, mass_U = usage_of_routing(model, kept_L, running.kind.unit_LE, len(NAMES), read)
        assert list(answer.chosen) == chosen_U
        assert [mass / MASS_SCALE for mass in answer.mass] == pytest.approx(mass_U, rel=1e-4)


@pytest.mark.engine
def test_a_revoked_unit_leaves_no_bit_in_any_layer(running: Running) -> None:
    bystanders = crowd([gate for gate in GATES if 2 not in gate])
    before = running.fresh(bystanders)
    running.engine.overwrite([2], "random")  # to be restored
    running.engine.change(*(SlotChange(0, do, 2) for do in ("close", "clear", "settle")))
    try:
        assert running.engine.call("on_every_rank", slot_is_zero, 2) == [True]
        refused = running.engine.refusal(Ask(PROMPT, (0, 2)), "nothing")
        after = running.fresh(bystanders)
    finally:
        running.engine.restore()
        running.engine.change(SlotChange(0, "open", 2, 1))
    assert refused == "the gate names an expert that is no longer loaded"
    assert all(same_bits(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.engine
@some(["glm4_moe"])
def test_a_layer_that_predicts_further_tokens_is_not_loaded(running: Running, tmp_path: Path) -> None:
    whole = keep_by_layer(running.model, tmp_path, [list(range(len(unit_E))) for unit_E in running.kind.unit_LE])
    assign_units(whole, NAMES, running.kind.unit_LE)
    add_further_layer(whole, running.kind.unit_LE)
    script = crowd(GATES)
    with scripted_engine(EngineScript(whole)) as other:
        answers = other.run(script)
    assert all(same_bits(one, two) for one, two in zip(running.fresh(script), answers, strict=True))


RANKS = {"environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
WAYS: dict[str, dict[str, Any]] = {
    "tensor-parallel": {"settings": {"tensor_parallel_size": 2}, **RANKS},
    "expert-parallel": {"settings": {"tensor_parallel_size": 2, "enable_expert_parallel": True}, **RANKS},
    "compiled": {"settings": {"enforce_eager": False}},
    "our kernels": {"settings": {"moe_kernels": "flexgate"}},
    "runner V2": {"interpret_triton": True},
}


def tried(kind: Kind, way: str) -> bool:
    """Other ways of a kind that was tried eager alone are refused where they can be asked for."""
    return way.endswith("-parallel") or not SERVED[kind.model_type].eager_alone


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.sliced(2)
@pytest.mark.parametrize(
    ("running", "way"),
    [
        pytest.param(name, way, marks=RARELY[:1] if "-" in name else [])
        for name, kind in KINDS.items()
        for way in WAYS
        if tried(kind, way)
    ],
    indirect=["running"],
    scope="module",
)
def test_every_way_of_running_gates_alike(running: Running, way: str, tmp_path: Path) -> None:
    script = [replace(ask, at_step=0) for ask in crowd(GATES)]
    options = WAYS[way]
    if way == "compiled":  # nothing compiled before
        options = {
            **options,
            "environment": {"VLLM_CACHE_ROOT": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        }
    with scripted_engine(EngineScript(running.model, **options)) as other:
        answers = other.run(script)
        bystanders = [ask for ask in script if 1 not in ask.gate]
        other.reset_cache()
        before = other.run(bystanders)
        other.overwrite([1], "nan")
        other.reset_cache()
        after = other.run(bystanders)
    for one, two in zip(running.fresh(script), answers, strict=True):
        assert agree(one, two)
        assert one.chosen == two.chosen
    assert all(same_bits(one, two) for one, two in zip(before, after, strict=True))
