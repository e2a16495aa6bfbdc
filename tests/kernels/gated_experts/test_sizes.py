"""Full, narrow and low-rank experts in one batch: what may not change a bit, and how close factors are to merged ones.

Shape suffixes: T tokens, E slots of full experts, S slots of one smaller size, K chosen experts, H hidden, F expert
intermediate, G = 2F, W width, V = 2W, R rank, Q = 2R.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgate.kernels.errors import KernelArgumentError, KernelUnavailableError
from flexgate.kernels.gated_experts import (
    LowRankExperts,
    NarrowExperts,
    Smaller,
    gated_experts,
    gated_experts_reference,
)
from flexgate.kernels.gated_topk import gated_topk, unit_map

FULL, NARROW, LOW = 3, 2, 3
SLOTS = FULL + NARROW + LOW
HIDDEN, INTERMEDIATE, WIDTH, RANK = 20, 28, 5, 3
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Mixed:
    """Inputs of one layer with slots of three sizes."""

    x_TH: Tensor
    w13_EGH: Tensor
    w2_EHF: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    narrow: NarrowExperts
    low: LowRankExperts

    @property
    def smaller(self) -> Smaller:
        return (self.narrow, self.low)

    def operands(self) -> tuple[Tensor, ...]:
        return self.x_TH, self.w13_EGH, self.w2_EHF, self.weights_TK, self.ids_TK

    def output(self) -> Tensor:
        return gated_experts(*self.operands(), smaller=self.smaller)

    def with_tokens(self, tokens: list[int]) -> "Mixed":
        return replace(self, x_TH=self.x_TH[tokens], weights_TK=self.weights_TK[tokens], ids_TK=self.ids_TK[tokens])

    def poisoned(self, slots: list[int], value: float) -> "Mixed":
        """Other contents of some slots."""
        changed = replace(
            self,
            w13_EGH=self.w13_EGH.clone(),
            w2_EHF=self.w2_EHF.clone(),
            narrow=NarrowExperts(*(tensor.clone() for tensor in self.narrow.tensors)),
            low=LowRankExperts(*(tensor.clone() for tensor in self.low.tensors)),
        )
        for slot in slots:
            for tensor, first in changed._parts():
                if 0 <= slot - first < len(tensor):
                    tensor[slot - first] = value
        return changed

    def with_slots(self, slots: list[int]) -> "Mixed":
        """The same layer where only `slots` ever existed, moved together; slot 0 is one of them."""
        renumber = torch.full((SLOTS + 1,), -1, dtype=torch.int32)
        renumber[slots] = torch.arange(len(slots), dtype=torch.int32)
        full, narrow, low = (
            [slot - first for slot in slots if 0 <= slot - first < count]
            for first, count in ((0, FULL), (FULL, NARROW), (FULL + NARROW, LOW))
        )
        return replace(
            self,
            w13_EGH=self.w13_EGH[full],
            w2_EHF=self.w2_EHF[full],
            ids_TK=renumber[self.ids_TK.long()],
            narrow=NarrowExperts(*(tensor[narrow] for tensor in self.narrow.tensors)),
            low=LowRankExperts(*(tensor[low] for tensor in self.low.tensors)),
        )

    def _parts(self) -> list[tuple[Tensor, int]]:
        parts = [(self.w13_EGH, 0), (self.w2_EHF, 0)]
        parts += [(tensor, FULL) for tensor in self.narrow.tensors]
        return parts + [(tensor, FULL + NARROW) for tensor in self.low.tensors]


@pytest.fixture
def mixed() -> Callable[..., Mixed]:
    def make(
        tokens: int = 11,
        *,
        dtype: torch.dtype = torch.float32,
        gate: int = (1 << SLOTS) - 1,
        top_k: int = 4,
        seed: int = 0,
        rank: int = RANK,
    ) -> Mixed:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        weights_TK, ids_TK = gated_topk(
            torch.randn(tokens, SLOTS, generator=generator),
            torch.full((tokens,), gate),
            unit_E=unit_map(range(SLOTS)),
            top_k=top_k,
            renormalize=False,
            bias_E=None,
            mass_TU=torch.zeros(tokens, SLOTS, dtype=torch.int64),
            chosen_T=torch.zeros(tokens, dtype=torch.int64),
            fill="none",
        )
        return Mixed(
            torch.randn(tokens, HIDDEN, generator=generator).to(dtype),
            normal(FULL, 2 * INTERMEDIATE, HIDDEN),
            normal(FULL, HIDDEN, INTERMEDIATE),
            weights_TK,
            ids_TK,
            NarrowExperts(normal(NARROW, 2 * WIDTH, HIDDEN), normal(NARROW, HIDDEN, WIDTH)),
            LowRankExperts(
                normal(LOW, 2 * rank, HIDDEN),
                normal(LOW, 2 * INTERMEDIATE, rank),
                normal(LOW, rank, INTERMEDIATE),
                normal(LOW, HIDDEN, rank),
            ),
        )

    return make


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def merged(layer: Mixed) -> tuple[Tensor, Tensor]:
    """All slots as full experts, as a merge writes them: rounded once, zeros beyond a width."""
    dtype, low = layer.x_TH.dtype, [tensor.float() for tensor in layer.low.tensors]
    w13, w2 = [*layer.w13_EGH], [*layer.w2_EHF]
    for v13_VH, v2_HW in zip(*layer.narrow.tensors, strict=True):
        wide_GH = torch.zeros_like(w13[0])
        wide_GH[:WIDTH], wide_GH[INTERMEDIATE:][:WIDTH] = v13_VH[:WIDTH], v13_VH[WIDTH:]
        wide_HF = torch.zeros_like(w2[0])
        wide_HF[:, :WIDTH] = v2_HW
        w13.append(wide_GH)
        w2.append(wide_HF)
    for a13, b13, a2, b2 in zip(*low, strict=True):
        gate_up = [b @ a for a, b in zip(a13.chunk(2), b13.chunk(2), strict=True)]
        w13.append((w13[0].float() + torch.cat(gate_up)).to(dtype))
        w2.append((w2[0].float() + b2 @ a2).to(dtype))
    return torch.stack(w13), torch.stack(w2)


@pytest.mark.parametrize(("dtype", "largest", "rms"), [(torch.float32, 2e-6, 5e-7), (torch.bfloat16, 2e-2, 4e-3)])
def test_kept_sizes_answer_as_merged_ones_within_a_stated_bound(
    mixed: Any, dtype: torch.dtype, largest: float, rms: float
) -> None:
    """In float32 the sums differ in order alone; in bfloat16 a merge rounds W + B A to 8 bits once more."""
    for seed in range(5):
        layer = mixed(300, dtype=dtype, seed=seed)
        w13_EGH, w2_EHF = merged(layer)
        whole = gated_experts(layer.x_TH, w13_EGH, w2_EHF, layer.weights_TK, layer.ids_TK).float()
        difference = (layer.output().float() - whole) / whole.abs().max()
        assert bool(difference.any())
        assert float(difference.abs().max()) < largest
        assert float(difference.square().mean().sqrt()) < rms


def test_the_reference_is_the_formula(mixed: Any) -> None:
    layer = mixed(40)
    w13_EGH, w2_EHF = (tensor.double() for tensor in merged(layer))
    expected_TH = torch.zeros(40, HIDDEN, dtype=torch.float64)
    for token, rank in torch.cartesian_prod(torch.arange(40), torch.arange(4)).tolist():
        slot, x = int(layer.ids_TK[token, rank]), layer.x_TH[token].double()
        hidden = torch.nn.functional.silu(w13_EGH[slot, :INTERMEDIATE] @ x) * (w13_EGH[slot, INTERMEDIATE:] @ x)
        expected_TH[token] += layer.weights_TK[token, rank].double() * (w2_EHF[slot] @ hidden)
    torch.testing.assert_close(layer.output().double(), expected_TH, atol=2e-6, rtol=0)
    assert {*layer.ids_TK.flatten().tolist()} == {*range(SLOTS)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), -1e30])
@pytest.mark.parametrize("kept", [[0, 2, 4, 6], [0, 3, 5, 7], [0, 5], [0, 1, 2], [0, 3, 4, 6, 7]], ids=str)
def test_excluded_slots_of_any_size_equal_poisoned_and_absent_ones_bit_for_bit(
    mixed: Any, dtype: torch.dtype, poison: float, kept: list[int]
) -> None:
    layer = mixed(dtype=dtype, gate=sum(1 << slot for slot in kept))
    clean = layer.output()
    excluded = [slot for slot in range(SLOTS) if slot not in kept]
    assert same_bits(layer.poisoned(excluded, poison).output(), clean)
    compacted = layer.with_slots(kept)
    present = tuple(group for group in compacted.smaller if len(group.tensors[0]))
    assert same_bits(gated_experts(*compacted.operands(), smaller=present), clean)
    assert bool(clean.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_experts_alone_keep_the_bits_that_they_have_without_smaller_slots(mixed: Any, dtype: torch.dtype) -> None:
    layer = mixed(dtype=dtype, gate=(1 << FULL) - 1)
    assert same_bits(layer.output(), gated_experts(*layer.operands()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_alone_and_in_any_batch(mixed: Any, dtype: torch.dtype) -> None:
    layer = mixed(24, dtype=dtype)
    together = layer.output()
    for tokens in ([0], [17], [5, 4, 3], list(range(12, 24))):
        assert same_bits(layer.with_tokens(tokens).output(), together[tokens])


def test_a_neighbour_full_of_nan_changes_nothing(mixed: Any) -> None:
    layer = mixed(13)
    spoiled = replace(layer, x_TH=layer.x_TH.clone())
    spoiled.x_TH[6] = float("nan")
    others = [token for token in range(13) if token != 6]
    assert same_bits(spoiled.output()[others], layer.output()[others])


def test_a_low_rank_expert_contains_the_public_one_and_no_other(mixed: Any) -> None:
    """Excluding the public expert does not remove it from low-rank experts: they are graded for that."""
    layer = mixed(gate=1 << (SLOTS - 1), top_k=1)
    clean = layer.output()
    assert not torch.equal(layer.poisoned([0], 0.5).output(), clean)
    assert same_bits(layer.poisoned([*range(1, SLOTS - 1)], float("nan")).output(), clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [4, 16, 17, 40, 64])
@pytest.mark.parametrize("rank", [1, 3, 16, 17])
def test_the_rank_that_a_slot_has_room_for_changes_no_bit(mixed: Any, dtype: torch.dtype, rank: int, room: int) -> None:
    layer = mixed(60, dtype=dtype, rank=rank)
    more = max(0, room - rank)
    a13, b13, a2, b2 = layer.low.tensors
    pad = torch.nn.functional.pad
    padded = LowRankExperts(
        torch.cat([pad(half, (0, 0, 0, more)) for half in a13.chunk(2, dim=1)], dim=1),
        pad(b13, (0, more)),
        pad(a2, (0, 0, 0, more)),
        pad(b2, (0, more)),
    )
    assert same_bits(replace(layer, low=padded).output(), layer.output())


def test_fillers_add_nothing_whatever_id_they_carry(mixed: Any) -> None:
    layer = mixed(gate=0b10010001, top_k=5)
    unused_TK = layer.ids_TK < 0
    assert bool(unused_TK.any())
    clean = layer.output()
    for filler in (3, 6, SLOTS, 99):
        spoiled = replace(layer, ids_TK=torch.where(unused_TK, filler, layer.ids_TK)).poisoned([3, 6], float("nan"))
        assert same_bits(spoiled.output(), clean)
    outside = replace(layer, ids_TK=torch.full_like(layer.ids_TK, SLOTS))
    assert not outside.output().any()


def test_several_ranks_follow_each_other(mixed: Any) -> None:
    """Slots of rank 3 and then of rank 1: each id finds its own."""
    layer = mixed(80)
    ones = LowRankExperts(
        layer.low.a13_SQH[:, [0, RANK]].contiguous(),
        layer.low.b13_SGR[..., :1].contiguous(),
        layer.low.a2_SRF[:, :1].contiguous(),
        layer.low.b2_SHR[..., :1].contiguous(),
    )
    both = gated_experts(
        *layer.operands(), smaller=(layer.narrow, LowRankExperts(*(t[:1] for t in layer.low.tensors)), ones)
    )
    alone = gated_experts(*layer.operands(), smaller=layer.smaller)
    first = (layer.ids_TK <= FULL + NARROW).all(dim=1)
    assert bool(first.any())
    assert same_bits(both[first], alone[first])
    assert not torch.equal(both, alone)


def test_operator_is_the_reference_and_fills_the_output_it_is_given(mixed: Any) -> None:
    layer = mixed(dtype=torch.bfloat16)
    given_TH = torch.full_like(layer.x_TH, float("nan"))
    returned_TH = gated_experts(*layer.operands(), smaller=layer.smaller, out_TH=given_TH)
    assert returned_TH is given_TH
    assert torch.equal(given_TH, gated_experts_reference(*layer.operands(), layer.smaller))


def test_schema_and_mutation_are_declared_correctly(mixed: Any) -> None:
    layer = mixed(5)
    parts = [*layer.narrow.tensors, *layer.low.tensors]
    operator = torch.ops.flexgate.gated_experts_of_sizes.default
    torch.library.opcheck(operator, (*layer.operands(), parts, [2, 4], torch.empty(5, HIDDEN)))


def test_compiled_equals_eager(mixed: Any) -> None:
    layer = mixed(5)

    def block(x_TH: Tensor, *others: Tensor) -> Tensor:
        return gated_experts(x_TH * 2, *others, smaller=layer.smaller) + x_TH

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*layer.operands()), block(*layer.operands()))


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        (
            "narrow",
            {"w13_SVH": torch.zeros(2, 9, 20)},
            "w13_SVH must be torch.float32 [2, 10, 20], none of them 0, got",
        ),
        ("narrow", {"w2_SHW": torch.zeros(2, 20)}, "w2_SHW must be torch.float32 of 3 dimensions, got"),
        ("narrow", {"w2_SHW": torch.zeros(2, 20, 0)}, "w13_SVH must be torch.float32 [2, 0, 20], none of them 0"),
        ("low", {"a13_SQH": torch.zeros(3, 6, 21)}, "a13_SQH must be torch.float32 [3, 6, 20]"),
        ("low", {"b13_SGR": torch.zeros(3, 56, 4)}, "b13_SGR must be torch.float32 [3, 56, 3]"),
        ("low", {"a2_SRF": torch.zeros(3, 3, 28, dtype=torch.bfloat16)}, "a2_SRF must be torch.float32 [3, 3, 28]"),
        ("low", {"b2_SHR": torch.zeros(2, 20, 3)}, "a13_SQH must be torch.float32 [2, 6, 20]"),
        ("low", {"a2_SRF": torch.zeros(3, 28, 3).mT}, "a2_SRF must be contiguous"),
    ],
)
@pytest.mark.parametrize("function", [gated_experts, gated_experts_reference])
def test_wrong_slots_of_smaller_sizes_are_refused_by_name(
    mixed: Any, function: Any, group: str, change: dict[str, Tensor], message: str
) -> None:
    layer = mixed(5)
    with pytest.raises(KernelArgumentError, match=re.escape(message)):
        function(*layer.operands(), smaller=(replace(getattr(layer, group), **change),))


def test_factors_without_a_public_expert_are_refused(mixed: Any) -> None:
    layer = mixed(5)
    none = replace(layer, w13_EGH=layer.w13_EGH[:0], w2_EHF=layer.w2_EHF[:0])
    with pytest.raises(KernelArgumentError, match="must have slot 0, the public expert"):
        none.output()


def test_sizes_that_a_gpu_does_not_compute_are_refused(mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = mixed(5)
    monkeypatch.setattr(Tensor, "device", property(lambda _: torch.device("cuda")))
    with pytest.raises(KernelUnavailableError, match="computed on CPU alone"):
        layer.output()
