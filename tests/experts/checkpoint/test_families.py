"""How many experts each layer has is what transformers builds."""

from typing import Any

import pytest
from torch import device
from transformers import AutoConfig, AutoModelForCausalLM

from flexgate.experts.checkpoint.families import FAMILIES, MAX_EXPERTS, experts_per_layer
from flexgate.experts.errors import LayoutError
from flexgate.kernels import gated_topk

SIZES: dict[str, Any] = {
    "num_hidden_layers": 7,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 31,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
DENSE = [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0, 3, 99]}, {"mlp_only_layers": None}]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dense", DENSE, ids=str)
def test_a_layer_has_the_experts_that_transformers_builds(model_type: str, dense: dict[str, Any]) -> None:
    options = dense if FAMILIES[model_type].dense_layers else {}
    if FAMILIES[model_type].dense_first:
        options = {"first_k_dense_replace": len(dense) * 2} if dense else {}
    name = {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts"}.get(model_type, "num_experts")
    config = AutoConfig.for_model(model_type, **SIZES, **options, **{name: 6, "num_experts_per_tok": 2})
    with device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = [
        getattr(layer.mlp, "num_experts", 0) or getattr(getattr(layer.mlp, "experts", None), "num_experts", 0)
        for layer in model.model.layers
    ]
    assert list(experts_per_layer(config.to_dict())) == built
    assert max(built) == 6


CONFIG = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 8}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (
        {"model_type": "llama"},
        "names model_type 'llama', expected one of flex_olmo, olmoe, mixtral, qwen2_moe, qwen3_moe, glm4_moe",
    ),
    "no kind of model": ({"model_type": ["olmoe"]}, r"names model_type \['olmoe'\], expected one of"),
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers is None, expected 1 to 1024"),
    "no number of layers": ({"num_hidden_layers": True}, "num_hidden_layers is True, expected 1 to 1024"),
    "more experts than are routed": ({"num_experts": 513}, "num_experts is 513, expected 1 to 512"),
    "no experts": ({"num_experts": 0}, "num_experts is 0, expected 1 to 512"),
    "two numbers": (
        {"num_local_experts": 4},
        "has num_experts 8 and num_local_experts 4, expected one number of experts",
    ),
    "no step": ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected 1 to 1024"),
    "no list of layers": ({"mlp_only_layers": "1"}, "mlp_only_layers is '1', expected a list of layers"),
    "no mixture": ({"mlp_only_layers": [0, 1, 2, 3]}, "leaves no layer with experts"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_a_configuration_that_says_no_number_of_experts_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LayoutError, match=sentence):
        experts_per_layer(CONFIG | changes)


def test_a_configuration_without_experts_is_refused() -> None:
    with pytest.raises(LayoutError, match="has no num_experts, expected one number of experts"):
        experts_per_layer({"model_type": "olmoe", "num_hidden_layers": 2})


def test_a_layer_has_as_many_experts_as_can_be_routed() -> None:
    assert gated_topk.MAX_EXPERTS == MAX_EXPERTS
