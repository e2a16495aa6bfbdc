"""vLLM's schedulers with gates that expire and attribution on every output."""

import logging
import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from flexgate.server.engine.gates import Gate
from flexgate.server.engine.guard import EngineGuard, seal_key_from_environment
from flexgate.server.engine.seam import (
    AsyncScheduler,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    ModelRunnerOutput,
    Request,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
    guard_requests,
)
from flexgate.server.engine.slots import SlotTable
from flexgate.server.engine.usage import USAGE_ATTRIBUTE, UsageLedger

USAGE_KEY = "flexgate"  # key of ``EngineCoreOutput.kv_transfer_params``
GATE_EXPIRED = "gate_expired"  # stop reason of a request whose gate ran out

logger = logging.getLogger(__name__)


if TYPE_CHECKING:

    class _Base(Scheduler):
        """What the mixin may call."""
else:
    _Base = object


class _Gated(_Base):
    """Mixin over :class:`Scheduler`; installing it installs the guard, so neither is alone."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        table = SlotTable.from_config(vllm_config.additional_config)
        guard_requests(EngineGuard(seal_key_from_environment(), table))
        self._ledger = UsageLedger(table.total)
        self._deadlines: dict[str, float] = {}
        self._next_deadline = math.inf
        self._expired: list[Request] = []
        super().__init__(vllm_config, *args, **kwargs)

    def add_request(self, request: Request) -> None:
        """Queue a request that the guard has passed."""
        gate: Gate = request.flexgate_gate  # absent without the guard: the engine stops
        self._ledger.open(request.request_id, request.num_prompt_tokens)
        self._deadlines[request.request_id] = gate.valid_until
        self._next_deadline = min(self._next_deadline, gate.valid_until)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """End requests whose gate has expired, then schedule the rest."""
        now = time.time()
        if now >= self._next_deadline:
            self._expire(now)
        return super().schedule(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Add the step's attribution and attach each request's total to its output."""
        usage = getattr(model_runner_output, USAGE_ATTRIBUTE, None)
        if usage is not None:
            self._ledger.add(usage)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for batch in outputs.values():
            for output in batch.outputs:
                self._attach(output)
        self._report_expired(outputs)
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """Finish requests from outside and forget their totals."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._forget(request.request_id)
        return finished

    def _expire(self, now: float) -> None:
        late = [request_id for request_id, until in self._deadlines.items() if until <= now]
        self._expired += self.finish_requests(late, RequestStatus.FINISHED_ERROR)
        self._next_deadline = min(self._deadlines.values(), default=math.inf)

    def _forget(self, request_id: str) -> None:
        self._ledger.close(request_id)
        self._deadlines.pop(request_id, None)

    def _attach(self, output: EngineCoreOutput) -> None:
        total = self._ledger.totals.get(output.request_id)
        if total is None:
            return
        output.kv_transfer_params = {USAGE_KEY: total.to_wire()}
        if output.finished:
            self._forget(output.request_id)

    def _report_expired(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        by_client: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        for request in self._expired:
            logger.info("ended request %s: its gate has expired", request.request_id)
            by_client[request.client_index].append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=GATE_EXPIRED,
                )
            )
        self._expired = []
        for client_index, ended in by_client.items():
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.extend(ended)


class GatedScheduler(_Gated, Scheduler):
    """For synchronous scheduling."""


class GatedAsyncScheduler(_Gated, AsyncScheduler):
    """For asynchronous scheduling."""
