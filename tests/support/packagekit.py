"""Small anchors, merged models and expert packages on disk, random but seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.layout import (
    EXPERT_KEYS,
    Architecture,
    bias_keys,
    expected_shapes,
    write_checkpoint,
)
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.io.tensorfile import DTYPES
from flexgate.experts.package.manifest import Manifest, Statement, Training
from flexgate.experts.package.size import FACTOR_KEYS, FULL, PROJECTIONS, WHOLE_KEY, ExpertSize
from flexgate.experts.package.weights import BIAS_KEY, ROW_KEY, ExpertLayer, Factors, LowRankLayer, package_shapes
from flexgate.experts.package.write import write_package

ONE = Architecture(31, 16, 12, 2, 2, 2, num_experts=1, num_experts_per_tok=1)
TWO = replace(ONE, num_experts=2, num_experts_per_tok=2)
Tensors = dict[str, torch.Tensor]
Router = Literal["own", "joint", "unknown"]


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> Tensors:
    """Normal values of deviation 0.2; biases at most zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}
    return {name: -tensor.abs() if name.endswith(".bias") else tensor for name, tensor in tensors.items()}


def write_model(
    directory: Path,
    architecture: Architecture = ONE,
    *,
    seed: int = 0,
    dtype: str = "float32",
    biased: bool = False,
    shard_bytes: int | None = None,
) -> Tensors:
    """A checkpoint of random tensors; with a bias, the public one is zero."""
    shapes = expected_shapes(architecture)
    if biased:
        shapes |= dict.fromkeys(bias_keys(architecture), (architecture.num_experts,))
    tensors = random_tensors(shapes, seed, getattr(torch, dtype))
    for key in bias_keys(architecture) if biased else ():
        tensors[key][0] = 0.0
    write_checkpoint(
        directory,
        architecture,
        tensors,
        dtype=getattr(torch, dtype),
        eos_token_id=0,
        pad_token_id=1,
        shard_bytes=shard_bytes,
    )
    return tensors


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits: tells 0.0 from -0.0 and NaN from NaN of another payload."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def statement(expert: str, owner: str = "acme", version: int = 1, router: Router = "own") -> Statement:
    """What an owner writes."""
    training = Training(data="random", router=router)
    return Statement(id=expert, version=version, owner=owner, domain=f"{expert} texts", training=training)


def make_package(
    target: Path,
    anchor: Path,
    *,
    expert: str = "news",
    owner: str = "acme",
    key: Path | None = None,
    seed: int = 7,
    biased: bool = False,
    version: int = 1,
    router: Router = "own",
    size: ExpertSize = FULL,
) -> tuple[Manifest, Tensors]:
    """A package of random tensors for the base model of ``anchor``."""
    base = base_identity(anchor)
    tensors = random_tensors(package_shapes(base.architecture, biased=biased, size=size), seed, DTYPES[base.dtype])
    said = statement(expert, owner, version, router)
    return write_package(target, said, base, layers_of(tensors), key=key, size=size), tensors


def layers_of(tensors: Tensors) -> list[ExpertLayer | LowRankLayer]:
    """A package's tensors by layer."""
    count = 1 + max(int(name.split(".")[1]) for name in tensors)
    return [_layer_of(tensors, layer) for layer in range(count)]


def _layer_of(tensors: Tensors, layer: int) -> ExpertLayer | LowRankLayer:
    row, bias = tensors[ROW_KEY.format(layer=layer)], tensors.get(BIAS_KEY.format(layer=layer))
    whole = [tensors.get((WHOLE_KEY % name).format(layer=layer)) for name in PROJECTIONS]
    if whole[0] is not None:
        return ExpertLayer(*whole, row, bias)
    pairs = [[tensors[(key % name).format(layer=layer)] for key in FACTOR_KEYS] for name in PROJECTIONS]
    return LowRankLayer(*(Factors(*pair) for pair in pairs), row, bias)


def ffn(model: Path, expert: int, layer: int = 0) -> list[torch.Tensor]:
    """An expert's three matrices."""
    _, tensors = read_checkpoint(model)
    return [tensors[key.format(layer=layer, expert=expert)] for key in EXPERT_KEYS]
