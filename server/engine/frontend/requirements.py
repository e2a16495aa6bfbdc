"""Requirements checked before vLLM is loaded, which would otherwise fail after minutes of loading.

Each requirement answers one question about a checkpoint and the settings it is started with, as None or as
the end of a sentence that begins with what is wrong. Written for vLLM 0.32.0; tests compare with it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from flexgate.server.engine.frontend.checkpoint import Checkpoint, CheckpointError
from flexgate.server.engine.frontend.memory import kv_bytes_of_one_request

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.launch import EngineSettings

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_HIDDEN_MULTIPLE = 32  # of vLLM's CPU expert kernels; their intermediate size is padded

BESIDE_EXPERTS = {"D": "columns of a layer without experts", "S": "columns of a shared expert"}

RANKS_WITH_EXPERTS = frozenset({"Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})
"""Whose class in vLLM takes no more ranks than there are experts, however they are split."""

Requirement = Callable[[Checkpoint, "EngineSettings", str], str | None]


def require_servable(checkpoint: Checkpoint, settings: "EngineSettings", dtype: str, *, on_cpu: bool) -> None:
    """Check everything that can be known without vLLM.

    Args:
        dtype: as served.

    Raises:
        CheckpointError: naming what does not fit and what would.
    """
    for requirement in (*EVERYWHERE, *(ON_CPU if on_cpu else ON_CUDA)):
        if problem := requirement(checkpoint, settings, dtype):
            raise CheckpointError(f"{checkpoint.path} cannot be served: {problem}")


def _tried(checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    name = checkpoint.kind.fields.name
    if checkpoint.kind.eager_alone and not settings.enforce_eager:
        return f"{name} has not been tried compiled; start it with --enforce-eager"
    if checkpoint.kind.eager_alone and settings.moe_kernels != "vllm":
        return f"{name} has not been tried with --moe-kernels {settings.moe_kernels}; use vllm"
    return None


def _grouped_heads(checkpoint: Checkpoint, _settings: "EngineSettings", _dtype: str) -> str | None:
    heads, kv_heads = checkpoint.architecture.num_attention_heads, checkpoint.architecture.num_key_value_heads
    if heads % kv_heads:
        return f"its {heads} attention heads cannot share {kv_heads} key-value heads evenly"
    return None


def _picks(checkpoint: Checkpoint, _settings: "EngineSettings", _dtype: str) -> str | None:
    a = checkpoint.architecture
    if a.num_experts_per_tok > a.num_experts:
        return f"num_experts_per_tok is {a.num_experts_per_tok}, but it has {a.num_experts} experts"
    return None


def _ranks(checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    a, ranks = checkpoint.architecture, settings.tensor_parallel_size
    if settings.enable_expert_parallel and ranks < 2:
        return "--enable-expert-parallel needs --tensor-parallel-size 2 or more"
    parts = {"attention heads": a.num_attention_heads, "key-value heads": a.num_key_value_heads}
    if not settings.enable_expert_parallel:
        parts["expert intermediate columns"] = a.intermediate_size
    parts |= {name: a.sizes[letter] for letter, name in BESIDE_EXPERTS.items() if a.sizes.get(letter)}
    for name, count in parts.items():
        if count % ranks:
            return f"--tensor-parallel-size {ranks} does not divide its {count} {name}"
    return None


def _experts_of_ranks(checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    experts, ranks = checkpoint.architecture.num_experts, settings.tensor_parallel_size
    if checkpoint.kind.architecture in RANKS_WITH_EXPERTS and ranks > experts:
        return f"--tensor-parallel-size {ranks} is more than its {experts} experts"
    return None


def _length(checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    limit = checkpoint.architecture.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > limit:
        return f"--max-model-len {settings.max_model_len} is more than the model's {limit} positions"
    return None


def _batch(_checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    if settings.max_num_seqs > settings.max_num_batched_tokens:
        return f"--max-num-seqs {settings.max_num_seqs} is more than a step's {settings.max_num_batched_tokens} tokens"
    return None


def _head_size(checkpoint: Checkpoint, _settings: "EngineSettings", _dtype: str) -> str | None:
    if checkpoint.architecture.head_size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        return f"its attention head size is {checkpoint.architecture.head_size}; vLLM on CPU has kernels for {sizes}"
    return None


def _hidden_size(checkpoint: Checkpoint, _settings: "EngineSettings", _dtype: str) -> str | None:
    if checkpoint.architecture.hidden_size % CPU_HIDDEN_MULTIPLE:
        return (
            f"its hidden size {checkpoint.architecture.hidden_size} is not a multiple of {CPU_HIDDEN_MULTIPLE}, "
            "which vLLM's expert kernels on CPU need"
        )
    return None


def _kv_cache(checkpoint: Checkpoint, settings: "EngineSettings", dtype: str) -> str | None:
    given = settings.kv_cache_memory_bytes
    tokens = settings.max_model_len or checkpoint.architecture.max_position_embeddings
    needed = kv_bytes_of_one_request(checkpoint, tokens, dtype=dtype, ranks=settings.tensor_parallel_size)
    if given is not None and given < needed:
        return (
            f"a request of {tokens} tokens needs {needed} bytes of KV cache, --kv-cache-memory-bytes {given} "
            "is less; raise it or lower --max-model-len"
        )
    return None


def _low_ranks(checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    if not settings.low_ranks:
        return None
    a = checkpoint.architecture
    most = min(a.hidden_size, a.intermediate_size)
    if not checkpoint.kind.packages:
        return f"{checkpoint.kind.fields.name} takes no packages that low-rank slots would be for"
    if wrong := [rank for rank in settings.low_ranks if not 1 <= rank <= most]:
        return f"--slots asks for rank {wrong[0]}, and its experts have ranks of 1 to {most}"
    if settings.moe_kernels != "flexgate":
        return "low-rank slots need --moe-kernels flexgate: vLLM's kernels compute full experts only"
    if settings.tensor_parallel_size > 1:
        return "low-rank slots are computed on one rank: leave --tensor-parallel-size at 1"
    return None


def _no_low_ranks(_checkpoint: Checkpoint, settings: "EngineSettings", _dtype: str) -> str | None:
    return "low-rank slots are computed on CPU only" if settings.low_ranks else None


EVERYWHERE: tuple[Requirement, ...] = (
    _tried,
    _grouped_heads,
    _picks,
    _ranks,
    _experts_of_ranks,
    _length,
    _batch,
    _low_ranks,
)
ON_CUDA: tuple[Requirement, ...] = (_no_low_ranks,)
ON_CPU: tuple[Requirement, ...] = (_head_size, _hidden_size, _kv_cache)
