"""The kinds of models that a server loads: what their ``config.json`` may say, and how they lie on disk.

A further kind is an entry here, its class in `flexgate.server.engine.seam.models`, what its router does in `families`,
and a case of the test that compares it with transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flexgate.experts.checkpoint import configuration, layout
from flexgate.experts.checkpoint.configuration import Fields
from flexgate.experts.checkpoint.families import Routing, experts_per_layer, read_family
from flexgate.experts.checkpoint.layout import EXPERT_KEYS, ROUTER_KEY, Architecture, Layout
from flexgate.experts.errors import LayoutError

Shapes = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class MixtureNumbers(Architecture):
    """The same of models that have more of them.

    Attributes:
        head_dim: None where heads share the hidden size evenly.
        dense_size: intermediate size of a layer without experts.
        shared_size: of a layer's expert outside of the router.
    """

    head_dim: int | None = None
    dense_size: int | None = None
    shared_size: int | None = None

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or super().head_size

    @property
    def sizes(self) -> dict[str, int]:
        """The shape letters with their values."""
        return {**super().sizes, "A": self.head_size, "D": self.dense_size or 0, "S": self.shared_size or 0, "1": 1}


@dataclass(frozen=True, slots=True)
class Served:
    """One kind of models.

    Attributes:
        architecture: what ``config.json`` says in ``architectures``.
        fields: what it may say.
        layout: the tensors.
        example: a published model of this kind.
        packages: whether there are expert packages for it: only then an engine has slots for more.
        eager_alone: whether it was tried only without torch.compile, and with vLLM's kernels.
    """

    architecture: str
    fields: Fields
    layout: Layout
    example: str
    packages: bool = False
    eager_alone: bool = False


def _layer(**more: Shapes) -> dict[str, tuple[str, ...]]:
    """A layer with norms before attention and FFN; ``more`` stands below ``self_attn``."""
    return {
        **_below("self_attn", {"q_proj": ("Q", "H"), "k_proj": ("K", "H"), "v_proj": ("K", "H"), "o_proj": ("H", "Q")}),
        **{f"model.layers.{{layer}}.{name}.weight": ("H",) for name in ("input_layernorm", "post_attention_layernorm")},
        **{name: shape for kind, shapes in more.items() for name, shape in _below("self_attn", shapes, kind).items()},
    }


def _below(module: str, shapes: Shapes, kind: str = "weight") -> dict[str, tuple[str, ...]]:
    return {f"model.layers.{{layer}}.{module}.{name}.{kind}": shape for name, shape in shapes.items()}


def _ffn(letter: str) -> dict[str, tuple[str, ...]]:
    return {"gate_proj": (letter, "H"), "up_proj": (letter, "H"), "down_proj": ("H", letter)}


EXPERTS: Final[Mapping[str, tuple[str, ...]]] = {"num_experts": ("num_experts", "num_local_experts")}

OLMOE: Final = Served(
    architecture="OlmoeForCausalLM",
    fields=Fields(
        "olmoe",
        "an OLMoE model",
        one_value={
            "architectures": ["OlmoeForCausalLM"],
            "hidden_act": "silu",
            # vLLM's class computes these, whatever config.json says.
            "attention_bias": False,
            "clip_qkv": None,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
        },
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
        rope_theta=10000.0,
        names=EXPERTS,
    ),
    layout=Layout(_layer(weight={"q_norm": ("Q",), "k_norm": ("K",)}), EXPERT_KEYS, ROUTER_KEY),
    example="OLMoE-1B-7B-0924",
)
MIXTRAL: Final = Served(
    architecture="MixtralForCausalLM",
    fields=Fields(
        "mixtral",
        "a Mixtral model",
        one_value={
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": "silu",
            "sliding_window": None,
            # Of the configuration of a Llama model that mergekit has made a Mixtral model's of.
            "attention_bias": False,
            "mlp_bias": False,
        },
        defaults={"max_position_embeddings": 4096 * 32, "rms_norm_eps": 1e-05, "norm_topk_prob": True},
        rope_theta=1000000.0,
        numbers=MixtureNumbers,
        names={**EXPERTS, "norm_topk_prob": (), "dense_size": (), "shared_size": ()},
        no_effect={
            "router_jitter_noise": "a number with a point, such as 1.0",  # in training alone
            "pretraining_tp": "a whole number that is not negative",  # likewise, of Llama
        },
    ),
    layout=Layout(
        _layer(),
        _below("block_sparse_moe.experts.{expert}", {"w1": ("F", "H"), "w2": ("H", "F"), "w3": ("F", "H")}),
        "model.layers.{layer}.block_sparse_moe.gate.weight",
    ),
    example="Mixtral-8x7B-v0.1, and mixtures that mergekit makes of Mistral and Llama models",
)
QWEN_ONE_VALUE: Final[Mapping[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}
QWEN_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    **EXPERTS,
    "intermediate_size": ("moe_intermediate_size",),
    "dense_size": ("intermediate_size",),
}
QWEN_NO_EFFECT: Final[Mapping[str, str]] = {
    "decoder_sparse_step": "a whole number that is not negative",  # read by `families`
    "mlp_only_layers": "a list of layers",  # likewise
    "sliding_window": "a whole number that is not negative",  # of no window
    "max_window_layers": "a whole number that is not negative",
    "layer_types": "full_attention in every layer",
}
QWEN3_MOE: Final = Served(
    architecture="Qwen3MoeForCausalLM",
    fields=Fields(
        "qwen3_moe",
        "a Qwen3-MoE model",
        # vLLM's class has biases on queries, keys and values, where transformers has one on the output, too.
        one_value={"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, **QWEN_ONE_VALUE},
        defaults={"max_position_embeddings": 32768},
        rope_theta=10000.0,
        numbers=MixtureNumbers,
        names={**QWEN_NAMES, "shared_size": ()},
        no_effect=QWEN_NO_EFFECT,
    ),
    layout=Layout(
        _layer(weight={"q_norm": ("A",), "k_norm": ("A",)}),
        EXPERT_KEYS,
        ROUTER_KEY,
        dense=_below("mlp", _ffn("D")),
    ),
    example="Qwen3-30B-A3B",
)
QWEN2_MOE: Final = Served(
    architecture="Qwen2MoeForCausalLM",
    fields=Fields(
        "qwen2_moe",
        "a Qwen2-MoE model",
        one_value={"architectures": ["Qwen2MoeForCausalLM"], "qkv_bias": True, **QWEN_ONE_VALUE},
        defaults={"max_position_embeddings": 32768},
        rope_theta=10000.0,
        numbers=MixtureNumbers,
        names={**QWEN_NAMES, "shared_size": ("shared_expert_intermediate_size",), "head_dim": ()},
        no_effect=QWEN_NO_EFFECT,
    ),
    layout=Layout(
        _layer(bias={"q_proj": ("Q",), "k_proj": ("K",), "v_proj": ("K",)}),
        EXPERT_KEYS,
        ROUTER_KEY,
        shared={**_below("mlp.shared_expert", _ffn("S")), **_below("mlp", {"shared_expert_gate": ("1", "H")})},
        dense=_below("mlp", _ffn("D")),
    ),
    example="Qwen1.5-MoE-A2.7B",
)

FURTHER_LAYERS: Final = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many layers after the last predict further tokens; vLLM's class does not load them."""
GLM4_MOE: Final = Served(
    architecture="Glm4MoeForCausalLM",
    fields=Fields(
        "glm4_moe",
        "a GLM-4-MoE model",
        one_value={
            "architectures": ["Glm4MoeForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": True,
            "use_qk_norm": False,
            "n_shared_experts": 1,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
        },
        defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "norm_topk_prob": True},
        rope_theta=10000.0,
        numbers=MixtureNumbers,
        names={**QWEN_NAMES, "num_experts": ("n_routed_experts",), "shared_size": ("moe_intermediate_size",)},
        no_effect={  # read by `families`
            "first_k_dense_replace": "a whole number that is not negative",
            **dict.fromkeys(FURTHER_LAYERS, "a whole number that is not negative"),
            "n_group": "a whole number that is not negative",
            "topk_group": "a whole number that is not negative",
            "routed_scaling_factor": "a positive number with a point, such as 1.0",
        },
        needed=frozenset({"head_dim", "attention_bias"}),
    ),
    layout=Layout(
        _layer(bias={"q_proj": ("Q",), "k_proj": ("K",), "v_proj": ("K",)}),
        EXPERT_KEYS,
        ROUTER_KEY,
        shared={
            **_below("mlp.shared_experts", _ffn("S")),
            "model.layers.{layer}.mlp.gate.e_score_correction_bias": ("E",),
        },
        dense=_below("mlp", _ffn("D")),
    ),
    example="GLM-4.5-Air",
    eager_alone=True,
)

SERVED: Final[Mapping[str, Served]] = {
    "flex_olmo": Served(
        architecture="FlexOlmoForCausalLM",
        fields=configuration.FLEX_OLMO,
        layout=layout.FLEX_OLMO,
        example="FlexOlmo-7x7B-1T, BAR-5x7B",
        packages=True,
    ),
    **{kind.fields.model_type: kind for kind in (OLMOE, MIXTRAL, QWEN3_MOE, QWEN2_MOE, GLM4_MOE)},
}
"""By ``model_type``."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a ``config.json`` says.

    Attributes:
        experts_L: how many experts each layer has.
        routing: what the router of each layer does.
        further_layers: how many layers after the last may lie in the checkpoint, and are not loaded.
    """

    kind: Served
    numbers: Architecture
    experts_L: tuple[int, ...]
    routing: Routing
    further_layers: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor without optional ones."""
        return layout.expected_shapes(self.numbers, self.kind.layout, self.experts_L)


def read_served(config: Mapping[str, Any]) -> Described:
    """What a ``config.json`` says of a model that can be served.

    Raises:
        LayoutError: it is of no kind that was tried, or says what this kind does not compute.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in SERVED:
        raise LayoutError(
            f"config.json names model_type {model_type!r:.40}, and flexgate serves {', '.join(SERVED)}: "
            "no other was tried"
        )
    kind = SERVED[model_type]
    numbers = configuration.read_architecture(config, kind.fields)
    if config.get("architectures") is None:
        raise LayoutError(f"config.json: architectures is missing, expected {[kind.architecture]!r}")
    routing = read_family(config).routing.of({**config, "norm_topk_prob": numbers.norm_topk_prob})
    further = max((config.get(name) or 0 for name in FURTHER_LAYERS if name in kind.fields.no_effect), default=0)
    return Described(kind, numbers, experts_per_layer(config), routing, further)
