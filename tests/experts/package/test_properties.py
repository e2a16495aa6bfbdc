"""For any small model: merging and extracting are inverse, order permutes, and one flipped bit is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packagekit import bit_equal, make_package, statement, write_model

from flexgate.experts.checkpoint.base import BaseIdentity, base_identity
from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.errors import MergeError, PackageError
from flexgate.experts.package.extract import extract_anchor, extract_expert
from flexgate.experts.package.merge import combine
from flexgate.experts.package.signature import TrustedKeys
from flexgate.experts.package.size import FULL, ExpertSize
from flexgate.experts.package.verify import VerifiedPackage, open_package


@dataclass(frozen=True)
class Model:
    """What a random model is made of."""

    architecture: Architecture
    dtype: str
    biased: bool
    seed: int
    shard_bytes: int


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Sizes that are all different, so that a swapped axis shows."""
    heads = draw(st.sampled_from([1, 2]))
    architecture = Architecture(
        vocab_size=draw(st.integers(5, 30)),
        hidden_size=heads * 2 * draw(st.integers(1, 5)),
        intermediate_size=draw(st.integers(1, 13)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([1, heads])),
        num_experts=draw(st.integers(2, 5)),
        num_experts_per_tok=draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return Model(
        architecture, dtype, draw(st.booleans()), draw(st.integers(0, 99)), draw(st.sampled_from([300, 10**6]))
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(models(), st.randoms(use_true_random=False))
def test_extract_and_merge_are_inverse_and_order_permutes(
    tmp_path_factory: pytest.TempPathFactory, model: Model, random: Random
) -> None:
    root = tmp_path_factory.mktemp("property")
    write_model(
        root / "model",
        model.architecture,
        seed=model.seed,
        dtype=model.dtype,
        biased=model.biased,
        shard_bytes=model.shard_bytes,
    )
    indices = list(range(1, model.architecture.num_experts))
    extract_anchor(root / "model", root / "anchor", shard_bytes=model.shard_bytes)
    for index in indices:
        extract_expert(root / "model", str(index), root / f"e{index}", statement=statement(f"e{index}"))
    shuffled = random.sample(indices, len(indices))
    base = base_identity(root / "model")
    assert base == base_identity(root / "anchor")
    with ExitStack() as stack:
        opened = {
            index: stack.enter_context(
                open_package(root / f"e{index}", base=base, trusted_keys=None, into=root / f"copy{index}")
            )
            for index in indices
        }
        for name, order in (("again", indices), ("shuffled", shuffled)):
            parts = [opened[index] for index in order]
            top_k = model.architecture.num_experts_per_tok
            combine(root / "anchor", parts, root / name, top_k=top_k, shard_bytes=model.shard_bytes)
    _equal(root / "model", root / "again", [0, *indices])
    _equal(root / "model", root / "shuffled", [0, *shuffled])
    for index in indices:
        extract_expert(root / "shuffled", f"e{index}", root / f"back{index}")
        for path in (root / f"e{index}").iterdir():
            assert path.read_bytes() == (root / f"back{index}" / path.name).read_bytes()
    shutil.rmtree(root)


def _equal(one: Path, other: Path, order: list[int]) -> None:
    """``other``'s expert ``i`` is ``one``'s expert ``order[i]``, and the rest is the same."""
    (architecture, first), (moved, second) = read_checkpoint(one), read_checkpoint(other)
    assert architecture == moved
    assert first.keys() == second.keys()
    for key, value in second.items():
        if ".mlp.gate." in key:
            assert bit_equal(first[key][torch.tensor(order)], value)
        elif ".mlp.experts." in key:
            head, _, tail = key.partition(".experts.")
            number, _, name = tail.partition(".")
            assert bit_equal(first[f"{head}.experts.{order[int(number)]}.{name}"], value)
        else:
            assert bit_equal(first[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [FULL, ExpertSize(rank=3)], ids=str)
@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig", "expert.safetensors"])
def test_one_flipped_bit_anywhere_in_a_package_is_refused(
    name: str, size: ExpertSize, stock: Path, base: BaseIdentity, tmp_path: Path
) -> None:
    """Every byte of signature and header, and a sample of the rest, one random bit each."""
    trusted = TrustedKeys.from_directory(stock / "keys")
    package = tmp_path / "news"
    make_package(package, stock / "anchor", key=stock / "keys/acme.key", size=size)
    whole = (package / name).read_bytes()
    random = Random(name)
    header = 8 + int.from_bytes(whole[:8], "little") if name == "expert.safetensors" else len(whole)
    positions = [*range(min(header, 900)), *random.sample(range(len(whole)), min(400, len(whole)))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << random.randrange(8)
        (package / name).write_bytes(damaged)
        with pytest.raises(PackageError):
            open_package(package, base=base, trusted_keys=trusted, into=tmp_path / "copy")
    (package / name).write_bytes(whole)
    open_package(package, base=base, trusted_keys=trusted, into=tmp_path / "copy").close()


@pytest.mark.slow
def test_one_flipped_bit_anywhere_in_an_anchor_is_refused(stock: Path, base: BaseIdentity, tmp_path: Path) -> None:
    with open_package(stock / "news", base=base, trusted_keys=None, into=tmp_path / "copy") as news:
        anchor = Path(shutil.copytree(stock / "anchor", tmp_path / "anchor"))
        path = anchor / "model.safetensors"
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for position in Random(0).sample(range(start, len(whole)), 300):
            _refused(path, whole, position, anchor, news, tmp_path)


def _refused(path: Path, whole: bytes, position: int, anchor: Path, news: VerifiedPackage, tmp_path: Path) -> None:
    damaged = bytearray(whole)
    damaged[position] ^= 1 << position % 8
    path.write_bytes(damaged)
    start = 8 + int.from_bytes(whole[:8], "little")
    spans = {name: entry["data_offsets"] for name, entry in json.loads(whole[8:start]).items() if name[0] != "_"}
    name = next(name for name, (begin, end) in spans.items() if begin <= position - start < end)
    with pytest.raises(MergeError) as refusal:
        combine(anchor, [news], tmp_path / "merged", top_k=2)
    assert f"shared tensor {name}" in str(refusal.value)
    assert not (tmp_path / "merged").exists()
