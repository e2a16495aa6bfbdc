"""The only engine handle that request handlers get: an explicit list, no pass-through.

vLLM's handlers call :meth:`GatedEngineClient.generate`. Whatever they pass, the request
goes out under our own id, with the gate of the call that is current, sealed for that id.
Without a current call nothing goes out.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.exceptions import VLLMValidationError

from flexgate.kernels.gated_topk import MASS_SCALE
from flexgate.server.engine.endings import EXPERT_REVOKED, GATE_EXPIRED, NUMBERS_OVERFLOWED
from flexgate.server.engine.gates import (
    GATE_ARG,
    Gate,
    GateError,
    SealKey,
    SlotLease,
    cache_salt,
    seal,
)
from flexgate.server.engine.scheduler import USAGE_KEY
from flexgate.server.engine.seam import EngineCoreOutput, EngineGenerateError, see_requests, take_output_extras

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ExpertLease:
    """One tenancy of a slot by a named expert."""

    expert: str
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class ExpertInfo:
    """A loaded expert, as operators see it."""

    id: str
    owner: str
    domain: str
    slot: int
    generation: int
    live: bool

    @property
    def lease(self) -> ExpertLease:
        """What a gate names of it."""
        return ExpertLease(self.id, self.slot, self.generation)


@dataclass(frozen=True, slots=True)
class GateGrant:
    """What a decision allows, in the engine's terms. ``valid_until`` is Unix seconds or inf."""

    tenant: str
    experts: tuple[ExpertLease, ...]
    valid_until: float


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """One expert's part in a call.

    ``gate_mass``: routing weight summed over positions, averaged over layers.
    ``tokens``: positions where the expert was chosen in at least one layer.
    """

    expert: str
    gate_mass: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Attribution:
    """All loaded experts' parts in a call, over all its prompts and choices."""

    experts: tuple[ExpertUse, ...]
    cached_prompt_tokens: int


@dataclass(slots=True, eq=False)
class GatedCall:
    """One API call: the gate all its engine requests share, and what they used.

    Attributes:
        failed: why a request of this call was ended early, if it was.
        valid_until: Unix seconds from which no more tokens are given, for the reason `expired`.
        ended: set once nothing of this call's answer is left to send.
        priority: below zero goes ahead of all that waits; for canaries alone.
        reserve: told how many tokens the call can use in all, before the engine gets its prompts; raises to refuse.
        prompt_only: the answer is the prompt itself; the one token that vLLM generates all the same is dropped.
    """

    grant: GateGrant
    client_salt: str | None = None
    failed: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    priority: int = 0
    valid_until: float = math.inf
    expired: str | None = None
    reserve: Callable[[int], None] | None = None
    _most_tokens: int = 0
    prompt_only: bool = False
    _usage: dict[str, list[Any]] = field(default_factory=dict)
    _names: tuple[str | None, ...] = ()
    _layers: int = 1
    _prompt_tokens: dict[str, int] = field(default_factory=dict)
    _cached_tokens: dict[str, int] = field(default_factory=dict)
    _new_tokens: int = 0

    def tokens(self) -> int:
        """Prompt and new tokens so far, over all prompts and choices, whether or not anybody has read them."""
        return sum(self._prompt_tokens.values()) + self._new_tokens

    def end_at(self, valid_until: float, reason: str) -> None:
        """Give no more tokens from a time on, unless that is said of an earlier one already."""
        if valid_until < min(self.valid_until, self.grant.valid_until):
            self.valid_until, self.expired = valid_until, reason

    def claim(self, tokens: int) -> None:
        """Reserve what one more prompt and its choices can use; raises what `reserve` raises."""
        self._most_tokens += tokens
        if self.reserve is not None:
            self.reserve(self._most_tokens)

    def count_prompt(self, request_id: str, tokens: int) -> None:
        """Count the prompt of an engine request, once for all its choices."""
        self._prompt_tokens[request_id] = tokens

    def cached_tokens(self) -> int:
        """Prompt tokens that were read from the cache, each prompt counted once for all its choices."""
        return sum(self._cached_tokens.values())

    def count_new(self, tokens: int) -> None:
        """Count tokens that the engine has just generated."""
        self._new_tokens += tokens

    def attribution(self) -> Attribution:
        """Totals so far; complete once every output of the call has been seen."""
        masses = [0] * len(self._names)
        tokens = [0] * len(self._names)
        cached = 0
        for request_cached, request_masses, request_tokens in self._usage.values():
            cached += request_cached
            for slot in range(len(self._names)):
                masses[slot] += request_masses[slot]
                tokens[slot] += request_tokens[slot]
        scale = MASS_SCALE * self._layers
        uses = (
            ExpertUse(name, masses[slot] / scale, tokens[slot])
            for slot, name in enumerate(self._names)
            if name is not None
        )
        return Attribution(tuple(uses), cached)

    def used_slots(self) -> frozenset[int]:
        """Slots that carried anything, whoever is in them."""
        totals = [(masses, tokens) for _, masses, tokens in self._usage.values()]
        return frozenset(
            slot for masses, tokens in totals for slot in range(len(masses)) if masses[slot] or tokens[slot]
        )


CURRENT_CALL: ContextVar[GatedCall | None] = ContextVar("flexgate_current_call", default=None)


class GatedEngineClient:
    """Generation under a sealed gate, and the read-only facts that handlers need."""

    def __init__(
        self,
        engine: Any,
        *,
        key: SealKey,
        experts: tuple[ExpertInfo, ...],
        slots: int,
        answers: Callable[[], bool],
        weights_epoch: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``engine`` is an ``AsyncLLM`` started by :func:`flexgate.server.engine.launch.launch`.

        ``answers`` tells whether its engine core has answered of late.
        """
        self._answers = answers
        self._engine = engine
        self._key = key
        self._slots = slots
        self._clock = clock
        self._calls: dict[str, GatedCall] = {}
        self._open: set[GatedCall] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._aborting: set[asyncio.Future[Any]] = set()
        self._layers = int(engine.model_config.hf_config.num_hidden_layers)
        self._ready = False
        self.publish(experts, weights_epoch)
        self.kernels = ""  # what computes the experts, as every rank reported it
        see_requests(engine, self._see)
        take_output_extras(engine, self._take)

    # What flexgate's own routes ask.

    def experts(self) -> tuple[ExpertInfo, ...]:
        """Loaded experts in slot order."""
        return self._experts

    def ready(self) -> bool:
        """Whether the handshake and the canary passed and the engine core lives and answers."""
        return self._ready and not self._engine.errored and self._answers()

    def mark_ready(self) -> None:
        """Called by the launcher once every rank has proved itself."""
        self._ready = True

    def lease(self, expert: str) -> ExpertLease | None:
        """The present tenancy of a live expert, or None."""
        for info in self._experts:
            if info.id == expert and info.live:
                return info.lease
        return None

    @property
    def slots(self) -> int:
        """Expert slots of the engine, free ones included."""
        return self._slots

    def publish(self, experts: tuple[ExpertInfo, ...], weights_epoch: int) -> None:
        """Let gates be sealed for exactly these experts from now on: the one flip of a hot-add."""
        self._experts = tuple(sorted(experts, key=lambda info: info.slot))
        by_slot = {info.slot: info.id for info in experts}
        self._names = tuple(by_slot.get(slot) for slot in range(self._slots))
        self.weights_epoch = weights_epoch

    def begin(self, call: GatedCall) -> None:
        """A call was admitted; :meth:`end` must follow."""
        self._loop = asyncio.get_running_loop()
        self._open.add(call)

    def end(self, call: GatedCall) -> None:
        """Nothing of the call's answer is left to send."""
        self._open.discard(call)
        call.ended.set()

    def stop(self, call: GatedCall, reason: str) -> None:
        """Give no more tokens to a call, and end its requests in the engine. Safe from any thread."""
        call.failed = call.failed or reason
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._abort, call)

    def _abort(self, call: GatedCall) -> None:
        ids = [id_ for id_, owner in self._calls.items() if owner is call]
        if ids:
            task = asyncio.ensure_future(self._engine.abort(ids))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)

    def in_use(self, lease: ExpertLease) -> bool:
        """Whether an open call may use ``lease``, on its way into the engine, in it, or out of it."""
        return any(lease in call.grant.experts for call in self._open)

    def withdraw(self, lease: ExpertLease) -> tuple[GatedCall, ...]:
        """Give no more tokens to calls that may use ``lease``; returns those that are still open."""
        users = tuple(call for call in self._open if lease in call.grant.experts)
        for call in users:
            call.failed = EXPERT_REVOKED
        return users

    # What vLLM's handlers ask.

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""
        return self._engine.vllm_config

    @property
    def model_config(self) -> Any:
        """vLLM's model configuration."""
        return self._engine.model_config

    @property
    def renderer(self) -> Any:
        """vLLM's prompt renderer."""
        return self._engine.renderer

    @property
    def input_processor(self) -> Any:
        """vLLM's input processor."""
        return self._engine.input_processor

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
        """Generate under the current call's gate.

        LoRA adapters, priorities, data-parallel ranks, sessions, traces and cache hints
        that a handler may pass are dropped.

        Raises:
            GateError: no call is current in this context.
        """
        call = CURRENT_CALL.get()
        if call is None:
            raise GateError("a handler asked for tokens outside of an admitted call")
        call.claim(_most_tokens(prompt, sampling_params))
        return self._generate(
            call,
            prompt,
            sampling_params,
            prompt_text=prompt_text,
            tokenization_kwargs=tokenization_kwargs,
            reasoning_ended=reasoning_ended,
            reasoning_parser_kwargs=reasoning_parser_kwargs,
        )

    async def _generate(
        self, call: GatedCall, prompt: Any, sampling_params: SamplingParams, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        self._refuse_ended(call)
        request_id = f"flexgate-{uuid.uuid4().hex}"
        params = sampling_params.clone()
        params.extra_args = {GATE_ARG: seal(self._gate(call, request_id), self._key)}
        call._names, call._layers = self._names_for(call.grant), self._layers
        self._refuse_many_bad_words(params)
        self._calls[request_id] = call
        outputs = self._engine.generate(prompt, params, request_id, priority=call.priority, **options)
        prompt_logprobs = None
        try:
            async for output in outputs:
                self._refuse_ended(call)
                # Each choice's first output has them; where several wait to be read, vLLM keeps those of one.
                prompt_logprobs = output.prompt_logprobs = output.prompt_logprobs or prompt_logprobs
                call._cached_tokens.setdefault(request_id, output.num_cached_tokens or 0)
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
            del self._calls[request_id]

    def _refuse_ended(self, call: GatedCall) -> None:
        """Raise where a call may get no more tokens; vLLM itself answers for a request that the engine core ended."""
        if call.failed is None and call.valid_until <= self._clock():
            call.failed = call.expired
        if call.failed is not None and call.failed != GATE_EXPIRED:
            raise EngineGenerateError(f"the request was ended: {call.failed}")

    def _refuse_many_bad_words(self, params: SamplingParams) -> None:
        """Model Runner V2 ends the engine over more (vllm/v1/worker/gpu/sample/bad_words.py); nobody else counts."""
        if not params.bad_words:
            return
        params.update_from_tokenizer(self._engine.renderer.tokenizer)
        tokens = sum(map(len, params.bad_words_token_ids or ()))
        most = envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
        if tokens > most:
            raise VLLMValidationError(
                f"'bad_words' may have at most {most} tokens, with a space before each word and without, not {tokens}.",
                parameter="bad_words",
            )

    def _names_for(self, grant: GateGrant) -> tuple[str | None, ...]:
        """Who is in each slot, by this call's gate; an expert may have changed slots since it was granted, and a slot
        hands.
        """
        granted = {lease.expert for lease in grant.experts}
        names = [None if name in granted else name for name in self._names]
        for lease in grant.experts:
            names[lease.slot] = lease.expert
        return tuple(names)

    def _gate(self, call: GatedCall, request_id: str) -> Gate:
        grant = call.grant
        leases = tuple(sorted(SlotLease(e.slot, e.generation) for e in grant.experts))
        salt = cache_salt(
            self._key,
            tenant=grant.tenant,
            experts=[(e.expert, e.generation) for e in grant.experts],
            client_salt=call.client_salt,
        )
        return Gate(request_id, grant.tenant, leases, grant.valid_until, salt)

    def _see(self, request_id: str, prompt_tokens: int) -> None:
        call = self._calls.get(request_id)
        if call is not None:
            call.count_prompt(request_id, prompt_tokens)

    def _take(self, output: EngineCoreOutput, request_id: str | None) -> None:
        extras, output.kv_transfer_params = output.kv_transfer_params, None
        call = self._calls.get(request_id) if request_id is not None else None
        if call is None:
            return
        if not call.prompt_only:
            call.count_new(len(output.new_token_ids))
        if extras is not None:
            call._usage[output.request_id] = extras[USAGE_KEY]
        if output.stop_reason in (GATE_EXPIRED, EXPERT_REVOKED, NUMBERS_OVERFLOWED):
            call.failed = output.stop_reason


def _most_tokens(prompt: Any, params: SamplingParams) -> int:
    """What a prompt and all its choices use at most: vLLM's handlers cut `max_tokens` to the room that is left."""
    return len(prompt["prompt_token_ids"]) + params.n * (params.max_tokens or 0)
