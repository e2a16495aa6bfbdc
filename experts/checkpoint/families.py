"""How many experts each layer of a mixture has, by the ``model_type`` of its ``config.json``.

This is more than what is served: an ownership file can be written for a model of every family here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from flexgate.experts.errors import LayoutError

MAX_LAYERS: Final = 1024
MAX_EXPERTS: Final = 512
"""In one layer."""


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router does with its logits; everything else is the same for all: softmax over the allowed, then top-k.

    Attributes:
        renormalize: whether the chosen weights are divided by their sum; None where ``norm_topk_prob`` says it.
    """

    renormalize: bool | None = None

    @property
    def said(self) -> str:
        """In words, for the documentation."""
        said = {True: "divided by their sum", False: "as they are", None: "divided by their sum if `norm_topk_prob`"}
        return said[self.renormalize]

    def of(self, config: Mapping[str, Any]) -> Routing:
        """As a ``config.json`` says it."""
        return self if self.renormalize is not None else replace(self, renormalize=bool(config["norm_topk_prob"]))


@dataclass(frozen=True, slots=True)
class Family:
    """Where ``config.json`` says what has experts.

    Attributes:
        experts: the fields that may hold the number of experts of a layer; transformers reads either.
        dense_layers: whether ``decoder_sparse_step`` and ``mlp_only_layers`` leave layers without experts.
        shared_expert: whether every layer also has an expert outside the router, which no gate reaches.
        routing: what the router of a layer does.
    """

    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    dense_layers: bool = False
    shared_expert: bool = False
    routing: Routing = Routing()


FAMILIES: Final[Mapping[str, Family]] = {
    "flex_olmo": Family(),
    "olmoe": Family(),
    "mixtral": Family(routing=Routing(renormalize=True)),
    "qwen2_moe": Family(dense_layers=True, shared_expert=True),
    "qwen3_moe": Family(dense_layers=True),
}


def read_family(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``; raises ``LayoutError`` for one that is not in the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise LayoutError(f"config.json names model_type {model_type!r:.40}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def experts_per_layer(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of experts of each layer, from layer 0 on; 0 for a layer without.

    Raises:
        LayoutError: naming the field that is missing or wrong.
    """
    family = read_family(config)
    layers = _size("num_hidden_layers", config.get("num_hidden_layers"), MAX_LAYERS)
    given = {name: _size(name, config[name], MAX_EXPERTS) for name in family.experts if name in config}
    if len({*given.values()}) != 1:
        said = " and ".join(f"{name} {count}" for name, count in given.items()) or f"no {family.experts[0]}"
        raise LayoutError(f"config.json has {said}, expected one number of experts")
    experts = next(iter(given.values()))
    step, dense = _dense_layers(config) if family.dense_layers else (1, [])
    counts = tuple(0 if layer in dense or (layer + 1) % step else experts for layer in range(layers))
    if not any(counts):
        raise LayoutError("config.json leaves no layer with experts, by decoder_sparse_step and mlp_only_layers")
    return counts


def _dense_layers(config: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Every how many layers one has experts, and the layers that have none all the same; transformers' defaults."""
    step = _size("decoder_sparse_step", config.get("decoder_sparse_step", 1), MAX_LAYERS)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise LayoutError(f"config.json: mlp_only_layers is {dense!r:.40}, expected a list of layers")
    return step, dense


def _size(name: str, value: Any, most: int) -> int:
    if not (type(value) is int and 1 <= value <= most):
        raise LayoutError(f"config.json: {name} is {value!r:.40}, expected 1 to {most}")
    return value
