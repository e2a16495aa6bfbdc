"""What an expert loses when it is made smaller, and that this is what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packagekit import TWO, ffn, statement, write_model

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.layout import EXPERT_KEYS, Architecture, write_checkpoint
from flexgate.experts.errors import OutputRefused
from flexgate.experts.package.extract import extract_anchor, extract_expert
from flexgate.experts.package.merge import combine
from flexgate.experts.package.reduce import Errors, factored, largest_neurons
from flexgate.experts.package.size import PROJECTIONS, ExpertSize
from flexgate.experts.package.verify import open_package
from flexgate.experts.package.weights import package_bytes


def extracted(model: Path, target: Path, size: ExpertSize) -> Errors:
    found: Errors = {}
    extract_expert(model, "1", target, statement=statement("news"), size=size, on_errors=found.update)
    return found


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(2, 13)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_error_that_is_said_is_that_of_the_merged_expert(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, int], dtype: str, seed: int, data: st.DataObject
) -> None:
    """For any small model, rank and width: what a merge gives back differs from the expert by what was said."""
    root, hidden, intermediate = tmp_path_factory.mktemp("sizes"), 2 * sizes[0], sizes[1]
    architecture = Architecture(9, hidden, intermediate, 2, 1, 1, num_experts=2, num_experts_per_tok=2)
    write_model(root / "model", architecture, seed=seed, dtype=dtype)
    extract_anchor(root / "model", root / "anchor")
    low = data.draw(st.booleans())
    most = min(hidden, intermediate) if low else intermediate - 1
    number = data.draw(st.integers(1, most))
    size = ExpertSize(rank=number) if low else ExpertSize(width=number)
    said = extracted(root / "model", root / "news", size)
    base = base_identity(root / "anchor")
    with open_package(root / "news", base=base, trusted_keys=None, into=root / "copy") as opened:
        assert opened.weights.nbytes == package_bytes(base.architecture, base.dtype, size)
        combine(root / "anchor", [opened], root / "merged", top_k=2)
    squares = {name: [0.0, 0.0] for name in PROJECTIONS}
    for layer in range(2):
        parts = (ffn(root / "model", 0, layer), ffn(root / "model", 1, layer), ffn(root / "merged", 1, layer))
        kept = largest_neurons(*parts[1], number)
        for name, public, whole, merged in zip(PROJECTIONS, *(map(torch.Tensor.double, p) for p in parts), strict=True):
            if low:
                lost, all_of_it = merged - whole, whole - public
            else:
                axis = 1 if name == "down_proj" else 0
                assert torch.equal(merged.narrow(axis, 0, number), whole.index_select(axis, kept))
                lost = all_of_it = whole
            squares[name][0] += float(lost.square().sum())
            squares[name][1] += float(all_of_it.square().sum())
            if not low:
                squares[name][0] -= float(whole.index_select(axis, kept).square().sum())
    tolerance = 2e-3 if dtype == "float32" else 5e-2
    for name, (lost_square, whole_square) in squares.items():
        assert said[name] == pytest.approx((max(0.0, lost_square) / whole_square) ** 0.5, abs=tolerance)
    assert len(said["layers"]) == 2  # type: ignore[arg-type]


def test_a_whole_rank_loses_only_rounding_and_less_rank_loses_more(tmp_path: Path) -> None:
    write_model(tmp_path / "model", TWO)
    errors = [extracted(tmp_path / "model", tmp_path / str(rank), ExpertSize(rank=rank))["all"] for rank in (1, 6, 12)]
    assert errors[0] > errors[1] > 0.05  # type: ignore[operator]
    assert errors[2] < 1e-6  # type: ignore[operator]


def test_factors_are_the_best_of_their_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(12, 16, generator=generator)
    values = torch.linalg.svdvals(difference.double())
    for rank in (1, 5, 11):
        factors, loss = factored(difference, rank, torch.float32)
        assert (factors.a_RI.shape, factors.b_OR.shape) == ((rank, 16), (12, rank))
        assert loss.lost == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_an_expert_that_is_the_public_one_has_nothing_to_lose(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "pair", TWO)
    for layer in range(2):
        for key in EXPERT_KEYS:
            tensors[key.format(layer=layer, expert=1)] = tensors[key.format(layer=layer, expert=0)].clone()
    write_checkpoint(tmp_path / "same", TWO, tensors, dtype=torch.float32, eos_token_id=0, pad_token_id=1)
    errors = extracted(tmp_path / "same", tmp_path / "news", ExpertSize(rank=1))
    assert [errors[name] for name in (*PROJECTIONS, "all")] == [0.0] * 4


def test_a_smaller_extraction_never_goes_on_with_an_earlier_ones_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second factor of one computation beside the first of another would be a wrong expert of good digests."""
    write_model(tmp_path / "model", TWO)
    monkeypatch.setattr("flexgate.experts.io.stream.RECORD_EVERY", 1)
    computed = iter(range(99))

    def stop(*args: object) -> object:
        if next(computed) == 3:
            raise OutputRefused("stopped in the second layer's factors")
        return factored(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("flexgate.experts.package.reduce.factored", stop)
        with pytest.raises(OutputRefused):
            extracted(tmp_path / "model", tmp_path / "news", ExpertSize(rank=3))
    layers = extracted(tmp_path / "model", tmp_path / "news", ExpertSize(rank=3))["layers"]
    assert len(layers) == 2  # type: ignore[arg-type]
