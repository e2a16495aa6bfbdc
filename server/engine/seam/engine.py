"""Every private name of vLLM's engine that flexgate relies on, and why; those that requests pass by are in `requests`.

Written for vLLM 0.32.0.

vLLM documents plugins, ``--worker-cls``, ``--scheduler-cls``, ``additional_config`` and a
model's ``get_model_state_cls()``. What follows is not documented and may change with any
release, so the launcher refuses a version that is not in ``TESTED_VERSIONS``.

``GPUModelRunner._preprocess / _dummy_run`` (vllm/v1/worker/gpu_model_runner.py)
    Model Runner V1: the order of requests in the batch is final; dummy batches.
``Scheduler.schedule / update_from_output / add_request`` (vllm/v1/core/sched/scheduler.py)
    Expiry before a step; attribution with every output.
``Scheduler.waiting`` (vllm/v1/core/sched/scheduler.py)
    First come, first served; a canary's request is put in front.
``FusedMoEFactory(num_expert_group=...)``, ``RoutedExperts.expert_map_manager``
    Deals experts out to ranks in turn only for a model with expert groups; where each went. The
    handshake compares the outcome.
``CpuPlatform.check_and_update_config`` (vllm/platforms/cpu.py), ``ParallelConfig.distributed_executor_backend``
    Puts a worker process under the engine core also for one rank, for its OpenMP threads, which flexgate sets itself.
``get_mp_context`` (vllm/v1/engine/utils.py)
    What vLLM makes the engine core's process with. What that process imports, and which variables vLLM sets for it,
    stands in ``core_process.py``, which is at work before vLLM is loaded.
``RoutedExperts._get_quant_method`` (vllm/model_executor/layers/fused_moe/routed_experts.py)
    Where a layer of experts gets the method that holds and applies its weights.
``UnquantizedFusedMoEMethod.unquantized_backend / experts_cls`` (…/unquantized_fused_moe_method.py)
    The backend decides the layout of the weights in memory, the class what computes with them.
``FusedMoEExpertsModular`` (…/modular_kernel.py), ``TopKWeightAndReduceNoOP`` (…/topk_weight_and_reduce.py)
    What computes with routed tokens, between vLLM's dispatch and its reduction.
``CPUUnquantizedExperts._use_zentorch / isa``, ``cpu_prepack_moe_weight`` (…/experts/cpu_moe.py, vllm/_custom_ops.py)
    How vLLM's CPU kernel lays out one expert; a slot written while the engine runs has to look the same.
``torch.cpu._is_amx_tile_supported / _init_amx`` (vllm/v1/attention/backends/cpu_attn.py asks the first only)
    Linux kills a process that touches AMX tiles without having asked for them. vLLM's attention never asks;
    it lives where oneDNN, which does, happens to have used them before.
``MultiprocExecutor.collective_rpc`` (vllm/v1/executor/multiproc_executor.py)
    Stops reading at the first rank that raises: the next call would take the other ranks' answers for its own. So no
    method that is called this way lets an exception out; see :func:`answered`.
``EngineCore`` attributes, called by name as utilities (vllm/v1/engine/core.py)
    The only way from the API process to the scheduler; a utility runs between two steps. One that is in flight when the
    engine dies is never answered (``AsyncMPClient.utility_results``, vllm/v1/engine/core_client.py).
``KVCacheConfig.needs_kv_cache_zeroing`` (vllm/v1/kv_cache_interface.py)
    Read by the scheduler, which then tells the ranks which blocks a step hands out, and by each rank, which zeroes them
    before the forward pass. vLLM asks for it only where it has met stale NaN itself.
``GPUModelRunner._zero_block_ids`` (V1), ``kv_block_zeroer`` (V2; vllm/v1/worker/utils.py)
    What zeroes them; the handshake calls it.
``BlockTable.slot_mapping`` (V1; vllm/v1/worker/block_table.py), ``BlockTables.slot_mappings`` (V2; gpu/block_table.py)
    Where a step's tokens lie in the KV cache. What was routed there is remembered, for requests that hit it.
``XgrammarBackend`` in vllm/v1/structured_output/__init__.py
    What an engine core compiles with, made at its first constrained request. Ours has other processes do it.
``Scheduler._handle_blocked_waiting_request``, ``Request.next_decode_eligible_step`` (…/sched/scheduler.py)
    Whether a waiting request may be scheduled; the first step that a running one may be in. One is left out of steps
    until its mask is there.
``validate_xgrammar_grammar`` (vllm/v1/structured_output/backend_xgrammar.py)
    Compiles a request's constraint on the event loop, to see whether it can be. Another process has seen that before.
``Scheduler.kv_cache_manager.block_pool`` (vllm/v1/core/block_pool.py)
    Cached blocks of a revoked expert are evicted by their hashes.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any, Final, TypeVar

import torch
import vllm
import xgrammar
from vllm import ModelRegistry, envs
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEActivationFormat, FusedMoEExpertsModular
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1 import structured_output
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import backend_xgrammar
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

VLLM_VERSION: Final[str] = vllm.__version__
TESTED_VERSIONS = frozenset({"0.32.0"})
DEAD_POLL_SECONDS: Final = 0.5

__all__ = [
    "TESTED_VERSIONS",
    "VLLM_VERSION",
    "AsyncModelRunnerOutput",
    "AsyncScheduler",
    "Attention",
    "BaseRouter",
    "BlockHash",
    "CPUUnquantizedExperts",
    "DefaultModelState",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "EngineDeadError",
    "EngineGenerateError",
    "FinishReason",
    "FusedMoEActivationFormat",
    "FusedMoEExpertsModular",
    "FusedMoEFactory",
    "GateLinear",
    "KVCacheConfig",
    "MoEActivation",
    "ModelRegistry",
    "ModelRunnerOutput",
    "QueueOverflowError",
    "RankFailed",
    "Request",
    "RequestStatus",
    "RoutedExperts",
    "RoutingMethodType",
    "SamplingParams",
    "Scheduler",
    "SchedulerOutput",
    "StructuredOutputBackend",
    "StructuredOutputGrammar",
    "StructuredOutputsParams",
    "TopKWeightAndReduceNoOP",
    "TritonExperts",
    "UnquantizedFusedMoEMethod",
    "UnquantizedMoeBackend",
    "UntestedVersionError",
    "VLLMValidationError",
    "allow_amx_tiles",
    "answered",
    "answers",
    "ask_engine_core",
    "ask_ranks",
    "cache_places",
    "cached_among",
    "clear_reused_blocks",
    "cpu_prepack_moe_weight",
    "current_platform",
    "engine_core_of",
    "envs",
    "evict_cached",
    "extract_layer_index",
    "get_current_vllm_config",
    "keep_one_rank_in_the_engine_core",
    "offer_to_engine_core",
    "require_tested_version",
    "use_grammar_backend",
    "validate_no_grammar_here",
    "xgrammar",
    "zero_blocks",
]

T = TypeVar("T")


class RankFailed(RuntimeError):
    """A rank could not do what it was asked; the message says which and why."""


class UntestedVersionError(RuntimeError):
    """The installed vLLM is not one whose private names were checked."""


def require_tested_version() -> None:
    """Refuse to go on with a vLLM that this seam was not written for.

    Raises:
        UntestedVersionError: naming the version found and the ones tested.
    """
    if vllm.__version__.partition("+")[0] not in TESTED_VERSIONS:
        tested = ", ".join(sorted(TESTED_VERSIONS))
        raise UntestedVersionError(f"vLLM {vllm.__version__} is installed; flexgate was tested with {tested} only")


def keep_one_rank_in_the_engine_core(config: VllmConfig) -> None:
    """Take back the worker process that vLLM wants for a single rank on CPU (`CpuPlatform.check_and_update_config`).

    It is there to bind that rank's OpenMP threads, and stays where ``VLLM_CPU_OMP_THREADS_BIND`` asks for binding.
    """
    parallel = config.parallel_config
    if current_platform.is_cpu() and parallel.world_size == 1 and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        parallel.distributed_executor_backend = "uni"


@contextmanager
def engine_core_of(context: BaseContext) -> Iterator[None]:
    """Let engines that are started meanwhile make their engine core's process with ``context``."""
    usual = engine_utils.get_mp_context
    engine_utils.get_mp_context = lambda: context
    try:
        yield
    finally:
        engine_utils.get_mp_context = usual


def allow_amx_tiles() -> None:
    """Ask Linux for the AMX tiles of this processor, if it has any, for this process and its threads.

    Raises:
        RuntimeError: it refuses, and vLLM's bfloat16 attention would end the process.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise RuntimeError("the kernel refuses AMX tiles, which bfloat16 needs on this processor: use --dtype float32")


def clear_reused_blocks() -> None:
    """Have every block of the KV cache zeroed before the first step of a request that it is given to.

    For each process of the engine, before it knows its KV cache. The CPU's attention multiplies what a block's unused
    positions hold with probability 0, and 0 times what an earlier request left there need not be 0.
    """
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda _config: True)


def zero_blocks(runner: Any, block_ids: list[int]) -> None:
    """Zero blocks of the KV cache in the way that ``runner``, of either version, does it when they are handed out."""
    if hasattr(runner, "_zero_block_ids"):
        runner._zero_block_ids(block_ids)
    else:
        runner.kv_block_zeroer.zero_block_ids(block_ids)


def cache_places(runner: Any) -> torch.Tensor:
    """Where in the KV cache each token of the last step lies, in the batch's order, with more behind them.

    Args:
        runner: of either version, with one group of layers in its cache.
    """
    places: torch.Tensor
    if hasattr(runner, "block_tables"):
        places = runner.block_tables.slot_mappings[0]
    else:
        places = runner.input_batch.block_table[0].slot_mapping.gpu
    return places


def use_grammar_backend(backend: type[StructuredOutputBackend]) -> None:
    """Let the engine core of this process make its grammars with ``backend``."""
    structured_output.XgrammarBackend = backend


def serialized_tokenizer(engine: Any) -> str:
    """The tokenizer of an ``AsyncLLM`` as `XgrammarBackend` would give it to its compiler, as JSON."""
    vocabulary = engine.model_config.get_vocab_size()
    info = xgrammar.TokenizerInfo.from_huggingface(engine.renderer.tokenizer, vocab_size=vocabulary)
    serialized: str = info.serialize_json()
    return serialized


def validate_no_grammar_here() -> None:
    """Let vLLM take every constraint of this process for a good one: they were compiled before."""
    backend_xgrammar.validate_xgrammar_grammar = lambda _params: None


def offer_to_engine_core(name: str, handle: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Let :func:`ask_engine_core` call ``handle(scheduler, command)`` in this engine core, between steps."""

    def utility(self: EngineCore, command: dict[str, Any]) -> Any:
        return handle(self.scheduler, command)

    setattr(EngineCore, name, utility)


async def ask_engine_core(engine: Any, name: str, command: dict[str, Any]) -> Any:
    """Call what :func:`offer_to_engine_core` offered.

    Args:
        engine: an ``AsyncLLM``.

    Raises:
        EngineDeadError: it is dead, or it died before it answered.
    """
    return await _unless_it_dies(engine, engine.engine_core.call_utility_async(name, command))


async def ask_ranks(engine: Any, name: str, *args: Any) -> list[Any]:
    """Call an :func:`answered` method of every rank's worker, between two steps; their results in the order of ranks.

    Raises:
        EngineDeadError: as :func:`ask_engine_core` does.
        RankFailed: a rank raised; all of them have answered.
    """
    return answers(await _unless_it_dies(engine, engine.collective_rpc(name, args=args)))


def answered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a worker's method return what it raises; :func:`answers` is its counterpart."""

    @functools.wraps(method)
    def answering(*args: Any) -> dict[str, Any]:
        try:
            return {"result": method(*args), "error": None}
        except Exception as error:
            return {"result": None, "error": f"{type(error).__name__}: {error}"}

    return answering


def answers(replies: Sequence[dict[str, Any]]) -> list[Any]:
    """What :func:`answered` methods returned, by rank; raises `RankFailed` for the first that raised."""
    for rank, reply in enumerate(replies):
        if reply["error"] is not None:
            raise RankFailed(f"rank {rank}: {reply['error']}")
    return [reply["result"] for reply in replies]


async def _unless_it_dies(engine: Any, call: Awaitable[T]) -> T:
    waiting = asyncio.ensure_future(call)
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=DEAD_POLL_SECONDS)
            if engine.errored and not waiting.done():
                raise EngineDeadError
        return waiting.result()
    finally:
        waiting.cancel()


def evict_cached(scheduler: Scheduler, hashes: Iterable[BlockHash]) -> int:
    """Drop blocks from the prefix cache, so that nothing can hit them again; returns how many."""
    pool = scheduler.kv_cache_manager.block_pool
    groups = range(len(scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups))
    evicted = 0
    for block_hash in hashes:
        for group in groups:
            while found := pool.get_cached_block(block_hash, [group]):
                pool.evict_blocks({block.block_id for block in found})
                evicted += len(found)
    return evicted


def cached_among(scheduler: Scheduler, hashes: Iterable[BlockHash]) -> set[BlockHash]:
    """Those of ``hashes`` whose blocks are still in the prefix cache."""
    pool = scheduler.kv_cache_manager.block_pool
    groups = range(len(scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups))
    return {found for found in hashes if any(pool.get_cached_block(found, [group]) for group in groups)}
