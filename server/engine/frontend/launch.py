"""Start vLLM, and serve nothing before every rank has proved that it gates."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgate.server.engine.frontend.capabilities import RefusedConfigurationError, refuse_environment, refuse_untried
from flexgate.server.engine.frontend.checkpoint import (
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    require_bounded,
    require_unchanged,
)
from flexgate.server.engine.frontend.constraints.compiler import Compiler
from flexgate.server.engine.frontend.core_process import EarlyContext, EarlyProcess, modules_of_core
from flexgate.server.engine.frontend.memory import SlotPlan, kv_bytes_of_one_request, plan_slots
from flexgate.server.engine.frontend.requirements import require_servable
from flexgate.server.engine.frontend.tokenizer import require_readable_texts
from flexgate.server.engine.protocol.gates import SealKey, new_seal_key
from flexgate.server.engine.protocol.names import MOE_KERNELS_KEY, SEAL_KEY_VARIABLE, TRACES_VARIABLE
from flexgate.server.engine.protocol.slots import SlotMap, SlotTable

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.calls import ExpertInfo
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.engine.frontend.slot_control import SlotOperator
    from flexgate.server.engine.frontend.watchdog import Heartbeat

CPU_KV_BYTES = 1 << 30
MOE_KERNELS = ("flexgate", "vllm")

Stage = Callable[[str, int, int], None]  # (what is happening, done, total); total 0: unknown


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to run the engine; everything else is decided here or refused.

    Attributes:
        dtype: ``auto`` is bfloat16, also for a checkpoint stored in float32; float16 is refused.
        max_experts: slots for units; None for the checkpoint's units + 2, as far as they fit.
        kv_cache_memory_bytes: None for 1 GiB on CPU, or as much as a longest request needs, and
            vLLM's choice on CUDA.
        max_model_len: tokens per request; None for the model's own limit.
        enforce_eager: no torch.compile and no CUDA graphs.
        enable_expert_parallel: deal whole experts out to the tensor-parallel ranks.
        moe_kernels: ``vllm`` or ``flexgate``; what computes the experts.
        free_slots: full slots beside those of the checkpoint's units, in place of ``max_experts``.
        low_ranks: of slots for low-rank experts, which come after all others.
        check_weights: read every tensor once and refuse NaN, infinity and magnitudes over a package's bound.
        revoked: units of the checkpoint that must not be loaded: revoked, or replaced by packages.
        least_slots: slots that experts added earlier take, whatever the default would be.
        weights_epoch: the newest change of what is loaded; the slot epoch of what the checkpoint holds.
    """

    model: Path
    max_experts: int | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    moe_kernels: str = "vllm"
    free_slots: int | None = None
    low_ranks: tuple[int, ...] = ()
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    check_weights: bool = True
    shutdown_timeout: int = 30
    revoked: frozenset[str] = frozenset()
    least_slots: int = 0
    weights_epoch: int = 1


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What a start will do, known before vLLM is loaded."""

    settings: EngineSettings
    checkpoint: Checkpoint
    slots: SlotPlan
    dtype: str

    @property
    def table(self) -> SlotTable:
        """Which slot holds which expert at start."""
        experts = self.checkpoint.experts
        without = [slot for slot, expert in enumerate(experts) if expert.id in self.settings.revoked]
        map_ = SlotMap.of_checkpoint(
            self.checkpoint.ownership.unit_LE, len(experts), self.slots.slots, self.settings.low_ranks
        )
        return SlotTable.at_start(map_, len(experts), without, slot_epoch=self.settings.weights_epoch)


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A running engine that has proved its gate: the handlers' client, and the control of its slots."""

    client: "GatedEngineClient"
    slots: "SlotOperator"


def plan(settings: EngineSettings) -> LaunchPlan:
    """Check the environment, the checkpoint and the memory; start nothing.

    Raises:
        CheckpointError: the model directory cannot be served, in one sentence.
        RefusedConfigurationError: the environment would open the engine, or the kernels asked for cannot run.
    """
    refuse_environment()
    refuse_missing_kernels(settings.moe_kernels)
    if not settings.model.is_dir():
        raise CheckpointError(f"{settings.model} is not a directory")
    checkpoint = read_checkpoint(settings.model)
    if settings.dtype not in ("auto", "float32", "bfloat16"):
        raise CheckpointError(f"--dtype {settings.dtype}: use auto, bfloat16 or float32 (float16 overflows)")
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    require_servable(checkpoint, settings, dtype, on_cpu=on_cpu())
    require_readable_texts(settings.model, checkpoint.architecture.vocab_size)
    slots = plan_slots(
        checkpoint,
        dtype=dtype,
        kv_bytes=settings.kv_cache_memory_bytes or _default_kv_bytes(checkpoint, settings, dtype),
        available_bytes=_available_bytes(settings),
        max_experts=_max_experts(settings, checkpoint),
        least=settings.least_slots,
        low_ranks=settings.low_ranks,
        ranks=settings.tensor_parallel_size,
        expert_parallel=settings.enable_expert_parallel,
        prefix_caching=settings.enable_prefix_caching,
    )
    return LaunchPlan(settings, checkpoint, slots, dtype)


def _max_experts(settings: EngineSettings, checkpoint: Checkpoint) -> int | None:
    if settings.free_slots is None:
        return settings.max_experts
    return max(settings.least_slots, len(checkpoint.experts) + settings.free_slots)


def refuse_missing_kernels(moe_kernels: str) -> None:
    """Refuse kernels that cannot run here; others are never put in their place."""
    if moe_kernels not in MOE_KERNELS:
        raise RefusedConfigurationError(f"--moe-kernels {moe_kernels}: use {' or '.join(MOE_KERNELS)}")
    if moe_kernels == "flexgate":
        import torch

        from flexgate.kernels.errors import KernelUnavailableError
        from flexgate.kernels.gated_experts import gated_experts_implementation

        try:
            gated_experts_implementation(torch.device("cpu" if on_cpu() else "cuda"))
        except KernelUnavailableError as error:
            raise RefusedConfigurationError(f"--moe-kernels flexgate: {error}") from error


@asynccontextmanager
async def launch(
    settings: EngineSettings, stage: Stage = _silent, *, clock: Callable[[], float]
) -> AsyncIterator[RunningEngine]:
    """Start the engine, prove the gate on every rank, yield it, stop it.

    Args:
        stage: told what is happening, for a progress display.
        clock: by which requests end, in Unix seconds; the same as the server's.

    Raises:
        CheckpointError, RefusedConfigurationError: before vLLM is loaded.
        UntestedVersionError: another vLLM than the ones tested is installed.
        HandshakeError, CanaryError: a rank does not gate; nothing was served.
        EngineDeadError: it died, or it hung and was ended, before it had proved itself.
    """
    planned = plan(settings)
    if settings.check_weights:
        require_bounded(planned.checkpoint, lambda done, total: stage("checking weights", done, total))
    key = new_seal_key()
    prepare_environment(key, settings)
    stage("loading vLLM", 0, 0)
    with ExitStack() as starting:
        early = None
        if on_cpu():
            early = starting.enter_context(EarlyProcess(modules_of_core(settings.tensor_parallel_size)))
        from flexgate.server.engine.seam.engine import (
            engine_core_of,
            require_tested_version,
            serialized_tokenizer,
            validate_no_grammar_here,
        )

        require_tested_version()
        from flexgate.server.engine.frontend.slot_control import SlotOperator
        from flexgate.server.engine.frontend.watchdog import Heartbeat, end_if_it_hangs
        from flexgate.server.engine.seam.frontend import AsyncLLM

        if early is not None:
            starting.enter_context(engine_core_of(EarlyContext(early)))
        config = engine_config(planned)
        refuse_untried(config)
        stage("starting the engine", 0, 0)
        engine = AsyncLLM.from_vllm_config(config, disable_log_stats=False)
    slots = SlotOperator(engine)
    heartbeat = Heartbeat()
    watching = asyncio.create_task(end_if_it_hangs(slots, heartbeat))
    compiler = Compiler()
    try:
        stage("proving the gate", 0, 0)
        if engine.renderer.tokenizer is not None:
            validate_no_grammar_here()
            await compiler.start(serialized_tokenizer(engine))
        yield RunningEngine(await _prove(engine, planned, key, heartbeat, clock, compiler), slots)
    finally:
        watching.cancel()
        await compiler.stop()
        await asyncio.to_thread(engine.shutdown, settings.shutdown_timeout)


def prepare_environment(key: SealKey, settings: EngineSettings) -> None:
    """Set what vLLM's processes read when they start: no telemetry, no hub, our plugin only."""
    os.environ[SEAL_KEY_VARIABLE] = key.hex()
    os.environ["VLLM_PLUGINS"] = "flexgate"
    os.environ.pop(TRACES_VARIABLE, None)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        os.environ[name] = "1"
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if settings.enforce_eager:
        # vLLM compiles one sampling function at the first request with logprobs: 16 s on CPU.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if on_cpu():
        # vLLM binds one OpenMP thread per core, next to the API process: steps then wait for
        # each other's threads. Leave the API process a core.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_config(planned: LaunchPlan, **tuning: Any) -> Any:
    """The ``VllmConfig`` of a plan; ``tuning`` overrides engine arguments (tests, benchmarks)."""
    from flexgate.server.engine.seam.engine import keep_one_rank_in_the_engine_core
    from flexgate.server.engine.seam.frontend import AsyncEngineArgs, StructuredOutputsConfig

    settings = planned.settings
    scheduler = "GatedAsyncScheduler" if settings.async_scheduling else "GatedScheduler"
    model = str(settings.model.resolve())
    kv_bytes = planned.slots.kv_bytes if on_cpu() else settings.kv_cache_memory_bytes
    has_tokenizer = (settings.model / "tokenizer_config.json").is_file()
    arguments: dict[str, Any] = {
        "model": model,
        # Else vLLM prefers what it takes for Mistral's files to those that were checked.
        "config_format": "hf",
        "load_format": "safetensors",
        "tokenizer_mode": "hf",
        "served_model_name": settings.model.name,
        "dtype": planned.dtype,
        "skip_tokenizer_init": not has_tokenizer,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "kv_cache_memory_bytes": kv_bytes,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_expert_parallel": settings.enable_expert_parallel,
        "expert_placement_strategy": "round_robin",
        "distributed_executor_backend": "uni" if settings.tensor_parallel_size == 1 else "mp",
        "enable_prefix_caching": settings.enable_prefix_caching,
        "async_scheduling": settings.async_scheduling,
        # vLLM would fall back to backends that follow a schema's references without end, and keep the one that the
        # first request got. Free white space is where a small model goes on until its length ends.
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        "trust_remote_code": False,
        "enable_log_requests": False,
        "use_tqdm_on_load": False,
        "worker_cls": "flexgate.server.engine.worker.worker.GatedWorker",
        "scheduler_cls": f"flexgate.server.engine.core.scheduler.{scheduler}",
        # The one of vLLM's CUDA backends that leaves weights as hot-add writes them.
        "moe_backend": "auto" if on_cpu() else "triton",
        "additional_config": planned.table.to_config() | {MOE_KERNELS_KEY: settings.moe_kernels},
    }
    config = AsyncEngineArgs(**(arguments | tuning)).create_engine_config()
    keep_one_rank_in_the_engine_core(config)
    return config


def on_cpu() -> bool:
    """Whether there is no GPU to run on."""
    import torch

    return not torch.cuda.is_available()


def _default_kv_bytes(checkpoint: Checkpoint, settings: EngineSettings, dtype: str) -> int:
    tokens = settings.max_model_len or checkpoint.architecture.max_position_embeddings
    longest = kv_bytes_of_one_request(checkpoint, tokens, dtype=dtype, ranks=settings.tensor_parallel_size)
    return max(CPU_KV_BYTES, longest)


def _available_bytes(settings: EngineSettings) -> int:
    import torch

    if not on_cpu():
        return int(torch.cuda.mem_get_info()[0] * settings.gpu_memory_utilization)
    import psutil

    # Ranks on CPU share the machine's memory.
    return int(psutil.virtual_memory().available * settings.gpu_memory_utilization) // settings.tensor_parallel_size


async def _prove(
    engine: Any,
    planned: LaunchPlan,
    key: SealKey,
    heartbeat: "Heartbeat",
    clock: Callable[[], float],
    compiler: Compiler,
) -> "GatedEngineClient":
    from flexgate.server.engine.frontend.canary import self_test
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.engine.protocol.handshake import describe_kernels, verify
    from flexgate.server.engine.seam.engine import ask_ranks

    reports = await ask_ranks(engine, "flexgate_handshake")
    verify(
        reports,
        world_size=planned.settings.tensor_parallel_size,
        table=planned.table,
        layers=planned.checkpoint.moe_layers,
        architecture=planned.checkpoint.kind.architecture,
        routing=[planned.checkpoint.architecture.num_experts_per_tok, *planned.checkpoint.routing.facts],
        key=key,
        expert_parallel=planned.settings.enable_expert_parallel,
        moe_kernels=planned.settings.moe_kernels,
    )
    client = GatedEngineClient(
        engine,
        key=key,
        experts=_expert_infos(planned),
        slot_map=planned.table.map,
        weights_epoch=planned.settings.weights_epoch,
        answers=heartbeat.fresh,
        clock=clock,
        compiler=compiler if engine.renderer.tokenizer is not None else None,
        ungated=planned.checkpoint.ungated,
    )
    client.kernels = describe_kernels(reports)
    await self_test(engine, client)
    require_unchanged(planned.checkpoint)
    heartbeat.beat()
    client.mark_ready()
    return client


def _expert_infos(planned: LaunchPlan) -> "tuple[ExpertInfo, ...]":
    from flexgate.server.engine.frontend.calls import ExpertInfo

    live = planned.table.live
    return tuple(
        ExpertInfo(entry.id, entry.owner, entry.domain, slot, live[slot], live=True)
        for slot, entry in enumerate(planned.checkpoint.experts)
        if slot in live
    )
