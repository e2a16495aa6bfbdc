"""Which ways of running the engine were tried, as data: refusals and the README's table.

``tested``: the test suite runs it. ``unverified``: expected to work, not run yet (it needs
a GPU). ``refused``: it would bypass the gate's buffers, or was never tried; the
launcher refuses to start.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexgate.server.engine.frontend.requirements import CPU_HEAD_SIZES, CPU_HIDDEN_MULTIPLE

Status = Literal["tested", "unverified", "refused"]


class RefusedConfigurationError(ValueError):
    """The engine was asked to run in a way that flexgate refuses."""


@dataclass(frozen=True, slots=True)
class Capability:
    """One way of running, and for a refused one how to recognise it in a ``VllmConfig``.

    What the checkpoint itself says is refused before there is one, by ``requirements`` and
    ``experts/checkpoint/configuration.py``.
    """

    name: str
    status: Status
    why: str
    present: Callable[[Any], bool] | None = None


def _speculative(config: Any) -> bool:
    return config.speculative_config is not None


CAPABILITIES: tuple[Capability, ...] = (
    Capability("CPU, Model Runner V1", "tested", "every engine test"),
    Capability("CPU, Model Runner V2 (Triton interpreter)", "tested", "slow engine test"),
    Capability("prefix caching, chunked prefill, preemption", "tested", "engine tests"),
    Capability("asynchronous scheduling", "tested", "engine tests"),
    Capability("torch.compile", "tested", "slow tests of engine and server, on CPU"),
    Capability("tensor parallelism on CPU", "tested", "slow engine test with two ranks"),
    Capability(
        "`--moe-kernels flexgate` on CPU", "tested", "torch reference: every engine test; Triton interpreted: slow ones"
    ),
    Capability("low-rank slots, on CPU", "tested", "slow tests, eager in float32, torch reference"),
    Capability("low-rank slots, on CUDA or on several ranks", "refused", "the torch reference of one rank alone"),
    Capability("CUDA", "unverified", "not run on a GPU yet"),
    Capability("tied embeddings (`tie_word_embeddings`)", "tested", "slow engine test, on CPU"),
    Capability(
        "rotary embeddings of another kind than `default`", "refused", "neither the tools nor the tests compute them"
    ),
    Capability(
        f"on CPU, attention heads of other sizes than {', '.join(map(str, CPU_HEAD_SIZES))}",
        "refused",
        "vLLM has no kernel for them; on CUDA vLLM decides",
    ),
    Capability(
        f"on CPU, hidden sizes that are not a multiple of {CPU_HIDDEN_MULTIPLE}",
        "refused",
        "vLLM's expert kernels cannot hold them",
    ),
    Capability("expert parallelism on CPU", "tested", "slow engine test with two ranks"),
    Capability(
        "expert parallelism on CUDA",
        "refused",
        "the reserved zero slot was tried with the CPU kernel only",
        lambda c: c.parallel_config.enable_expert_parallel and c.device_config.device_type != "cpu",
    ),
    Capability(
        "pipeline parallelism",
        "refused",
        "attribution would miss the layers of other stages",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    Capability(
        "data parallelism",
        "refused",
        "not tried yet",
        lambda c: c.parallel_config.data_parallel_size > 1,
    ),
    Capability(
        "prefill context parallelism",
        "refused",
        "moves tokens past the buffers that hold each token's gate",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
    ),
    Capability(
        "dual-batch overlap",
        "refused",
        "slices the batch past the buffers that hold each token's gate",
        lambda c: c.parallel_config.use_ubatching,
    ),
    Capability(
        "expert load balancing (EPLB)",
        "refused",
        "moves experts between slots",
        lambda c: c.parallel_config.enable_eplb,
    ),
    Capability("LoRA", "refused", "not tried", lambda c: c.lora_config is not None),
    Capability("speculative decoding", "refused", "not tried", _speculative),
    Capability(
        "quantised checkpoints",
        "refused",
        "not tried",
        lambda c: c.quant_config is not None or c.model_config.quantization is not None,
    ),
    Capability(
        "KV transfer between engines",
        "refused",
        "attribution takes the field that it uses, and a remote KV cache is not separated by gate",
        lambda c: c.kv_transfer_config is not None,
    ),
    Capability(
        "prompt embeddings",
        "refused",
        "bypass the tokenizer and its limits",
        lambda c: c.model_config.enable_prompt_embeds,
    ),
)

REFUSED_ENVIRONMENT: Mapping[str, str] = {
    "VLLM_SERVER_DEV_MODE": "it opens vLLM's development routes",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "it lets messages between processes run code",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "two requests could then share an id",
    "VLLM_TORCH_PROFILER_DIR": "profiles could hold prompts",
}


def refuse_environment(environment: Mapping[str, str] | None = None) -> None:
    """Refuse environment variables that would open the engine.

    Raises:
        RefusedConfigurationError: naming the variable and why.
    """
    values = os.environ if environment is None else environment
    for name, why in REFUSED_ENVIRONMENT.items():
        if values.get(name, "") not in ("", "0"):
            raise RefusedConfigurationError(f"{name} is set; unset it, since {why}")


def refuse_untried(config: Any) -> None:
    """Refuse a ``VllmConfig`` that flexgate does not gate.

    Raises:
        RefusedConfigurationError: naming the capability and why.
    """
    for capability in CAPABILITIES:
        if capability.present is not None and capability.present(config):
            raise RefusedConfigurationError(f"{capability.name} is refused: {capability.why}")
