"""What is served is what vLLM's class computes; any other kind, or field, is refused before vLLM is loaded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from enginekit.checkpoints import assign_units, write_mixture
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

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
    experts = {"num_local_experts" if model_type == "mixtral" else "num_experts": SIZES["num_experts"]}
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


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_configuration_that_transformers_writes_is_read(model_type: str) -> None:
    described = read_served(config_of(model_type))
    numbers = described.numbers
    assert described.kind is SERVED[model_type]
    assert (numbers.num_experts, numbers.num_experts_per_tok, numbers.hidden_size) == (3, 2, 32)


def test_a_whole_checkpoint_is_read(model: Path) -> None:
    checkpoint = read_checkpoint(model)
    assert checkpoint.ownership.unit_LE == tuple(map(bytes, UNIT_LE))
    assert plan(EngineSettings(model)).table.total == 3


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


def test_slots_for_packages_that_there_are_not_are_refused(model: Path) -> None:
    name = read_checkpoint(model).kind.fields.name
    with pytest.raises(CheckpointError) as refused:
        plan(EngineSettings(model, max_experts=4))
    assert str(refused.value) == (
        f"--max-experts 4: the checkpoint has 3 experts, and {name} takes no packages that other slots would be for"
    )


def assert_planned_memory_is_that_of_the_tensors(model: Path) -> None:
    """But for norms, biases and the gates of shared experts."""
    tensors = load_file(model / "model.safetensors")
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    routers = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".gate.weight"))
    others = [name for name in tensors if ".experts." not in name and not name.endswith("gate.weight")]
    slots = plan(EngineSettings(model)).slots
    assert slots.held * slots.expert_bytes == 2 * (experts + routers)
    assert slots.other_bytes == 2 * sum(tensors[name].numel() for name in others if tensors[name].dim() == 2)


def test_the_memory_that_is_planned_is_that_of_the_tensors(model: Path) -> None:
    assert_planned_memory_is_that_of_the_tensors(model)


def test_a_layer_without_experts_is_planned_as_it_is(tmp_path: Path) -> None:
    model = write_mixture(tmp_path, "qwen2_moe", **sizes_of("qwen2_moe"), mlp_only_layers=[0])
    assert_planned_memory_is_that_of_the_tensors(assign_units(model, ("public", "a", "b"), ([], UNIT_LE[1])))
