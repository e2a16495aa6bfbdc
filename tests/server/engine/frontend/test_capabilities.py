"""What the table refuses is refused: a configuration that vLLM would run does not start here."""

import json
from pathlib import Path
from typing import Any

import pytest
from enginekit.checkpoints import assign_units, write_mixture
from safetensors.torch import load_file

from flexgate.server.engine.frontend import capabilities
from flexgate.server.engine.frontend.launch import EngineSettings, engine_config, plan

UNTRIED: dict[str, dict[str, Any]] = {
    "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    "data parallelism": {"data_parallel_size": 2},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
        "async_scheduling": False,
    },
    "LoRA": {"enable_lora": True},
    "KV transfer between engines": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    },
    "prompt embeddings": {"enable_prompt_embeds": True},
}


@pytest.mark.parametrize(("name", "tuning"), UNTRIED.items(), ids=UNTRIED.keys())
def test_what_was_not_tried_is_refused(checkpoint: Path, name: str, tuning: dict[str, Any]) -> None:
    planned = plan(EngineSettings(checkpoint, dtype="float32", enforce_eager=True))
    config = engine_config(planned, **tuning)
    with pytest.raises(capabilities.RefusedConfigurationError, match=f"^{name} is refused: "):
        capabilities.refuse_untried(config)


def test_nothing_is_read_in_place_of_the_files_that_were_checked(tmp_path: Path) -> None:
    """Where weights are called consolidated, vLLM reads params.json and Mistral's tokenizer before all others."""
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = write_mixture(
        tmp_path, "mixtral", **sizes, vocab_size=60, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2
    )
    assign_units(model, ("public", "a", "b"), ([0, 1, 2],))
    shard = "consolidated-00001-of-00001.safetensors"
    names = dict.fromkeys(load_file(model / "model.safetensors"), shard)
    (model / "model.safetensors").rename(model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (model / "params.json").write_text(json.dumps({"moe": {"num_experts": 3}, "num_experts_per_tok": 1}))
    config = engine_config(plan(EngineSettings(model, dtype="float32", enforce_eager=True)))
    assert config.model_config.hf_config.num_experts_per_tok == 2
    assert (config.model_config.config_format, config.load_config.load_format) == ("hf", "safetensors")
    assert config.model_config.tokenizer_mode == "hf"


@pytest.mark.parametrize("name", capabilities.REFUSED_ENVIRONMENT)
def test_a_variable_that_opens_the_engine_is_refused_by_name(name: str) -> None:
    with pytest.raises(capabilities.RefusedConfigurationError, match=f"^{name} is set; unset it"):
        capabilities.refuse_environment({name: "1"})
    capabilities.refuse_environment({name: "0"})
