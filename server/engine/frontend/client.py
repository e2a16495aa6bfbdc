"""The only engine handle that request handlers get: an explicit list, no pass-through.

vLLM's handlers call :meth:`GatedEngineClient.generate`. Whatever they pass, the request
goes out under our own id, with the gate of the call that is current, sealed for that id
when its turn in the call's queue has come. Without a current call nothing goes out.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flexgate.server.engine.frontend.calls import CURRENT_CALL, ExpertInfo, ExpertSlotRef, GatedCall, Ticket
from flexgate.server.engine.frontend.constraining import Constrainer
from flexgate.server.engine.frontend.params import refuse_many_bad_words
from flexgate.server.engine.protocol.endings import (
    CONSTRAINT_SLOW,
    EXPERT_REVOKED,
    GATE_EXPIRED,
    LEDGER_UNAVAILABLE,
    OF_THE_ENGINE,
    POLICY_UNAVAILABLE,
    QUEUED_TOO_LONG,
)
from flexgate.server.engine.protocol.gates import GateError, SealKey, seal
from flexgate.server.engine.protocol.names import GATE_ARG, USAGE_KEY
from flexgate.server.engine.protocol.slots import SlotMap
from flexgate.server.engine.seam.engine import EngineCoreOutput, EngineGenerateError
from flexgate.server.engine.seam.frontend import make_prompt_logprobs_later
from flexgate.server.engine.seam.requests import see_requests, take_output_extras

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.constraints.compiler import Compiler
    from flexgate.server.engine.frontend.constraints.made import Constraint
    from flexgate.server.engine.seam.engine import SamplingParams
    from flexgate.server.engine.seam.frontend import RequestOutput

LOOK_AGAIN_SECONDS: Final = 1.0
"""How often the clock is read until a call's end: it may be set forward meanwhile."""


class _Running(NamedTuple):
    """A request that the engine has."""

    call: GatedCall
    ticket: Ticket | None
    constraint: Constraint | None


class GatedEngineClient:
    """Generation under a sealed gate, and the read-only facts that handlers need."""

    def __init__(
        self,
        engine: Any,
        *,
        key: SealKey,
        experts: tuple[ExpertInfo, ...],
        slot_map: SlotMap,
        answers: Callable[[], bool],
        clock: Callable[[], float],
        weights_epoch: int = 1,
        compiler: Compiler | None = None,
        ungated: Mapping[str, Any] = {},
    ) -> None:
        """``engine`` is an ``AsyncLLM`` started by :func:`flexgate.server.engine.frontend.launch.launch`.

        ``answers`` tells whether its engine core has answered of late; ``clock`` gives Unix seconds; without
        ``compiler``, no answer is constrained; ``ungated`` is what every token passes outside of the gates.
        """
        self._engine = engine
        # What vLLM's handlers read of an engine, apart from generation.
        self.vllm_config = engine.vllm_config
        self.model_config = engine.model_config
        self.renderer = engine.renderer
        self.input_processor = engine.input_processor
        self._answers = answers
        self._key = key
        self._constrainer = Constrainer(compiler, key)
        self.slot_map = slot_map
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._open: set[GatedCall] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timers: dict[GatedCall, asyncio.TimerHandle] = {}
        self._aborting: set[asyncio.Future[Any]] = set()
        self._layers = len(slot_map.moe_layers)
        self._ready = False
        self.publish(experts, weights_epoch)
        self.ungated = dict(ungated)
        self.kernels = ""  # what computes the experts and routes to them, as every rank reported it
        see_requests(engine, self._see)
        take_output_extras(engine, self._take)
        make_prompt_logprobs_later()

    def experts(self) -> tuple[ExpertInfo, ...]:
        """Loaded experts in slot order."""
        return self._experts

    def ready(self) -> bool:
        """Whether the handshake and the canary passed and the engine core lives and answers."""
        return self._ready and not self._engine.errored and self._answers()

    def mark_ready(self) -> None:
        """Called by the launcher once every rank has proved itself."""
        self._ready = True

    @property
    def errored(self) -> bool:
        """Whether the engine core died."""
        return bool(self._engine.errored)

    @property
    def dead_error(self) -> BaseException:
        """Why the engine core died."""
        error: BaseException = self._engine.dead_error
        return error

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """vLLM's queue limits."""
        self._engine.check_admission(n, request_id)

    def publish(self, experts: tuple[ExpertInfo, ...], weights_epoch: int) -> None:
        """Let gates be sealed for exactly these experts from now on: the one flip of a hot-add.

        `gates` remembers which slots sets of them have, once each was found to cover every layer.
        """
        self._experts = tuple(sorted(experts, key=lambda info: info.slot))
        self.refs: Mapping[str, ExpertSlotRef] = {info.id: info.ref for info in experts if info.live}
        self.slot_epochs = {info.id: info.slot_epoch for info in experts if info.live}
        by_slot = {info.slot: info.id for info in experts}
        self._names = tuple(by_slot.get(slot) for slot in range(self.slot_map.total))
        self.weights_epoch = weights_epoch
        self.gates: dict[tuple[str, ...], tuple[ExpertSlotRef, ...]] = {}  # last, so that it never holds older ones

    def slots_for(self, rank: int | None) -> tuple[int, ...]:
        """As `SlotMap.slots_for`."""
        return self.slot_map.slots_for(rank)

    def begin(self, call: GatedCall) -> None:
        """Register a call; :meth:`end` must follow."""
        self._loop = asyncio.get_running_loop()
        self._open.add(call)

    def end(self, call: GatedCall) -> None:
        """End a call whose response was sent; its requests in the engine are aborted."""
        self._open.discard(call)
        self._cancel_timer(call)
        self._abort(call)
        call.ended.set()

    def stop(self, call: GatedCall, reason: str) -> None:
        """Give no more tokens to a call, and end its requests in the queue and the engine. Safe from any thread."""
        call.failed = call.failed or reason
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._abort, call)

    def end_at(self, call: GatedCall, valid_until: float, reason: str) -> None:
        """Stop a call at a time (Unix seconds), unless it ends earlier. Safe from any thread."""
        call.end_at(valid_until, reason)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._watch_end, call)

    def _watch_end(self, call: GatedCall) -> None:
        """Stop a call whose end has come, or set a timer for it."""
        self._cancel_timer(call)
        if call not in self._open or call.failed is not None or call.expired is None:
            return
        left = call.valid_until - self._clock()
        if left <= 0:
            self.stop(call, call.expired)
        elif left < math.inf:
            loop = asyncio.get_running_loop()
            self._timers[call] = loop.call_later(min(left, LOOK_AGAIN_SECONDS), self._watch_end, call)

    def _cancel_timer(self, call: GatedCall) -> None:
        timer = self._timers.pop(call, None)
        if timer is not None:
            timer.cancel()

    def _abort(self, call: GatedCall) -> None:
        call.leave()
        ids = [id_ for id_, running in self._running.items() if running.call is call]
        if ids:
            task = asyncio.ensure_future(self._engine.abort(ids))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)

    def in_use(self, ref: ExpertSlotRef) -> bool:
        """Whether an open call may use ``ref``, on its way into the engine, in it, or out of it."""
        return any(ref in call.experts for call in self._open)

    def revoke(self, ref: ExpertSlotRef) -> tuple[GatedCall, ...]:
        """Give no more tokens to calls that may use ``ref``; returns those that are still open."""
        users = tuple(call for call in self._open if ref in call.experts)
        for call in users:
            call.failed = EXPERT_REVOKED
            call.leave()
        return users

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,  # noqa: ARG002 - replaced by our own
        *,
        prompt_text: str | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **_ignored: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate under the current call's gate, once the prompt's turn has come.

        LoRA adapters, priorities, data-parallel ranks, sessions, traces and cache hints
        that a handler may pass are dropped.

        `sampling_params` get the length that was reserved, where that is less: responses say it.

        Raises:
            GateError: no call is current in this context.
            Exception: what the call's `reserve` and `queue` raise.
        """
        call = CURRENT_CALL.get()
        if call is None:
            raise GateError("a handler asked for tokens outside of a gated call")
        prompt_tokens = len(prompt["prompt_token_ids"])
        _reserve(call, prompt_tokens, sampling_params)
        ticket = None if call.queue is None else call.queue(sampling_params.n, prompt_tokens)
        if ticket is not None:
            call._tickets.append(ticket)
        return self._generate(
            call,
            ticket,
            prompt,
            sampling_params,
            prompt_text=prompt_text,
            tokenization_kwargs=tokenization_kwargs,
            reasoning_ended=reasoning_ended,
            reasoning_parser_kwargs=reasoning_parser_kwargs,
        )

    async def _generate(
        self, call: GatedCall, ticket: Ticket | None, prompt: Any, sampling_params: SamplingParams, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self._refuse_ended(call)
        with nullcontext() if ticket is None else closing(ticket):
            params, constraint = sampling_params.clone(), None
            if params.bad_words:
                refuse_many_bad_words(params, self._engine.renderer.tokenizer)
            if params.structured_outputs is not None:
                constraint = await self._constrainer.constrain(call.tenant, params)
                self._refuse_ended(call)
            if ticket is not None:
                await self._await_turn(call, ticket)
            request_id = f"flexgate-{uuid.uuid4().hex}"
            call._names, call._layers = call.name_slots(self._names), self._layers
            params.extra_args = {GATE_ARG: seal(call.gate(request_id, self._key), self._key)}
            self._running[request_id] = _Running(call, ticket, constraint)
            outputs = self._engine.generate(prompt, params, request_id, priority=call.priority, **options)
            prompt_logprobs = None
            try:
                async for output in outputs:
                    if call.record is not None and not await call.record():
                        call.failed = call.failed or LEDGER_UNAVAILABLE
                        raise EngineGenerateError(f"the request was ended: {LEDGER_UNAVAILABLE}")
                    self._refuse_ended(call)
                    # Each choice's first output has them; where several wait to be read, vLLM keeps those of one.
                    prompt_logprobs = output.prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                    if call.finish_reasons is not None:
                        call.finish_reasons |= _finished(output)
                    if call.keep_answers and output.finished and not call.prompt_only:
                        call.answers += [(output.prompt_token_ids, list(part.token_ids)) for part in output.outputs]
                    if call.prompt_only:
                        for part in output.outputs:
                            part.token_ids, part.text = [], ""
                    yield output
            except Exception:
                # vLLM keeps a request that it could not hand over to the engine core.
                await self._engine.abort(request_id)
                raise
            finally:
                await outputs.aclose()
                del self._running[request_id]

    async def _await_turn(self, call: GatedCall, ticket: Ticket) -> None:
        """Wait in the queue; raises if the turn did not come in time or the call lost its right meanwhile."""
        right_ends = min(call.valid_until, call.gate_until)
        seated = ticket.seated or await ticket.wait(right_ends - self._clock())
        self._refuse_ended(call)
        if call.gate_until <= self._clock():
            call.failed = GATE_EXPIRED
        elif not seated:
            call.failed = QUEUED_TOO_LONG
        elif call.confirmed is not None and not call.confirmed():
            call.failed = POLICY_UNAVAILABLE
        else:
            return
        raise EngineGenerateError(f"the request was ended in the queue: {call.failed}")

    def _refuse_ended(self, call: GatedCall) -> None:
        """Raise if a call may get no more tokens; vLLM reports a request that the engine core ended by itself."""
        if call.failed is None and call.expired is not None and call.valid_until <= self._clock():
            call.failed = call.expired
        if call.failed is not None and call.failed != GATE_EXPIRED:
            raise EngineGenerateError(f"the request was ended: {call.failed}")

    def _see(self, request_id: str, prompt_tokens: int) -> None:
        running = self._running.get(request_id)
        if running is not None:
            running.call.count_prompt(request_id, prompt_tokens)

    def _take(self, output: EngineCoreOutput, request_id: str | None) -> None:
        extras, output.kv_transfer_params = output.kv_transfer_params, None
        running = self._running.get(request_id or "")
        if running is None:
            return
        call, ticket, constraint = running
        if ticket is not None:
            ticket.use(len(output.new_token_ids))
            if output.finished:
                ticket.release()
        if not call.prompt_only:
            call.count_new(len(output.new_token_ids))
        if extras is not None:
            call.count_usage(request_id or "", output.request_id, extras[USAGE_KEY])
        if output.stop_reason in OF_THE_ENGINE:
            expired = call.expired if output.stop_reason == GATE_EXPIRED else None
            call.failed = call.failed or expired or output.stop_reason
        if output.stop_reason == CONSTRAINT_SLOW and constraint is not None:
            self._constrainer.avoid(call.tenant, constraint)


def _reserve(call: GatedCall, prompt_tokens: int, params: SamplingParams) -> None:
    """Reserve what a prompt and its choices can use; each is cut to its part of what is reserved."""
    before = call._most_tokens + prompt_tokens
    call._most_tokens = before + params.n * (params.max_tokens or 0)
    if call.reserve is None:
        return
    least = before + params.n * min(max(params.min_tokens, 1), params.max_tokens or 0)
    reserved = call.reserve(least=least, most=call._most_tokens)
    if reserved < call._most_tokens:
        params.max_tokens = call.cut_to = (reserved - before) // params.n
        call._most_tokens = before + params.n * params.max_tokens


def _finished(output: RequestOutput) -> dict[tuple[str, int], str]:
    """Why choices of a request have finished."""
    return {(output.request_id, part.index): part.finish_reason for part in output.outputs if part.finish_reason}
