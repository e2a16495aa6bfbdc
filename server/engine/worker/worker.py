"""The worker that fills gates before every forward pass and reports attribution after it.

Model Runner V2 asks the model for its state class, :class:`GatedModelState`. Model
Runner V1 has no such place, so :class:`GatedWorker` puts a subclass under its runner.
"""

import functools
from typing import Any

import torch

from flexgate.server.engine.core.parent_watchdog import leave_interrupts_to_the_server
from flexgate.server.engine.protocol.handshake import RankReport, report_rank
from flexgate.server.engine.protocol.names import USAGE_ATTRIBUTE
from flexgate.server.engine.protocol.slot_tasks import TaskReport, from_wire
from flexgate.server.engine.protocol.slots import SlotTable
from flexgate.server.engine.seam.engine import (
    AsyncModelRunnerOutput,
    DefaultModelState,
    KVCacheConfig,
    ModelRunnerOutput,
    SchedulerOutput,
    allow_amx_tiles,
    answered,
    cache_places,
    clear_reused_blocks,
    current_platform,
)
from flexgate.server.engine.seam.worker import Worker as _Worker
from flexgate.server.engine.seam.worker import rewind_generators
from flexgate.server.engine.worker.gate_buffers import GateState, PendingUsage
from flexgate.server.engine.worker.slot_writer import SlotWriter


class _AsyncOutput(AsyncModelRunnerOutput):
    """An asynchronous output that adds the attribution when it is waited for."""

    def __init__(self, inner: AsyncModelRunnerOutput, usage: PendingUsage) -> None:
        self.inner = inner
        self.usage = usage

    def get_output(self) -> ModelRunnerOutput:
        """Wait for both copies."""
        return _with_usage(self.inner.get_output(), self.usage)


def _with_usage(output: ModelRunnerOutput, usage: PendingUsage) -> ModelRunnerOutput:
    """The step's output with the attribution of its requests, which the gated scheduler takes from it."""
    setattr(output, USAGE_ATTRIBUTE, usage.get())
    return output


def gated_runner(runner_cls: type[Any]) -> type[Any]:
    """Subclass a V1 model runner so that every forward pass sees filled gates."""

    class GatedModelRunner(runner_cls):
        """V1 runner: gates are filled once the batch's order is final."""

        def _preprocess(self, scheduler_output: SchedulerOutput, num_input_tokens: int, *args: Any, **kw: Any) -> Any:
            gates: GateState = self.get_model().gates
            gates.fill(self.input_batch.req_ids, num_input_tokens)
            return super()._preprocess(scheduler_output, num_input_tokens, *args, **kw)

        def _dummy_run(self, *args: Any, **kw: Any) -> Any:
            self.get_model().gates.close()
            return super()._dummy_run(*args, **kw)

    GatedModelRunner.__name__ = f"Gated{runner_cls.__name__}"
    return GatedModelRunner


class GatedModelState(DefaultModelState):
    """V2 runner: the same two moments, through vLLM's model-state interface."""

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Fill gates for a real batch; a dummy batch names no live request and stays closed."""
        gates: GateState = self.model.gates
        if gates.expects(input_batch.req_ids):
            gates.fill(input_batch.req_ids, input_batch.num_tokens_after_padding)
        else:
            gates.close()
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Close everything for capture."""
        self.model.gates.close()
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs


class GatedWorker(_Worker):
    """vLLM's worker with gates around each step; selected with ``--worker-cls``."""

    _usage: PendingUsage | None = None

    def init_device(self) -> None:
        """Build vLLM's model runner and put the gated one in its place."""
        leave_interrupts_to_the_server()
        clear_reused_blocks()
        if current_platform.is_cpu() and self.model_config.dtype is torch.bfloat16:
            allow_amx_tiles()
        super().init_device()
        if not self.use_v2_model_runner:
            runner = type(self.model_runner)
            self.model_runner.__class__ = gated_runner(
                rewind_generators(runner) if current_platform.is_cpu() else runner
            )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache, and what is remembered of each of its positions."""
        super().initialize_from_config(kv_cache_config)
        if self.cache_config.enable_prefix_caching:
            (group,) = kv_cache_config.kv_cache_groups
            gates: GateState = self.model_runner.get_model().gates
            gates.remember(kv_cache_config.num_blocks, group.kv_cache_spec.block_size)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one forward pass under this step's gates."""
        gates: GateState = self.model_runner.get_model().gates
        gates.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._usage = gates.collect(cache_places(self.model_runner))
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and attach the attribution of the forward pass just run."""
        output = super().sample_tokens(grammar_output)
        usage, self._usage = self._usage, None
        if usage is None or output is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _AsyncOutput(output, usage)
        return _with_usage(output, usage)

    @answered
    def flexgate_handshake(self) -> RankReport:
        """Prove to the launcher what this rank runs."""
        return report_rank(self)

    @answered
    def flexgate_load(self, slot: int, ticket: dict[str, Any]) -> None:
        """Start copying an expert's file into a masked slot, beside the steps."""
        self._table.require_masked(slot)
        self._slots.load(slot, from_wire(ticket))

    @answered
    def flexgate_clear(self, slot: int) -> None:
        """Start zeroing a masked slot, beside the steps."""
        self._table.require_masked(slot)
        self._slots.clear(slot)

    @answered
    def flexgate_task(self, slot: int) -> TaskReport:
        """How far the last :meth:`flexgate_load` or :meth:`flexgate_clear` of a slot is on this rank."""
        return self._slots.report(slot)

    @answered
    def flexgate_open(self, slot: int, slot_epoch: int) -> None:
        """Let gates name ``slot`` from the next step on."""
        self._table.open(slot, slot_epoch)

    @answered
    def flexgate_close(self, slot: int) -> None:
        """Let no gate name ``slot`` any more; a request that does must not be scheduled again."""
        self._table.close(slot)

    @answered
    def flexgate_digests(self) -> list[str]:
        """SHA-256 of what each slot holds on this rank; reads all of it, between two steps."""
        return [self._slots.digest(slot) for slot in range(self._table.total)]

    @property
    def _table(self) -> SlotTable:
        table: SlotTable = self.model_runner.get_model().gates.table
        return table

    @functools.cached_property
    def _slots(self) -> SlotWriter:
        layers = [layer.slot_arrays() for layer in self.model_runner.get_model().moe_layers()]
        return SlotWriter(layers)
