"""What vLLM would die of later is refused before it is loaded, in one sentence."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from enginekit.checkpoints import Shape, write_random
from safetensors.torch import load_file, save_file

from flexgate.server.engine.frontend.checkpoint import CheckpointError, read_checkpoint, require_bounded
from flexgate.server.engine.frontend.launch import EngineSettings, plan
from flexgate.server.engine.frontend.requirements import CPU_HEAD_SIZES, CPU_HIDDEN_MULTIPLE


def refusal(model: Path, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as refused:
        plan(EngineSettings(model, dtype="float32", **settings))
    sentence = str(refused.value)
    assert str(model) in sentence
    for where in (f"{model} cannot be served: ", f"{model}: config.json: ", f"{model}/"):
        sentence = sentence.removeprefix(where)
    return sentence


SHAPES = {
    "head size": (
        Shape(hidden=96, heads=4, kv_heads=4),
        "its attention head size is 24; vLLM on CPU has kernels for 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512",
    ),
    "hidden size": (
        Shape(hidden=80, heads=1, kv_heads=1),
        "its hidden size 80 is not a multiple of 32, which vLLM's expert kernels on CPU need",
    ),
    "grouped heads": (
        Shape(hidden=128, heads=4, kv_heads=3),
        "its 4 attention heads cannot share 3 key-value heads evenly",
    ),
}


@pytest.mark.parametrize(("shape", "sentence"), SHAPES.values(), ids=SHAPES.keys())
def test_a_shape_without_a_kernel_is_refused(tmp_path: Path, shape: Shape, sentence: str) -> None:
    assert refusal(write_random(tmp_path, shape)) == sentence


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3 does not divide its 4 attention heads"),
    "kv heads": ({"tensor_parallel_size": 4}, "--tensor-parallel-size 4 does not divide its 2 key-value heads"),
    "experts": (
        {"tensor_parallel_size": 2},
        "--tensor-parallel-size 2 does not divide its 97 expert intermediate columns",
    ),
    "one rank": ({"enable_expert_parallel": True}, "--enable-expert-parallel needs --tensor-parallel-size 2 or more"),
    "length": ({"max_model_len": 513}, "--max-model-len 513 is more than the model's 512 positions"),
    "batch": ({"max_num_seqs": 2049}, "--max-num-seqs 2049 is more than a step's 2048 tokens"),
    "kernels of a rank": (
        {"low_ranks": (8,)},
        "low-rank slots need --moe-kernels flexgate: vLLM's kernels compute full experts only",
    ),
    "processes of a rank": (
        {
            "low_ranks": (8,),
            "moe_kernels": "flexgate",
            "tensor_parallel_size": 2,
            "enable_expert_parallel": True,
        },
        "low-rank slots are computed on one rank: leave --tensor-parallel-size at 1",
    ),
    "rank": ({"low_ranks": (8, 98)}, "--slots asks for rank 98, and its experts have ranks of 1 to 97"),
    "kv cache": (
        {"kv_cache_memory_bytes": 983039},
        "a request of 512 tokens needs 983040 bytes of KV cache, --kv-cache-memory-bytes 983039 is less; "
        "raise it or lower --max-model-len",
    ),
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, two key-value heads, an odd intermediate size, 512 positions."""
    return write_random(tmp_path_factory.mktemp("grouped"), Shape(kv_heads=2, intermediate=97))


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_the_checkpoint_does_not_bear_are_refused(
    grouped: Path, settings: dict[str, Any], sentence: str
) -> None:
    assert refusal(grouped, **settings) == sentence


def test_settings_just_within_its_limits_are_planned(grouped: Path) -> None:
    within = {"max_model_len": 512, "max_num_seqs": 2048, "kv_cache_memory_bytes": 983040}
    plan(EngineSettings(grouped, dtype="float32", **within))
    plan(EngineSettings(grouped, dtype="float32", tensor_parallel_size=2, enable_expert_parallel=True))


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["OlmoForCausalLM"]},
        "architectures is ['OlmoForCausalLM'], expected ['FlexOlmoForCausalLM']",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    "head size": ({"head_dim": 64}, "head_dim is 64, expected 32"),
    "picks": ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but it has 4 experts"),
    "text": ({"hidden_size": "128"}, "hidden_size is '128', expected 1 to 16777216"),
    "tied and not": ({"tie_word_embeddings": True}, "model.safetensors holds an unknown tensor lm_head.weight"),
}


@pytest.mark.parametrize(("changes", "sentence"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_configuration_that_the_model_would_not_compute_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    model = write_random(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    assert refusal(model) == sentence


@pytest.mark.parametrize(
    ("value", "what"), [(math.nan, "NaN"), (-math.inf, "infinite"), (1e30, "1e+30"), (-1.1e4, "1.1e")]
)
def test_a_value_that_a_package_may_not_hold_either_is_refused(tmp_path: Path, value: float, what: str) -> None:
    model = write_random(tmp_path, Shape(layers=1))
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    require_bounded(read_checkpoint(model))
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds .*{re.escape(what)}"):
        require_bounded(read_checkpoint(model))


def test_a_default_cache_holds_the_longest_request(tmp_path: Path) -> None:
    model = write_random(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 20}))
    assert plan(EngineSettings(model, dtype="float32", max_model_len=512)).slots.kv_bytes == 1 << 30
    assert plan(EngineSettings(model, dtype="float32")).slots.kv_bytes == (3 << 30) + 128 * 3072


def test_what_is_assumed_of_vllm_is_what_it_says() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts, X86CPUUnquantizedExperts
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
    for kernel in (CPUUnquantizedExperts, X86CPUUnquantizedExperts):
        assert kernel.output_alignment == CPU_HIDDEN_MULTIPLE
        assert CPU_HIDDEN_MULTIPLE % kernel.reduction_alignment == 0


def test_what_the_checkpoint_holds_is_as_old_as_the_start(tmp_path: Path) -> None:
    """What is revoked elsewhere later makes it old; what was revoked before and came back does not."""
    planned = plan(EngineSettings(write_random(tmp_path), dtype="float32", weights_epoch=7))
    assert set(planned.table.live.values()) == {7}
