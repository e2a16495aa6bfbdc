"""What is served is what vLLM's class computes; any other kind, or field, is refused before vLLM is loaded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from enginekit.checkpoints import assign_units, write_mixture
from mergekit_model import merged_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig

from flexgate.experts.checkpoint.families import FAMILIES
from flexgate.experts.checkpoint.served import SERVED, read_served
from flexgate.experts.errors import LayoutError
from flexgate.server.engine.frontend.checkpoint import CheckpointError, read_checkpoint
from flexgate.server.engine.frontend.launch import EngineSettings, plan

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
UNIT_LE = ([0, 1, 2], [2, 0, 1])
OTHERS = sorted(SERVED.keys() - {"flex_olmo"})


def sizes_of(model_type: str) -> dict[str, Any]:
    """`SIZES` as a kind's configuration calls them."""
    names = {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts"}
    experts = {names.get(model_type, "num_experts"): SIZES["num_experts"]}
    if model_type == "glm4_moe":
        experts |= {"head_dim": 32, "attention_bias": True, "num_mtp_layers": 0, "moe_intermediate_size": 16}
        experts |= {"first_k_dense_replace": 0}
    shared = {"shared_expert_intermediate_size": 16} if model_type == "qwen2_moe" else {}
    narrow = {"moe_intermediate_size": 16} if model_type.startswith("qwen") else {}
    return {name: size for name, size in SIZES.items() if name != "num_experts"} | experts | shared | narrow


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """As transformers writes it."""
    config = AutoConfig.for_model(model_type, **sizes_of(model_type))
    config.architectures = [SERVED[model_type].architecture]
    return json.loads(config.to_json_string()) | changes


@pytest.fixture(params=OTHERS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of each kind that may be spoiled."""
    return assign_units(
        write_mixture(tmp_path / "model", request.param, **sizes_of(request.param)), ("public", "a", "b"), UNIT_LE
    )


def test_every_kind_that_is_served_has_a_router_in_the_table_of_families() -> None:
    assert SERVED.keys() <= FAMILIES.keys()
    for model_type, kind in SERVED.items():
        assert kind.fields.model_type == model_type
        assert kind.fields.one_value["architectures"] == [kind.architecture]


@pytest.mark.parametrize("base", [LlamaConfig, MistralConfig])
def test_a_configuration_that_mergekit_writes_is_read(base: type[PretrainedConfig]) -> None:
    sizes = {name: size for name, size in SIZES.items() if not name.startswith("num_experts")}
    described = read_served(json.loads(merged_config(base(**sizes), 4).to_json_string()))
    assert described.kind is SERVED["mixtral"]
    assert (described.numbers.num_experts, described.numbers.num_experts_per_tok) == (4, 2)


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_configuration_that_transformers_writes_is_read(model_type: str) -> None:
    described = read_served(config_of(model_type))
    numbers = described.numbers
    assert described.kind is SERVED[model_type]
    assert (numbers.num_experts, numbers.num_experts_per_tok, numbers.hidden_size) == (3, 2, 32)


def test_a_whole_checkpoint_is_read(model: Path) -> None:
    checkpoint = read_checkpoint(model)
    assert checkpoint.ownership.unit_LE == tuple(map(bytes, UNIT_LE))
    assert plan(EngineSettings(model, enforce_eager=True)).table.total == 3


def refusal(model: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(model)
    return str(refused.value)


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, expected null"),
    ("olmoe", {"rms_norm_eps": 1e-06}, "rms_norm_eps is 1e-06, expected 1e-05"),
    ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    ("olmoe", {"attention_bias": True}, "attention_bias is True, expected False"),
    ("olmoe", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ("olmoe", {"architectures": ["MixtralForCausalLM"]}, "architectures is ['MixtralForCausalLM'], expected"),
    ("olmoe", {"architectures": None}, "architectures is None, expected ['OlmoeForCausalLM']"),
    ("olmoe", {"n_group": 2}, "has 'n_group', which is not a field of an OLMoE model: remove it"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096, expected null"),
    ("mixtral", {"attention_bias": True}, "attention_bias is True, expected False"),
    ("mixtral", {"mlp_bias": True}, "mlp_bias is True, expected False"),
    ("mixtral", {"norm_topk_prob": False}, "has 'norm_topk_prob', which is not a field of a Mixtral model: remove it"),
    ("mixtral", {"num_experts": 4}, "has num_experts 4 and num_local_experts 3, expected one number of experts"),
    ("mixtral", {"num_local_experts": 513}, "num_local_experts is 513, expected 1 to 512"),
    ("mixtral", {"head_dim": 0}, "head_dim is 0, expected 1 to"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias is True, expected False"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True, expected False"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected 1 to 1024"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "leaves no layer with experts"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "'shared_expert_intermediate_size', which is not a field"),
    ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is False, expected True"),
    ("qwen2_moe", {"head_dim": 64}, "head_dim is 64, expected 32"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"]}, "expected full_attention in every layer"),
    ("glm4_moe", {"use_qk_norm": True}, "use_qk_norm is True, expected False"),
    ("glm4_moe", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, expected a whole number"),
    ("glm4_moe", {"n_shared_experts": 2}, "n_shared_experts is 2, expected 1"),
    ("glm4_moe", {"attention_bias": None}, "attention_bias is None, expected True"),
    ("glm4_moe", {"head_dim": None}, "config.json has no head_dim, which a GLM-4-MoE model needs"),
    ("glm4_moe", {"partial_rotary_factor": 1.0}, "partial_rotary_factor is 1.0, expected 0.5"),
    ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "only the default kind is read"),
    ("olmoe", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "only the default kind is read"),
    ("glm4_moe", {"n_group": 2}, "n_group is 2, and 3 experts make no such groups of two or more"),
    ("glm4_moe", {"n_group": 3}, "n_group is 3, and 3 experts make no such groups of two or more"),
    ("glm4_moe", {"topk_group": 2}, "topk_group is 2, which of 1 groups gives no 2 experts per token"),
    ("glm4_moe", {"first_k_dense_replace": 2}, "leaves no layer with experts, by first_k_dense_replace"),
    ("glm4_moe", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3, expected 0 to 2"),
    ("glm4_moe", {"routed_scaling_factor": None}, "routed_scaling_factor is None, expected a number with a point"),
    ("glm4_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0, expected a positive number with a point"),
    ("olmoe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "only the default kind is read"),
]


@pytest.mark.parametrize(("model_type", "changes", "sentence"), FIELDS, ids=str)
def test_a_field_that_is_not_computed_is_refused(model_type: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LayoutError, match="|".join(map(re.escape, sentence.split("|")))):
        read_served(config_of(model_type, **changes))


def test_a_kind_that_was_not_tried_is_refused_in_one_sentence(model: Path) -> None:
    change_config(model, model_type="deepseek_v3")
    assert refusal(model) == (
        f"{model}: config.json names model_type 'deepseek_v3', and flexgate serves {', '.join(SERVED)}: "
        "no other was tried"
    )


def test_a_model_without_an_ownership_file_is_refused(model: Path) -> None:
    (model / "flexgate.json").unlink()
    assert refusal(model) == (
        f"{model} has no flexgate.json: write down which unit each of its experts belongs to, "
        "with 'flexgate experts assign'"
    )


def test_a_tensor_that_the_kind_does_not_have_is_refused(model: Path) -> None:
    """A router bias, say, which would be loaded and added."""
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("gate.weight")).replace("weight", "bias")
    save_file(
        {**tensors, name: tensors["model.norm.weight"][:3].clone()}, model / "model.safetensors", {"format": "pt"}
    )
    assert refusal(model).endswith(f"holds an unknown tensor {name}")


@pytest.mark.parametrize("model", ["glm4_moe"], indirect=True)
def test_a_layer_that_predicts_further_tokens_may_lie_in_the_checkpoint(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    further = {"model.layers.2.eh_proj.weight": tensors["model.norm.weight"].clone()}
    save_file({**tensors, **further}, model / "model.safetensors", {"format": "pt"})
    assert refusal(model).endswith("holds an unknown tensor model.layers.2.eh_proj.weight")
    change_config(model, num_nextn_predict_layers=1)
    read_checkpoint(model)
    save_file({**tensors, "model.layers.3.x": further.popitem()[1]}, model / "model.safetensors", {"format": "pt"})
    assert refusal(model).endswith("holds an unknown tensor model.layers.3.x")


def test_slots_for_packages_that_there_are_not_are_refused(model: Path) -> None:
    name = read_checkpoint(model).kind.fields.name
    with pytest.raises(CheckpointError) as refused:
        plan(EngineSettings(model, max_experts=4, enforce_eager=True))
    assert str(refused.value) == (
        f"--max-experts 4: the checkpoint has 3 experts, and {name} takes no packages that other slots would be for"
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "a GLM-4-MoE model has not been tried compiled; start it with --enforce-eager"),
        (
            {"enforce_eager": True, "moe_kernels": "flexgate"},
            "a GLM-4-MoE model has not been tried with --moe-kernels flexgate; use vllm",
        ),
    ],
)
@pytest.mark.parametrize("model", ["glm4_moe"], indirect=True)
def test_a_way_of_running_that_was_not_tried_is_refused(model: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        plan(EngineSettings(model, **settings))
    assert str(refused.value) == f"{model} cannot be served: {sentence}"


def test_what_no_gate_reaches_is_named(tmp_path: Path) -> None:
    def ungated(model_type: str, **options: Any) -> dict[str, Any]:
        model = write_mixture(tmp_path / f"{model_type}-{len(options)}", model_type, **sizes_of(model_type), **options)
        unit_LE = [[] if layer in options.get("mlp_only_layers", []) else row for layer, row in enumerate(UNIT_LE)]
        return read_checkpoint(assign_units(model, ("public", "a", "b"), unit_LE)).ungated

    assert ungated("glm4_moe") == {"shared_expert": True}
    assert ungated("olmoe") == ungated("mixtral") == ungated("qwen3_moe") == {}
    assert ungated("qwen3_moe", mlp_only_layers=[1]) == {"dense_layers": 1}
    assert ungated("qwen2_moe") == {"shared_expert": True}
    assert ungated("qwen2_moe", mlp_only_layers=[0]) == {"shared_expert": True, "dense_layers": 1}


@pytest.mark.parametrize("model_type", OTHERS)
def test_more_ranks_than_experts_are_refused_where_vllm_refuses_them(tmp_path: Path, model_type: str) -> None:
    sizes = sizes_of(model_type) | {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
    path = assign_units(write_mixture(tmp_path, model_type, **sizes), ("public", "a", "b"), UNIT_LE)
    settings = EngineSettings(path, tensor_parallel_size=4, enforce_eager=True)
    if model_type.startswith("qwen"):
        with pytest.raises(CheckpointError, match=r"--tensor-parallel-size 4 is more than its 3 experts$"):
            plan(settings)
    else:
        plan(settings)


def assert_planned_memory_is_that_of_the_tensors(model: Path) -> None:
    """But for norms, biases and the gates of shared experts."""
    tensors = load_file(model / "model.safetensors")
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    routers = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".gate.weight"))
    others = [name for name in tensors if ".experts." not in name and not name.endswith("gate.weight")]
    slots = plan(EngineSettings(model, enforce_eager=True)).slots
    assert slots.held * slots.expert_bytes == 2 * (experts + routers)
    assert slots.other_bytes == 2 * sum(tensors[name].numel() for name in others if tensors[name].dim() == 2)


def test_the_memory_that_is_planned_is_that_of_the_tensors(model: Path) -> None:
    assert_planned_memory_is_that_of_the_tensors(model)


def test_a_layer_without_experts_is_planned_as_it_is(tmp_path: Path) -> None:
    model = write_mixture(tmp_path, "qwen2_moe", **sizes_of("qwen2_moe"), mlp_only_layers=[0])
    assert_planned_memory_is_that_of_the_tensors(assign_units(model, ("public", "a", "b"), ([], UNIT_LE[1])))
