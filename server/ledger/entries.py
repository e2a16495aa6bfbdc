"""What the ledger keeps of a request: who asked, and what each expert did for the response. No text of either.

Times are whole microseconds of Unix time. Masses are routing weight in 1/2³², summed over layers and positions, so that
they add up without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

MICROSECONDS: Final = 1_000_000

COMPLETED: Final = "completed"
INTERRUPTED: Final = "interrupted"
"""The outcome of a request that was running when its server ended."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one expert did; positions are those where it was chosen in at least one layer.

    `owner` is None for the common expert, and for all experts of a model whose experts have no owners.
    """

    expert: str
    owner: str | None
    prompt_mass: int
    prompt_positions: int
    completion_mass: int
    completion_positions: int


@dataclass(frozen=True, slots=True)
class Registration:
    """A request that may go to the engine.

    Attributes:
        request: the id of its decision, which is in its response.
        experts: slot, id and owner of each expert of its gate.
    """

    request: str
    registered_at: int
    tenant: str
    key_id: str
    endpoint: str
    model: str
    policy_version: int
    weights_epoch: int
    experts: tuple[tuple[int, str, str | None], ...]


@dataclass(frozen=True, slots=True)
class Used:
    """What a request has used so far, as the engine reports it.

    Attributes:
        prompt_tokens, completion_tokens: each prompt once, all choices.
        cached_tokens: those of the prompts that were read from the cache.
        prompt_2U, completion_2U: masses of each slot, then positions of each slot; empty before the first report.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_2U: Sequence[int]
    completion_2U: Sequence[int]

    def parts(self, registration: Registration) -> list[Part]:
        """The part of each expert of the gate that took part."""
        slots = len(self.prompt_2U) // 2
        found = []
        for slot, expert, owner in registration.experts:
            if slot < slots:
                numbers = [row[index] for row in (self.prompt_2U, self.completion_2U) for index in (slot, slots + slot)]
                if any(numbers):
                    found.append(Part(expert, owner, *numbers))
        return found

    def encode(self) -> bytes:
        """For :meth:`decode`."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, mark: bytes | None) -> Used:
        """What was encoded; nothing used where there is no mark."""
        return NOTHING if mark is None else msgspec.json.decode(mark, type=cls)


NOTHING: Final = Used(0, 0, 0, (), ())


def microseconds(seconds: float) -> int:
    """Unix seconds in whole microseconds."""
    return round(seconds * MICROSECONDS)


def encode_registration(registration: Registration) -> str:
    """For :func:`decode_registration`."""
    return msgspec.json.encode(registration).decode()


def decode_registration(text: str) -> Registration:
    """What was encoded."""
    return msgspec.json.decode(text, type=Registration)
