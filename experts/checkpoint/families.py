"""How many experts each layer of a mixture has, by the ``model_type`` of its ``config.json``.

This is more than what is served: an ownership file can be written for a model of every family here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Final, Literal

from flexgate.experts.errors import LayoutError

MAX_LAYERS: Final = 1024
MAX_EXPERTS: Final = 512
"""In one layer."""


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router does with its logits. Softmax routers choose by probabilities over the allowed experts; sigmoid
    ones by each expert's sigmoid, corrected, within the best groups of experts.

    Attributes:
        renormalize: whether the chosen weights are divided by their sum; None where ``norm_topk_prob`` says it.
        groups: into how many groups experts fall, by their place; of sigmoid routers.
        open_groups: of how many groups a token may have experts.
        scale: what the weights are multiplied with in the end.
    """

    renormalize: bool | None = None
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    open_groups: int = 1
    scale: float = 1.0

    @property
    def said(self) -> str:
        """In words, for the documentation."""
        said = {True: "divided by their sum", False: "as they are", None: "divided by their sum if `norm_topk_prob`"}
        scale = ", times `routed_scaling_factor`" if self.scoring == "sigmoid" else ""
        return said[self.renormalize] + scale

    @property
    def facts(self) -> list[Any]:
        """What a rank reports of it."""
        return list(astuple(self))

    def of(self, config: Mapping[str, Any]) -> Routing:
        """As a ``config.json`` says it; raises ``LayoutError`` for groups that its experts do not fall into."""
        known = self.renormalize is not None
        routing = self if known else replace(self, renormalize=bool(config["norm_topk_prob"]))
        if self.scoring == "softmax":
            return routing
        scale = config.get("routed_scaling_factor", 1.0)
        if not isinstance(scale, float):
            raise LayoutError(f"config.json: routed_scaling_factor is {scale!r:.40}, expected a number with a point")
        groups, open_groups = _groups(config)
        return replace(routing, groups=groups, open_groups=open_groups, scale=scale)


def _groups(config: Mapping[str, Any]) -> tuple[int, int]:
    experts, picks = config["n_routed_experts"], config["num_experts_per_tok"]
    groups, chosen = (_size(name, config.get(name, 1), MAX_EXPERTS) for name in ("n_group", "topk_group"))
    if groups > 1 and (experts % groups or experts // groups < 2):
        raise LayoutError(f"config.json: n_group is {groups}, and {experts} experts make no such groups of two or more")
    if chosen > groups or picks > chosen * (experts // groups):
        raise LayoutError(
            f"config.json: topk_group is {chosen}, which of {groups} groups gives no {picks} experts per token"
        )
    return groups, chosen


@dataclass(frozen=True, slots=True)
class Family:
    """Where ``config.json`` says what has experts.

    Attributes:
        experts: the fields that may hold the number of experts of a layer; transformers reads either.
        dense_layers: whether ``decoder_sparse_step`` and ``mlp_only_layers`` leave layers without experts.
        dense_first: whether the first ``first_k_dense_replace`` layers have none.
        routing: what the router of a layer does.
    """

    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    dense_layers: bool = False
    dense_first: bool = False
    routing: Routing = Routing()


FAMILIES: Final[Mapping[str, Family]] = {
    "flex_olmo": Family(),
    "olmoe": Family(),
    "mixtral": Family(routing=Routing(renormalize=True)),
    "qwen2_moe": Family(dense_layers=True),
    "qwen3_moe": Family(dense_layers=True),
    "glm4_moe": Family(("n_routed_experts",), dense_first=True, routing=Routing(scoring="sigmoid")),
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
    step, dense = _dense_layers(config) if family.dense_layers else (1, ())
    if family.dense_first:
        dense = range(_count("first_k_dense_replace", config.get("first_k_dense_replace", 1), layers))
    counts = tuple(0 if layer in dense or (layer + 1) % step else experts for layer in range(layers))
    if not any(counts):
        fields = "first_k_dense_replace" if family.dense_first else "decoder_sparse_step and mlp_only_layers"
        raise LayoutError(f"config.json leaves no layer with experts, by {fields}")
    return counts


def _dense_layers(config: Mapping[str, Any]) -> tuple[int, Collection[int]]:
    """Every how many layers one has experts, and the layers that have none all the same; transformers' defaults."""
    step = _size("decoder_sparse_step", config.get("decoder_sparse_step", 1), MAX_LAYERS)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise LayoutError(f"config.json: mlp_only_layers is {dense!r:.40}, expected a list of layers")
    return step, dense


def _count(name: str, value: Any, most: int) -> int:
    if not (type(value) is int and 0 <= value <= most):
        raise LayoutError(f"config.json: {name} is {value!r:.40}, expected 0 to {most}")
    return value


def _size(name: str, value: Any, most: int) -> int:
    if not (type(value) is int and 1 <= value <= most):
        raise LayoutError(f"config.json: {name} is {value!r:.40}, expected 1 to {most}")
    return value
