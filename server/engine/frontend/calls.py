"""One API call in the engine: what a decision allows, what its requests share, and what they used."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol

from flexgate.kernels.gated_topk import MASS_SCALE
from flexgate.server.engine.protocol.gates import Gate, SealKey, SlotRef, cache_salt


@dataclass(frozen=True, slots=True)
class ExpertSlotRef:
    """One assignment of a slot to a named expert. `package` is the digest of its weights, where that is known."""

    expert: str
    slot: int
    slot_epoch: int
    package: str | None = field(default=None, compare=False)


def bitmask_of(refs: Iterable[ExpertSlotRef]) -> int:
    """The slots of these experts as bits, as a gate has them."""
    return sum(1 << ref.slot for ref in refs)


@dataclass(frozen=True, slots=True)
class ExpertInfo:
    """A loaded expert, as operators see it."""

    id: str
    owner: str | None
    domain: str
    slot: int
    slot_epoch: int
    live: bool
    package: str | None = None

    @property
    def ref(self) -> ExpertSlotRef:
        """What a gate names of it."""
        return ExpertSlotRef(self.id, self.slot, self.slot_epoch, self.package)


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """One expert's part in a call.

    ``mass``: routing weight summed over layers and positions, in 1/2³².
    ``gate_mass``: the same averaged over layers.
    ``tokens``: positions where the expert was chosen in at least one layer.
    """

    expert: str
    mass: int
    gate_mass: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Attribution:
    """All loaded experts' parts in a call: each prompt once, and all choices.

    ``cached_prompt_tokens``: how many positions of the prompts were read from the cache; they count like others.
    """

    experts: tuple[ExpertUse, ...]
    cached_prompt_tokens: int


Answer = tuple[list[int], list[int]]
"""The tokens of a prompt and of what was generated from it."""


class Ticket(Protocol):
    """A prompt's place in the queue before the engine."""

    seated: bool
    """Whether the prompt has its seats."""

    async def wait(self, seconds: float) -> bool:
        """Whether the prompt got its seats within `seconds`, and before it was closed."""

    def use(self, tokens: int) -> None:
        """Count tokens that were generated."""

    def release(self) -> None:
        """Release the seat of a generated choice."""

    def close(self) -> None:
        """Release all seats; nothing more is generated."""


class Reserve(Protocol):
    """Reserves tokens for a call in all: `most`, or as many from `least` on as it may have.

    Returns how many; raises to refuse.
    """

    def __call__(self, *, least: int, most: int) -> int: ...


@dataclass(slots=True, eq=False)
class GatedCall:
    """One API call: the gate all its engine requests share, and what they used.

    Attributes:
        experts: what its decision allows, in the engine's terms.
        gate_until: Unix seconds until when the decision holds, or inf.
        failed: the reason for which a request of this call was ended early.
        valid_until: Unix seconds from which no more tokens are given, for the reason `expired`.
        ended: set once nothing of this call's answer is left to send.
        priority: below zero goes ahead of all that waits; for canaries alone.
        queue: told the choices of a prompt and its tokens; raises to refuse. Without one the call does not wait.
        record: writes down what the call has used before any of it goes on to its client; whether it could.
        confirmed: whether what was decided before the call waited still holds.
        reserve: told how many tokens the call can use in all, before the engine gets its prompts; what is reserved
            beyond the prompts is the most that is generated.
        cut_to: the most that each choice of the last prompt was reserved; None where that is all that it can use.
        keep_answers: whether the tokens of prompts and answers are kept in `answers`.
        finish_reasons: why each choice of each engine request finished; None where nothing asks for it.
        prompt_only: the answer is the prompt itself; the one token that vLLM generates all the same is dropped.
    """

    tenant: str
    experts: tuple[ExpertSlotRef, ...]
    gate_until: float
    client_salt: str | None = None
    failed: str | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    priority: int = 0
    valid_until: float = math.inf
    expired: str | None = None
    reserve: Reserve | None = None
    queue: Callable[[int, int], Ticket] | None = None
    record: Callable[[], Awaitable[bool]] | None = None
    confirmed: Callable[[], bool] | None = None
    cut_to: int | None = None
    _most_tokens: int = 0
    prompt_only: bool = False
    keep_answers: bool = False
    answers: list[Answer] = field(default_factory=list)
    finish_reasons: dict[tuple[str, int], str] | None = None
    _usage: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # by prompt and choice
    _names: tuple[str | None, ...] = ()
    _layers: int = 1
    _prompt_tokens: dict[str, int] = field(default_factory=dict)
    _new_tokens: int = 0
    _tickets: list[Ticket] = field(default_factory=list)

    def gate(self, request_id: str, key: SealKey) -> Gate:
        """The gate of one engine request of this call."""
        refs = tuple(sorted(SlotRef(e.slot, e.slot_epoch) for e in self.experts))
        salt = cache_salt(
            key,
            tenant=self.tenant,
            experts=[(e.expert, e.slot_epoch) for e in self.experts],
            client_salt=self.client_salt,
        )
        return Gate(request_id, self.tenant, refs, min(self.gate_until, self.valid_until), salt)

    def name_slots(self, names: Sequence[str | None]) -> tuple[str | None, ...]:
        """The expert in each slot, by this gate; since it was decided, experts and slots may have changed hands."""
        allowed = {ref.expert for ref in self.experts}
        named = [None if name in allowed else name for name in names]
        for ref in self.experts:
            named[ref.slot] = ref.expert
        return tuple(named)

    def tokens(self) -> int:
        """Prompt and new tokens so far, over all prompts and choices, read by the client or not."""
        return self.prompt_tokens() + self._new_tokens

    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once for all its choices."""
        return sum(self._prompt_tokens.values())

    def new_tokens(self) -> int:
        """Generated tokens of all choices so far."""
        return self._new_tokens

    def prompt_positions(self) -> int:
        """Prompt tokens that the engine has computed or read from its cache, each prompt once for all its choices."""
        return sum(max(usage[0] for usage in choices.values()) for choices in self._usage.values())

    def end_at(self, valid_until: float, reason: str) -> None:
        """Give no more tokens from a time on; an earlier end that is set already stays."""
        if valid_until < min(self.valid_until, self.gate_until):
            self.valid_until, self.expired = valid_until, reason

    def leave(self) -> None:
        """Close every ticket of the call, those of prompts that were never handed over included."""
        for ticket in self._tickets:
            ticket.close()

    def count_prompt(self, request_id: str, tokens: int) -> None:
        """Count the prompt of an engine request, once for all its choices."""
        self._prompt_tokens[request_id] = tokens

    def cached_tokens(self) -> int:
        """Prompt tokens that were read from the cache, each prompt counted once for all its choices."""
        return self.usage()[0]

    def count_usage(self, request_id: str, choice: str, usage: list[Any]) -> None:
        """Keep the running total of one choice of an engine request, as `RequestUsage.to_wire` gives it."""
        self._usage.setdefault(request_id, {})[choice] = usage

    def count_new(self, tokens: int) -> None:
        """Count tokens that the engine has just generated."""
        self._new_tokens += tokens

    def usage(self) -> tuple[int, list[int], list[int]]:
        """Prompt positions read from the cache; then of prompts and of completions masses and positions of each slot.

        Each choice routes its prompt anew, or reads it from the cache: the one that has come furthest counts.
        """
        cached, prompts, completions = 0, [], []
        for choices in self._usage.values():
            _, from_cache, of_prompt, _ = max(choices.values(), key=itemgetter(0))
            cached += from_cache
            prompts.append(of_prompt)
            completions += [of_completion for _, _, _, of_completion in choices.values()]
        nothing = [0] * 2 * len(self._names)
        return cached, _sums(prompts, nothing), _sums(completions, nothing)

    def attribution(self) -> Attribution:
        """Totals so far; complete once every output of the call has been seen."""
        cached, prompt_2U, completion_2U = self.usage()
        used_2U = [sum(values) for values in zip(prompt_2U, completion_2U, strict=True)]
        slots, scale = len(self._names), MASS_SCALE * self._layers
        masses, tokens = used_2U[:slots], used_2U[slots:]
        uses = (
            ExpertUse(name, masses[slot], masses[slot] / scale, tokens[slot])
            for slot, name in enumerate(self._names)
            if name is not None
        )
        return Attribution(tuple(uses), cached)

    def used_slots(self) -> frozenset[int]:
        """Slots with any routing weight or tokens, of whichever expert."""
        parts = [part for of_one in self._usage.values() for _, _, *both in of_one.values() for part in both]
        slots = len(self._names)
        return frozenset(index % slots for part in parts for index, value in enumerate(part) if value)


def _sums(rows: list[list[int]], nothing: list[int]) -> list[int]:
    """The sums of columns."""
    return nothing if not rows else [sum(values) for values in zip(*rows, strict=True)]


CURRENT_CALL: ContextVar[GatedCall | None] = ContextVar("flexgate_current_call", default=None)
