"""Merging and extracting are each other's inverse, bit for bit, and refuse parts that do not belong together."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packagekit import ONE, bit_equal, make_package, statement, write_model
from transformers import AutoModelForCausalLM

from flexgate.experts.checkpoint import shards
from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.layout import bias_keys, expert_keys, router_keys, shared_keys
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.errors import (
    BaseMismatch,
    LayoutError,
    ManifestInvalid,
    MergeError,
    OutputRefused,
)
from flexgate.experts.io import stream, tensorfile
from flexgate.experts.package import merge as combination
from flexgate.experts.package.extract import extract_anchor, extract_expert
from flexgate.experts.package.files import WEIGHTS_NAME
from flexgate.experts.package.merge import combine
from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.verify import VerifiedPackage, open_package
from flexgate.experts.training.model import FlexOlmo

Merge = Callable[..., Path]


@pytest.fixture
def merge(tmp_path: Path) -> Iterator[Merge]:
    """Open packages and merge them into a new folder."""
    with ExitStack() as stack:

        def run(anchor: Path, *packages: Path, top_k: int = 2, shard_bytes: int = 10**9, name: str = "merged") -> Path:
            base = base_identity(anchor)
            verified = [
                stack.enter_context(open_package(path, base=base, trusted_keys=None, into=tmp_path / f"{name}-{index}"))
                for index, path in enumerate(packages)
            ]
            combine(anchor, verified, tmp_path / name, top_k=top_k, shard_bytes=shard_bytes)
            return tmp_path / name

        yield run


def same_tensors(one: Path, other: Path) -> None:
    (_, first), (_, second) = read_checkpoint(one), read_checkpoint(other)
    assert first.keys() == second.keys()
    assert all(bit_equal(first[key], second[key]) for key in first)


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [(False, False), (False, True), (True, True)])
def test_extracting_from_a_merge_gives_back_the_packages_byte_for_byte(
    biased: tuple[bool, bool], dtype: str, stock: Path, tmp_path: Path, merge: Merge
) -> None:
    write_model(tmp_path / "anchor", dtype=dtype)
    for name, bias, seed in (("one", biased[0], 1), ("two", biased[1], 2)):
        key = stock / "keys/acme.key"
        make_package(tmp_path / name, tmp_path / "anchor", expert=name, key=key, seed=seed, biased=bias)
    merged = merge(tmp_path / "anchor", tmp_path / "one", tmp_path / "two", shard_bytes=4000)
    for name in ("one", "two"):
        extract_expert(merged, name, tmp_path / f"{name}-again")
        same_files(tmp_path / name, tmp_path / f"{name}-again")
    assert base_identity(merged) == base_identity(tmp_path / "anchor")


@pytest.mark.parametrize("biased", [False, True])
def test_merging_what_was_extracted_gives_back_the_model_bit_for_bit(
    biased: bool, tmp_path: Path, merge: Merge
) -> None:
    four = replace(ONE, num_experts=4, num_experts_per_tok=2)
    write_model(tmp_path / "model", four, biased=biased, shard_bytes=5000)
    extract_anchor(tmp_path / "model", tmp_path / "anchor", shard_bytes=3000)
    for index in (1, 2, 3):
        extract_expert(tmp_path / "model", str(index), tmp_path / f"e{index}", statement=statement(f"e{index}"))
    merged = merge(tmp_path / "anchor", *(tmp_path / f"e{index}" for index in (1, 2, 3)))
    same_tensors(tmp_path / "model", merged)
    assert json.loads((merged / "config.json").read_text()) == json.loads((tmp_path / "model/config.json").read_text())


def test_the_order_of_packages_only_permutes_indices(stock: Path, tmp_path: Path, merge: Merge) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        make_package(tmp_path / name, stock / "anchor", expert=name, seed=seed, biased=name == "two")
    orders = (("one", "two", "three"), ("three", "one", "two"))
    models = [merge(stock / "anchor", *(tmp_path / n for n in order), name="-".join(order)) for order in orders]
    (architecture, first), (_, second) = (read_checkpoint(model) for model in models)
    assert all(bit_equal(first[key], second[key]) for key in shared_keys(architecture))
    order = [0, *(1 + orders[1].index(name) for name in orders[0])]
    for index, moved in enumerate(order):
        pairs = zip(expert_keys(architecture, index), expert_keys(architecture, moved), strict=True)
        assert all(bit_equal(first[a], second[b]) for a, b in pairs)
        for key in first.keys() - set(shared_keys(architecture)):
            if ".mlp.gate." in key:
                assert bit_equal(first[key][index : index + 1], second[key][moved : moved + 1])
    ids = [[entry["id"] for entry in json.loads((m / "flexgate.json").read_text())["experts"]] for m in models]
    assert ids == [["public", *order] for order in orders]


def test_a_merged_model_loads_in_transformers_with_equal_logits(stock: Path, tmp_path: Path, merge: Merge) -> None:
    make_package(tmp_path / "two", stock / "anchor", expert="two", seed=3)
    merged = merge(stock / "anchor", stock / "news", tmp_path / "two", shard_bytes=3000)
    tokens = torch.arange(24).view(2, 12)
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours = FlexOlmo.from_tensors(*read_checkpoint(merged))(tokens)
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=1e-5)


def test_a_merged_model_gated_to_one_owner_computes_what_its_pair_computes(
    stock: Path, tmp_path: Path, merge: Merge
) -> None:
    make_package(tmp_path / "two", stock / "anchor", expert="two", seed=3)
    both, pair = (
        merge(stock / "anchor", stock / "news", tmp_path / "two"),
        merge(stock / "anchor", tmp_path / "two", name="pair"),
    )
    tokens = torch.arange(20).view(2, 10)
    gate = torch.tensor([[True, False, True]]).expand(2, 3)
    with torch.no_grad():
        gated = FlexOlmo.from_tensors(*read_checkpoint(both))(tokens, gate)
        alone = FlexOlmo.from_tensors(*read_checkpoint(pair))(tokens)
    torch.testing.assert_close(gated, alone, atol=1e-5, rtol=1e-5)


def test_a_merge_records_who_made_every_index(stock: Path, merge: Merge) -> None:
    merged = merge(stock / "anchor", stock / "news")
    manifest = json.loads((merged / "flexgate.json").read_text())
    assert manifest["base_digest"] == base_identity(stock / "anchor").digest
    assert manifest["strictly_separable"] is True
    assert [(e["index"], e["id"], e["owner"], e["domain"]) for e in manifest["experts"]] == [
        (0, "public", "public", "the public anchor"),
        (1, "news", "acme", "news texts"),
    ]
    for suffix, name in ((".json", "manifest.json"), (".sig", "manifest.sig")):
        assert (merged / f"provenance/news{suffix}").read_bytes() == (stock / "news" / name).read_bytes()


def test_tokenizer_files_of_the_anchor_come_along_and_nothing_else(stock: Path, tmp_path: Path, merge: Merge) -> None:
    anchor = Path(shutil.copytree(stock / "anchor", tmp_path / "anchor"))
    (anchor / "tokenizer.json").write_text("{}")
    (anchor / "modeling_custom.py").write_text("")
    merged = merge(anchor, stock / "news")
    assert (merged / "tokenizer.json").read_text() == "{}"
    assert not (merged / "modeling_custom.py").exists()


def flip(path: Path, position: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("key", [*shared_keys(ONE), *expert_keys(ONE, 0), *router_keys(ONE)])
def test_one_flipped_bit_in_a_shared_tensor_is_refused_by_its_name(
    key: str, stock: Path, tmp_path: Path, merge: Merge, base_of_news: VerifiedPackage
) -> None:
    anchor = Path(shutil.copytree(stock / "anchor", tmp_path / "anchor"))
    weights = anchor / "model.safetensors"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    _, end = json.loads(whole[8:start])[key]["data_offsets"]
    flip(weights, start + end - 1)
    message = rf"another base model: shared tensor {key.replace('[', '.')}(\[0\])? differs"
    with pytest.raises(BaseMismatch, match=message):
        merge(anchor, stock / "news")
    with pytest.raises(MergeError, match=message):
        combine(anchor, [base_of_news], tmp_path / "merged", top_k=2)
    assert not [*tmp_path.glob("*merged*")], "what was written before the difference was found must not stay"


def test_what_an_interrupted_merge_wrote_is_compared_too(
    stock: Path, tmp_path: Path, base_of_news: VerifiedPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its anchor was put right in between, by somebody who kept the file's times."""
    anchor = Path(shutil.copytree(stock / "anchor", tmp_path / "anchor"))
    weights = anchor / "model.safetensors"
    whole, times = weights.read_bytes(), weights.stat()
    start = 8 + int.from_bytes(whole[:8], "little")
    begin, end = json.loads(whole[8:start])["lm_head.weight"]["data_offsets"]
    flip(weights, start + begin)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(stream, "RECORD_EVERY", 1)
    with pytest.raises(Cut):
        combine(anchor, [base_of_news], tmp_path / "merged", top_k=2, progress=cut_after(end - begin))
    assert (tmp_path / ".merged.partial" / stream.JOURNAL).exists()
    with weights.open("r+b") as file:
        file.write(whole)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(MergeError, match=r"shared tensor lm_head\.weight differs"):
        combine(anchor, [base_of_news], tmp_path / "merged", top_k=2)
    assert not [*tmp_path.glob("*merged*")]
    combine(anchor, [base_of_news], tmp_path / "merged", top_k=2)


def test_a_public_bias_is_judged_by_what_was_written(
    tmp_path: Path, base_of_news: VerifiedPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "anchor", ONE, biased=True)
    weights = tmp_path / "anchor" / "model.safetensors"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    begin, _ = json.loads(whole[8:start])[bias_keys(ONE)[0]]["data_offsets"]
    assert base_identity(tmp_path / "anchor") == base_of_news.manifest.base.identity()
    flip(weights, start + begin)

    def zero_once_it_is_written(*args: Any, **kwargs: Any) -> None:
        shards.write_model(*args, **kwargs)
        weights.write_bytes(whole)

    monkeypatch.setattr(combination, "write_model", zero_once_it_is_written)
    with pytest.raises(MergeError, match=re.escape(f"shared tensor {bias_keys(ONE)[0]}[0] differs")):
        combine(tmp_path / "anchor", [base_of_news], tmp_path / "merged", top_k=2)


def test_a_record_that_fails_stops_the_writing_and_says_why(
    stock: Path, tmp_path: Path, base_of_news: VerifiedPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream, "RECORD_EVERY", 1)
    with monkeypatch.context() as patched:
        patched.setattr(stream, "sync", full)
        with pytest.raises(OutputRefused, match="No space left on device; run it again"):
            combine(stock / "anchor", [base_of_news], tmp_path / "merged", top_k=2)
    combine(stock / "anchor", [base_of_news], tmp_path / "merged", top_k=2)
    assert not [*(tmp_path / "merged").glob("journal*")]


def test_a_package_for_a_model_of_other_numbers_is_refused_before_anything_is_written(
    tmp_path: Path, base_of_news: VerifiedPackage
) -> None:
    write_model(tmp_path / "anchor", replace(ONE, num_hidden_layers=ONE.num_hidden_layers + 1))
    with pytest.raises(MergeError, match="another base model: num_hidden_layers is"):
        combine(tmp_path / "anchor", [base_of_news], tmp_path / "merged", top_k=2, progress=cut_after(0))
    assert not [*tmp_path.glob("*merged*")]


def test_the_base_that_is_compared_is_the_one_that_was_written(
    stock: Path, tmp_path: Path, base_of_news: VerifiedPackage
) -> None:
    anchor = Path(shutil.copytree(stock / "anchor", tmp_path / "anchor"))
    weights = anchor / "model.safetensors"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    begin, _ = json.loads(whole[8:start])["lm_head.weight"]["data_offsets"]

    def changed_once_the_first_is_written(_count: int) -> None:
        weights.write_bytes(whole)

    flip(weights, start + begin)
    with pytest.raises(MergeError, match=r"shared tensor lm_head\.weight differs"):
        combine(anchor, [base_of_news], tmp_path / "merged", top_k=2, progress=changed_once_the_first_is_written)
    assert not [*tmp_path.glob("*merged*")]


@pytest.fixture(scope="module")
def base_of_news(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifiedPackage]:
    """The package, verified against the right anchor."""
    into = tmp_path_factory.mktemp("verified") / "news"
    with open_package(
        stock / "news",
        base=base_identity(stock / "anchor"),
        trusted_keys=TrustedKeys.from_directory(stock / "keys"),
        into=into,
    ) as package:
        yield package


def test_impossible_merges_are_refused_in_words(stock: Path, merge: Merge, base_of_news: VerifiedPackage) -> None:
    anchor, news = stock / "anchor", stock / "news"
    with pytest.raises(MergeError, match="two packages have the id 'news'"):
        merge(anchor, news, news, name="a")
    with pytest.raises(MergeError, match=r"top_k is 3; with 2 experts it must be 1 to 2"):
        merge(anchor, news, top_k=3, name="b")
    with pytest.raises(MergeError, match="nothing to merge"):
        merge(anchor, name="c")
    merged = merge(anchor, news, name="d")
    with pytest.raises(MergeError, match="has 2 experts; extract its anchor"):
        merge(merged, news, name="e")
    with pytest.raises(OutputRefused, match="exists already"):
        combine(anchor, [base_of_news], merged, top_k=2)


def test_an_expert_that_nobody_vouches_for_needs_a_statement(tmp_path: Path) -> None:
    write_model(tmp_path / "pair", replace(ONE, num_experts=2, num_experts_per_tok=2))
    with pytest.raises(ManifestInvalid, match="does not record who made expert 'expert-1': give a statement"):
        extract_expert(tmp_path / "pair", "1", tmp_path / "e")
    with pytest.raises(LayoutError, match="has no expert 'law'; it has public, expert-1"):
        extract_expert(tmp_path / "pair", "law", tmp_path / "e", statement=statement("law"))
    with pytest.raises(LayoutError, match="'public' is the public anchor"):
        extract_expert(tmp_path / "pair", "public", tmp_path / "e", statement=statement("law"))
    assert not (tmp_path / "e").exists()


class Cut(Exception):
    """The process is gone."""


def cut_after(count: int) -> Callable[[int], None]:
    """Progress that raises once ``count`` bytes were reported."""
    seen = 0

    def progress(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        if seen > count:
            raise Cut

    return progress


def test_an_interrupted_extraction_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", 100)
    monkeypatch.setattr(tensorfile, "CHUNK", 100)
    pair = replace(ONE, num_experts=2, num_experts_per_tok=2)
    write_model(tmp_path / "pair", pair)
    extract_expert(tmp_path / "pair", "1", tmp_path / "whole", statement=statement("news"))
    monkeypatch.setattr(stream, "RECORD_EVERY", 1)
    kept = set()
    for stop in range(1000, 60_000, 1700):
        try:
            extract_expert(
                tmp_path / "pair", "1", tmp_path / "cut", statement=statement("news"), progress=cut_after(stop)
            )
        except Cut:
            assert not (tmp_path / "cut").exists()
            journal = tmp_path / ".cut.partial/journal.json"
            kept.add(json.loads(journal.read_text())["files"][WEIGHTS_NAME] if journal.exists() else 0)
            continue
        break
    assert len(kept) >= 3
    same_files(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / ".cut.partial").exists()


def test_an_interrupted_merge_writes_no_finished_shard_again(
    stock: Path, tmp_path: Path, base_of_news: VerifiedPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    combine(stock / "anchor", [base_of_news], tmp_path / "whole", top_k=2, shard_bytes=4000)
    monkeypatch.setattr(stream, "RECORD_EVERY", 1)
    with pytest.raises(Cut):
        combine(
            stock / "anchor",
            [base_of_news],
            tmp_path / "cut",
            top_k=2,
            shard_bytes=4000,
            progress=cut_after(9000),
        )
    first = min((tmp_path / ".cut.partial").glob("*.safetensors"))
    written = first.stat().st_mtime_ns
    combine(stock / "anchor", [base_of_news], tmp_path / "cut", top_k=2, shard_bytes=4000)
    assert (tmp_path / "cut" / first.name).stat().st_mtime_ns == written
    same_tensors(tmp_path / "whole", tmp_path / "cut")
