"""Low-rank experts and narrow ones: made smaller by a measured loss, merged in full width, restored or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packagekit import ONE, TWO, bit_equal, ffn, make_package, random_tensors, statement, write_model
from safetensors.torch import load_file

from flexgate.experts.checkpoint.base import BaseArchitecture, base_identity
from flexgate.experts.checkpoint.layout import write_checkpoint
from flexgate.experts.checkpoint.ownership import parse_ownership
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.errors import (
    BaseMismatch,
    LayoutError,
    ManifestInvalid,
    PackageError,
    SizeInvalid,
    WeightsInvalid,
)
from flexgate.experts.package.extract import extract_anchor, extract_expert
from flexgate.experts.package.files import WEIGHTS_NAME
from flexgate.experts.package.inspect import inspect_package
from flexgate.experts.package.merge import combine
from flexgate.experts.package.size import PROJECTIONS, ExpertSize
from flexgate.experts.package.verify import VerifiedPackage, open_package
from flexgate.experts.package.weights import open_weights, package_bytes

Open = Callable[..., VerifiedPackage]
Merge = Callable[..., Path]
RANK, WIDTH = ExpertSize(rank=3), ExpertSize(width=5)


@pytest.fixture
def unsigned(tmp_path: Path) -> Iterator[Open]:
    """Open packages of one's own."""
    with ExitStack() as stack:
        count = iter(range(99))
        yield lambda path, anchor: stack.enter_context(
            open_package(path, base=base_identity(anchor), trusted_keys=None, into=tmp_path / f"copy{next(count)}")
        )


@pytest.fixture
def merge(unsigned: Open, tmp_path: Path) -> Merge:
    """Merge packages into a new folder."""

    def run(anchor: Path, *packages: Path, name: str = "merged") -> Path:
        combine(anchor, [unsigned(package, anchor) for package in packages], tmp_path / name, top_k=2, shard_bytes=4000)
        return tmp_path / name

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_low_rank_expert_is_the_public_one_plus_the_product_rounded_once(
    dtype: str, tmp_path: Path, merge: Merge
) -> None:
    write_model(tmp_path / "anchor", dtype=dtype)
    make_package(tmp_path / "news", tmp_path / "anchor", size=RANK)
    model, factors = merge(tmp_path / "anchor", tmp_path / "news"), load_file(tmp_path / "news" / WEIGHTS_NAME)
    for layer in range(ONE.num_hidden_layers):
        for name, public, whole in zip(PROJECTIONS, ffn(model, 0, layer), ffn(model, 1, layer), strict=True):
            a, b = (factors[f"layers.{layer}.{name}.lora_{part}.weight"].double() for part in "AB")
            expected = public.double() + b @ a
            assert whole.dtype is public.dtype
            bound = torch.finfo(whole.dtype).eps * expected.abs().clamp(min=1)
            assert bool(((whole.double() - expected).abs() <= bound).all())
            assert not torch.equal(whole, public)


@pytest.mark.parametrize("biased", [False, True])
def test_a_narrow_expert_is_merged_with_zeros_and_extracted_byte_for_byte(
    biased: bool, stock: Path, tmp_path: Path, merge: Merge
) -> None:
    _, tensors = make_package(
        tmp_path / "news", stock / "anchor", key=stock / "keys/acme.key", size=WIDTH, biased=biased
    )
    model = merge(stock / "anchor", tmp_path / "news")
    gate, up, down = ffn(model, 1)
    for name, whole in (("gate_proj", gate), ("up_proj", up), ("down_proj", down.T)):
        stored = tensors[f"layers.0.{name}.weight"]
        assert bit_equal(whole[:5], stored if name != "down_proj" else stored.T)
        assert not whole[5:].any()
    extract_expert(model, "news", tmp_path / "again")
    for path in (tmp_path / "news").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert base_identity(model) == base_identity(stock / "anchor")


def test_a_narrow_expert_that_was_changed_after_its_merge_is_not_cut(stock: Path, tmp_path: Path, merge: Merge) -> None:
    make_package(tmp_path / "news", stock / "anchor", size=WIDTH)
    architecture, tensors = read_checkpoint(merge(stock / "anchor", tmp_path / "news"))
    tensors["model.layers.1.mlp.experts.1.down_proj.weight"][3, 5] = 0.5
    write_checkpoint(tmp_path / "tuned", architecture, tensors, dtype=torch.float32, eos_token_id=0, pad_token_id=1)
    for name in ("flexgate.json", "provenance"):
        (tmp_path / "merged" / name).rename(tmp_path / "tuned" / name)
    with pytest.raises(LayoutError, match=r"experts.1.down_proj.weight is not zero beyond the width"):
        extract_expert(tmp_path / "tuned", "news", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_factors_are_not_restored_from_a_merge_and_the_refusal_names_the_rank(
    stock: Path, tmp_path: Path, merge: Merge
) -> None:
    make_package(tmp_path / "news", stock / "anchor", key=stock / "keys/acme.key", size=RANK)
    model = merge(stock / "anchor", tmp_path / "news")
    with pytest.raises(LayoutError, match=r"'news' of .* merged from a package of rank 3, .* give --rank 3 to"):
        extract_expert(model, "news", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    manifest = extract_expert(model, "news", tmp_path / "again", size=RANK)
    assert manifest.size == RANK
    assert not (tmp_path / "again/manifest.sig").exists()
    assert extract_expert(model, "news", tmp_path / "whole", statement=statement("news")).size == ExpertSize()


def test_a_checkpoint_says_sizes_and_that_the_anchor_stays_in_low_rank_experts(
    stock: Path, tmp_path: Path, merge: Merge
) -> None:
    make_package(tmp_path / "low", stock / "anchor", expert="low", size=RANK)
    make_package(tmp_path / "narrow", stock / "anchor", expert="narrow", size=WIDTH)
    said = {}
    for name, parts in (("all", ("low", "narrow")), ("without", ("narrow",))):
        model = merge(stock / "anchor", *(tmp_path / part for part in parts), name=name)
        said[name] = json.loads((model / "flexgate.json").read_text())
    public, low, narrow = said["all"]["experts"]
    assert "grade" not in public, "what is unknown is no better for it"
    assert (low["rank"], "width" in low, narrow["width"], "rank" in narrow) == (3, False, 5, False)
    assert "grade" not in said["without"]["experts"][0]
    units = parse_ownership(said["all"], [3, 3], "flexgate.json").units
    assert [unit.grade for unit in units] == ["unknown", "removed", "removed"]


@pytest.mark.parametrize("stated", [{"grade": "removed"}, {"grade": "router"}, {"grade": "shared"}, {"router": "own"}])
def test_the_anchor_is_graded_shared_at_best_beside_a_low_rank_expert(
    stock: Path, tmp_path: Path, merge: Merge, stated: dict[str, str]
) -> None:
    shutil.copytree(stock / "anchor", tmp_path / "stated")
    own = tmp_path / "stated/flexgate.json"
    entry = {"index": 0, "id": "public", "owner": "public", "domain": "all"} | stated
    own.write_text(json.dumps({"format": "flexgate-model/1", "strictly_separable": True, "experts": [entry]}))
    make_package(tmp_path / "low", tmp_path / "stated", expert="low", size=RANK)
    model = merge(tmp_path / "stated", tmp_path / "low")
    assert json.loads((model / "flexgate.json").read_text())["experts"][0]["grade"] == "shared"
    extract_anchor(model, tmp_path / "anchor")
    extracted = json.loads((tmp_path / "anchor/flexgate.json").read_text())["experts"][0]
    assert extracted["grade"] == "shared", "no better than it was said to be"


def test_what_was_measured_of_factors_is_not_said_of_others(stock: Path, tmp_path: Path, merge: Merge) -> None:
    make_package(tmp_path / "news", stock / "anchor", size=RANK)
    model = merge(stock / "anchor", tmp_path / "news")
    record = model / "provenance/news.json"
    figure = {"name": "perplexity", "value": 3.5, "unit": "1", "on": "held-out texts"}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"evaluation": [figure]}))
    assert extract_expert(model, "news", tmp_path / "again", size=RANK).evaluation == ()


@pytest.mark.parametrize("size", [RANK, WIDTH], ids=str)
def test_no_smaller_expert_is_made_of_what_is_not_finite(tmp_path: Path, size: ExpertSize) -> None:
    write_model(tmp_path / "model", TWO)
    architecture, tensors = read_checkpoint(tmp_path / "model")
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][0, 0] = torch.nan
    write_checkpoint(tmp_path / "spoilt", architecture, tensors, dtype=torch.float32, eos_token_id=0, pad_token_id=1)
    with pytest.raises(LayoutError, match=r"experts.1.up_proj.weight has values that are not finite"):
        extract_expert(tmp_path / "spoilt", "expert-1", tmp_path / "small", size=size, statement=statement("news"))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("size", [RANK, WIDTH], ids=str)
def test_packages_of_another_anchor_are_refused_by_the_tensor_that_differs(
    size: ExpertSize, stock: Path, tmp_path: Path, unsigned: Open
) -> None:
    """What is added to the public expert is worth nothing beside another one."""
    make_package(tmp_path / "news", stock / "anchor", size=size)
    architecture, tensors = read_checkpoint(stock / "anchor")
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"][2, 3] += 1
    write_checkpoint(tmp_path / "other", architecture, tensors, dtype=torch.float32, eos_token_id=0, pad_token_id=1)
    with pytest.raises(BaseMismatch, match=r"shared tensor model.layers.1.mlp.experts.0.up_proj.weight differs"):
        unsigned(tmp_path / "news", tmp_path / "other")


def test_an_anchor_that_changes_between_its_check_and_the_sum_leaves_nothing(
    stock: Path, tmp_path: Path, unsigned: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path / "news", stock / "anchor", size=RANK)
    opened = unsigned(tmp_path / "news", stock / "anchor")
    architecture, tensors = read_checkpoint(stock / "anchor")
    tensors["model.layers.0.mlp.experts.0.gate_proj.weight"][0, 0] += 1
    write_checkpoint(tmp_path / "other", architecture, tensors, dtype=torch.float32, eos_token_id=0, pad_token_id=1)
    monkeypatch.setattr("flexgate.experts.package.merge._check", lambda *_: None)
    with pytest.raises(LayoutError, match=r"experts.0.gate_proj.weight is not the one that the base's digest names"):
        combine(tmp_path / "other", [opened], tmp_path / "merged", top_k=2)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (ExpertSize(rank=0), "rank is 0; the projections are 12 x 16, so it must be 1 to 12"),
        (ExpertSize(rank=13), "rank is 13; the projections are 12 x 16, so it must be 1 to 12"),
        (ExpertSize(rank=-1), "rank is -1;"),
        (ExpertSize(width=0), "width is 0; it must be 1 to 11, since a full expert has 12"),
        (ExpertSize(width=12), "width is 12; it must be 1 to 11, since a full expert has 12"),
        (ExpertSize(rank=2, width=3), "has a rank or a width, not both: got rank 2 and width 3"),
    ],
    ids=str,
)
def test_a_size_that_no_expert_has_is_refused_wherever_it_is_said(
    size: ExpertSize, message: str, stock: Path, tmp_path: Path, unsigned: Open
) -> None:
    write_model(tmp_path / "model", TWO)
    with pytest.raises(SizeInvalid, match=message):
        extract_expert(tmp_path / "model", "1", tmp_path / "news", statement=statement("news"), size=size)
    assert not (tmp_path / "news").exists()
    make_package(tmp_path / "good", stock / "anchor", size=RANK)
    said = json.loads((tmp_path / "good/manifest.json").read_text())
    said |= {"rank": size.rank, "width": size.width}
    (tmp_path / "good/manifest.json").write_text(json.dumps(said))
    with pytest.raises(ManifestInvalid, match=message):
        unsigned(tmp_path / "good", stock / "anchor")


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        (RANK, {"rank": 4}, r"lora_A.weight has shape \[3, 16\], expected \[4, 16\]"),
        (RANK, {"rank": None, "width": 5}, "has an unknown tensor 'layers.0.down_proj.lora_A.weight'"),
        (RANK, {"rank": "3"}, "'rank' must be an integer"),
        (RANK, {"rank": True}, "'rank' must be an integer"),
        (RANK, {"format": "flexgate-expert/1"}, "that of a package of rank 3 is 'flexgate-expert/2'"),
        (RANK, {"rank": None}, "that of a package without rank and width is 'flexgate-expert/1'"),
        (WIDTH, {"width": 6}, r"has shape \[5, 16\], expected \[6, 16\]"),
        (ExpertSize(), {"format": "flexgate-expert/2"}, "that of a package without rank and width is"),
    ],
)
def test_a_manifest_that_contradicts_the_weights_or_itself_is_refused(
    size: ExpertSize, change: dict[str, object], message: str, stock: Path, tmp_path: Path, unsigned: Open
) -> None:
    make_package(tmp_path / "news", stock / "anchor", size=size)
    said = json.loads((tmp_path / "news/manifest.json").read_text()) | change
    (tmp_path / "news/manifest.json").write_text(json.dumps(said))
    with pytest.raises(PackageError, match=message):
        unsigned(tmp_path / "news", stock / "anchor")


def test_factors_that_are_small_alone_and_large_together_are_refused(
    stock: Path, tmp_path: Path, unsigned: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, message in (
        (90.0, r"the product of layers.1.up_proj.lora_B.weight and .*lora_A.* magnitude 2.43e\+04, at most 10000"),
        (10.0, r"the product of layers.1.up_proj.lora_B.weight and .*lora_A.* root mean square 300, at most 100"),
    ):
        with monkeypatch.context() as patch:

            def filled(*args: object, value: float = value) -> dict[str, torch.Tensor]:
                tensors = random_tensors(*args)  # type: ignore[arg-type]
                for part in "AB":
                    tensors[f"layers.1.up_proj.lora_{part}.weight"].fill_(value)
                return tensors

            patch.setattr("packagekit.random_tensors", filled)
            make_package(tmp_path / str(value), stock / "anchor", size=RANK)
        with pytest.raises(WeightsInvalid, match=message):
            unsigned(tmp_path / str(value), stock / "anchor")


def test_a_low_rank_package_has_factors_and_no_ffn_of_its_own(stock: Path, tmp_path: Path, unsigned: Open) -> None:
    make_package(tmp_path / "news", stock / "anchor", size=RANK)
    opened = unsigned(tmp_path / "news", stock / "anchor")
    with pytest.raises(WeightsInvalid, match="an expert of rank 3 has no FFN without the public one"):
        opened.layer(0)
    with open_weights(opened.ticket) as again:
        layer = again.low_rank_layer(1)
    assert [tuple(part.shape) for part in layer.ffn] == [(3, 16), (12, 3), (3, 16), (12, 3), (3, 12), (16, 3)]
    with unsigned(stock / "news", stock / "anchor") as full, pytest.raises(WeightsInvalid, match="has no factors"):
        full.weights.low_rank_layer(0)
    shown = inspect_package(tmp_path / "news")
    assert (shown["format"], shown["rank"]) == ("flexgate-expert/2", 3)


def test_a_package_of_full_experts_says_nothing_new(stock: Path) -> None:
    """Signatures of packages that were made before sizes were known go on being good."""
    said = json.loads((stock / "news/manifest.json").read_text())
    assert said["format"] == "flexgate-expert/1"
    assert not {"rank", "width"} & said.keys()


def test_what_was_measured_of_a_full_expert_is_not_said_of_a_smaller_one(
    stock: Path, tmp_path: Path, merge: Merge
) -> None:
    model = merge(stock / "anchor", stock / "news")
    record = model / "provenance/news.json"
    figure = {"name": "perplexity", "value": 3.5, "unit": "1", "on": "held-out texts"}
    record.write_text(json.dumps(json.loads(record.read_text()) | {"evaluation": [figure]}))
    assert len(extract_expert(model, "news", tmp_path / "whole").evaluation) == 1
    assert extract_expert(model, "news", tmp_path / "small", size=RANK).evaluation == ()


def test_a_package_of_rank_64_of_a_published_model_is_under_three_percent() -> None:
    """FlexOlmo-7B: hidden 4096, intermediate 11008."""
    architecture = replace(BaseArchitecture.of(ONE), hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    full, low = (package_bytes(architecture, "BF16", size) for size in (ExpertSize(), ExpertSize(rank=64)))
    assert low / full < 0.03
