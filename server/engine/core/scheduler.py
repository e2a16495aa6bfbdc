"""vLLM's schedulers with gates that end early, slots that change, and attribution on every output."""

import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexgate.server.engine.core.grammars import FollowedGrammar, Patience, take_sealed_constraints
from flexgate.server.engine.core.guard import EngineGuard, seal_key_from_environment
from flexgate.server.engine.core.parent_watchdog import end_with_parent, leave_interrupts_to_the_server
from flexgate.server.engine.protocol.clock import Clock
from flexgate.server.engine.protocol.endings import EXPERT_REVOKED, GATE_EXPIRED, NUMBERS_OVERFLOWED
from flexgate.server.engine.protocol.gates import Gate
from flexgate.server.engine.protocol.names import SLOTS_UTILITY, USAGE_ATTRIBUTE, USAGE_KEY
from flexgate.server.engine.protocol.slots import ANCHOR_SLOT, SlotTable
from flexgate.server.engine.protocol.usage import UsageLedger
from flexgate.server.engine.seam.engine import (
    AsyncScheduler,
    BlockHash,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    ModelRunnerOutput,
    Request,
    RequestStatus,
    Scheduler,
    SchedulerOutput,
    cached_among,
    clear_reused_blocks,
    evict_cached,
    offer_to_engine_core,
)
from flexgate.server.engine.seam.requests import guard_requests

logger = logging.getLogger(__name__)


if TYPE_CHECKING:

    class _Base(Scheduler):
        """What the mixin may call."""
else:
    _Base = object


@dataclass(frozen=True, slots=True)
class _Held:
    """A request that has not ended, and its gate."""

    request: Request
    gate: Gate

    def may_use(self, slot: int) -> bool:
        return any(ref.slot == slot for ref in self.gate.slots)


class _Gated(_Base):
    """Mixin over :class:`Scheduler`; installing it installs guard and parent watchdog, so none is alone."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        end_with_parent()
        leave_interrupts_to_the_server()
        self._table = SlotTable.from_config(vllm_config.additional_config)
        self._clock = Clock()
        key = seal_key_from_environment()
        guard_requests(EngineGuard(key, self._table, self._clock))
        self._patience = Patience(take_sealed_constraints(key))
        clear_reused_blocks()
        offer_to_engine_core(SLOTS_UTILITY, _change_slots)
        self._ledger = UsageLedger(self._table.total)
        self._held: dict[str, _Held] = {}
        self._constrained: dict[str, Request] = {}
        self._next_deadline = math.inf
        self._ended: list[tuple[Request, str, list[Any] | None]] = []  # why, and what it has used
        self._hashes: dict[int, set[BlockHash]] = defaultdict(set)
        super().__init__(vllm_config, *args, **kwargs)

    def add_request(self, request: Request) -> None:
        """Queue a request that the guard has passed."""
        gate: Gate = request.flexgate_gate  # absent without the guard: the engine stops
        self._ledger.open(request.request_id, request.num_prompt_tokens)
        self._held[request.request_id] = _Held(request, gate)
        self._next_deadline = min(self._next_deadline, gate.valid_until)
        if request.use_structured_output:
            self._constrained[request.request_id] = request
        super().add_request(request)
        if request.priority < 0:  # a canary's: the next free place is its own, and all others keep their order
            self.waiting.remove_request(request)
            self.waiting.prepend_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """End requests whose gate has expired or whose mask will not come, then schedule the rest."""
        if self._constrained:
            self._leave_out_unmasked()
        now = self._clock()
        if now >= self._next_deadline:
            self._expire(now)
        return super().schedule(*args, **kwargs)

    def open_slot(self, slot: int, slot_epoch: int) -> None:
        """Let gates name a slot that every rank has opened; raises `SlotError`."""
        self._table.open(slot, slot_epoch)

    def close_slot(self, slot: int) -> dict[str, int]:
        """Refuse gates that name ``slot``, end requests that do, forget the KV cache they made.

        Returns:
            How many requests ended, and how many cached blocks were evicted.

        Raises:
            SlotError: the slot is free, or the anchor's.
        """
        self._table.close(slot)
        users = [request_id for request_id, held in self._held.items() if held.may_use(slot)]
        self._end(users, EXPERT_REVOKED)
        evicted = evict_cached(self, self._hashes.pop(slot, ()))
        return {"ended": len(users), "evicted_blocks": evicted}

    def users_of(self, slot: int) -> int:
        """Requests that have not ended and may use ``slot``."""
        return sum(held.may_use(slot) for held in self._held.values())

    def waiting_for(self, slot: int) -> int:
        """Requests that may use ``slot`` and are not in the running batch."""
        users = (held.request for held in self._held.values() if held.may_use(slot))
        return sum(request.status != RequestStatus.RUNNING for request in users)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Add the step's attribution, attach each request's total to its output, end requests that overflowed."""
        self._check_sampled(model_runner_output)
        self._end_unmasked()  # before what was sampled without a mask, or against it, is taken for an answer
        usage = getattr(model_runner_output, USAGE_ATTRIBUTE, None)
        if usage is not None:
            if usage.overflowed:  # without what this step has routed by numbers that are none
                self._end_overflowed(usage.overflowed)
            self._ledger.add(usage)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for batch in outputs.values():
            for output in batch.outputs:
                self._attach(output)
        self._report_ended(outputs)
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        """Finish requests from outside and forget their totals."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._forget(request.request_id)
        return finished

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled: not before its mask is there."""
        ready = super()._handle_blocked_waiting_request(request)
        grammar = _grammar_of(request)
        return ready and (grammar is None or grammar.ready)

    def _leave_out_unmasked(self) -> None:
        """Take the masks that were made, and keep running requests that have none yet out of the next step."""
        running = [request for request in self._constrained.values() if request.status == RequestStatus.RUNNING]
        grammars = [grammar for request in running if (grammar := _grammar_of(request)) is not None]
        self._patience.wait(grammars)
        self._end_unmasked()
        for request in running:
            grammar = _grammar_of(request)
            # With asynchronous scheduling, what the mask depends on may still be in the making.
            if request.num_output_placeholders or (grammar is not None and not grammar.ready):
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)

    def _check_sampled(self, output: ModelRunnerOutput) -> None:
        for name, request in self._constrained.items():
            grammar, index = _grammar_of(request), output.req_id_to_index.get(name)
            sampled = [] if index is None or not output.sampled_token_ids else output.sampled_token_ids[index]
            if grammar is not None and sampled:
                grammar.check(sampled[0])

    def _end_unmasked(self) -> None:
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, request in self._constrained.items():
            grammar = _grammar_of(request)
            if grammar is not None and grammar.failure is not None:
                reasons[grammar.failure].append(name)
        for reason, names in reasons.items():
            self._end(names, reason)

    def _expire(self, now: float) -> None:
        self._end([name for name, held in self._held.items() if held.gate.valid_until <= now], GATE_EXPIRED)
        self._next_deadline = min((held.gate.valid_until for held in self._held.values()), default=math.inf)

    def _end_overflowed(self, request_ids: list[str]) -> None:
        """End requests before the token just sampled is sent, and forget the KV cache they made."""
        held = [self._held[request_id] for request_id in request_ids if request_id in self._held]
        for one in held:
            slots = [ref.slot for ref in one.gate.slots]
            logger.warning("the numbers of request %s overflowed; it may use slots %s", one.request.request_id, slots)
        self._end([one.request.request_id for one in held], NUMBERS_OVERFLOWED)
        for one in held:
            evict_cached(self, one.request.block_hashes)

    def _end(self, request_ids: list[str], reason: str) -> None:
        used = {name: total.to_wire() for name in request_ids if (total := self._ledger.totals.get(name)) is not None}
        finished = self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR)
        self._ended += [(request, reason, used.get(request.request_id)) for request in finished]

    def _forget(self, request_id: str) -> None:
        self._ledger.close(request_id)
        self._constrained.pop(request_id, None)
        held = self._held.pop(request_id, None)
        if held is not None:
            self._remember_hashes(held)

    def _remember_hashes(self, held: _Held) -> None:
        """Note which cached blocks a slot's expert took part in, to evict them when it is revoked."""
        hashes = held.request.block_hashes
        for ref in held.gate.slots:
            if ref.slot == ANCHOR_SLOT or not hashes:
                continue
            known = self._hashes[ref.slot]
            known.update(hashes)
            if len(known) > 2 * self.cache_config.num_gpu_blocks:
                self._hashes[ref.slot] = cached_among(self, known)

    def _attach(self, output: EngineCoreOutput) -> None:
        total = self._ledger.totals.get(output.request_id)
        if total is None:
            return
        output.kv_transfer_params = {USAGE_KEY: total.to_wire()}
        if output.finished:
            self._forget(output.request_id)

    def _report_ended(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        by_client: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        for request, reason, used in self._ended:
            logger.info("ended request %s: %s", request.request_id, reason)
            by_client[request.client_index].append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    stop_reason=reason,
                    kv_transfer_params=None if used is None else {USAGE_KEY: used},
                )
            )
        self._ended = []
        for client_index, ended in by_client.items():
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.extend(ended)


def _grammar_of(request: Request) -> FollowedGrammar | None:
    """A request's grammar, once it is known."""
    constrained = request.structured_output_request
    grammar = None if constrained is None else constrained.grammar
    return grammar if isinstance(grammar, FollowedGrammar) else None


def _change_slots(scheduler: _Gated, command: dict[str, Any]) -> Any:
    """Serve a command of the API process: ``open``, ``close``, ``users`` or ``waiting`` of a slot."""
    slot = int(command["slot"])
    if command["do"] == "open":
        return scheduler.open_slot(slot, int(command["slot_epoch"]))
    does = {"close": scheduler.close_slot, "users": scheduler.users_of, "waiting": scheduler.waiting_for}
    return does[command["do"]](slot)


class GatedScheduler(_Gated, Scheduler):
    """For synchronous scheduling."""


class GatedAsyncScheduler(_Gated, AsyncScheduler):
    """For asynchronous scheduling."""
