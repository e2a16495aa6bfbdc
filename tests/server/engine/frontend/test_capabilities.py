"""What the table refuses is refused: a configuration that vLLM would run does not start here."""

from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("name", capabilities.REFUSED_ENVIRONMENT)
def test_a_variable_that_opens_the_engine_is_refused_by_name(name: str) -> None:
    with pytest.raises(capabilities.RefusedConfigurationError, match=f"^{name} is set; unset it"):
        capabilities.refuse_environment({name: "1"})
    capabilities.refuse_environment({name: "0"})
