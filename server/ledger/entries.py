"""What the ledger keeps of a request: who asked, and what each expert did for the response. No text of either.

Times are whole microseconds of Unix time. Masses are routing weight in 1/2³², summed over layers and positions, so that
they add up without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from flexgate.server.ledger.shares import share_ppm

MICROSECONDS: Final = 1_000_000

COMPLETED: Final = "completed"
INTERRUPTED: Final = "interrupted"
"""The outcome of a request that was running when its server ended."""
STOPPED: Final = "stopped"
"""The outcome where the client left, or an error that is no reason of ours ended the response."""


class RegisteredExpert(NamedTuple):
    """An expert of a request's gate, with the agreement that its use counts under, None where it needs none.

    `owner` is None for the common expert, and for all experts of a model whose experts have no owners. `package` is the
    digest of the weights in its package, None where the checkpoint names none; `duties_sha256` is that of the
    agreement's duties.
    """

    slot: int
    expert: str
    owner: str | None
    agreement: str | None = None
    agreement_version: int | None = None
    package: str | None = None
    duties_sha256: str | None = None


class Part(NamedTuple):
    """What one expert did; positions are those where it was chosen in at least one layer.

    `share_ppm` is its share of the request's routed mass, in parts per million.
    """

    expert: str
    owner: str | None
    prompt_mass: int
    prompt_positions: int
    completion_mass: int
    completion_positions: int
    agreement: str | None
    agreement_version: int | None
    package: str | None
    share_ppm: int
    duties_sha256: str | None


class Registration(msgspec.Struct, frozen=True, gc=False):
    """A request that may go to the engine.

    Attributes:
        request: the id of its decision, which is in its response.
        experts: those of its gate, in the order of the catalogue, by which equal shares are rounded.
        prompt_sha256: of the request's body.
        catalogue, excluded: every expert with its grade, and which of them the gate left out, as
            `flexgate.server.ledger.exclusion` writes them; None where that is not known.
    """

    request: str
    registered_at: int
    tenant: str
    key_id: str
    endpoint: str
    model: str
    policy_version: int
    weights_epoch: int
    experts: tuple[RegisteredExpert, ...]
    prompt_sha256: str | None = None
    catalogue: str | None = None
    excluded: str | None = None


class Used(msgspec.Struct, frozen=True, gc=False):
    """What a request has used so far, as the engine reports it.

    Attributes:
        prompt_tokens: those that the engine has processed, each prompt once for all its choices.
        completion_tokens: of all choices.
        cached_tokens: those of the prompts that were read from the cache.
        prompt_2U, completion_2U: masses of each slot, then positions of each slot; empty before the first report.
        answer_sha256: of the response's body, as far as it was sent; None before the end.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_2U: Sequence[int]
    completion_2U: Sequence[int]
    answer_sha256: str | None = None

    def parts(self, registration: Registration) -> list[Part]:
        """The part of each expert of the gate that took part."""
        slots, prompt_2U, completion_2U = len(self.prompt_2U) // 2, self.prompt_2U, self.completion_2U
        masses_and_positions = prompt_2U[:slots], prompt_2U[slots:], completion_2U[:slots], completion_2U[slots:]
        by_slot = list(zip(*masses_and_positions, strict=True))
        experts = [one for one in registration.experts if one[0] < slots]
        shares = share_ppm([by_slot[one[0]][0] + by_slot[one[0]][2] for one in experts])
        found = []
        for (slot, expert, owner, agreement, version, package, duties), share in zip(experts, shares, strict=True):
            prompt_mass, prompt_positions, mass, positions = numbers = by_slot[slot]
            if any(numbers):
                counts = (prompt_mass, prompt_positions, mass, positions)
                found.append(Part(expert, owner, *counts, agreement, version, package, share, duties))
        return found

    def encode(self) -> bytes:
        """For :meth:`decode`."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, mark: bytes | None) -> Used:
        """What was encoded; nothing used where there is no mark."""
        return NOTHING if mark is None else msgspec.json.decode(mark, type=cls)


NOTHING: Final = Used(0, 0, 0, (), ())


class State(NamedTuple):
    """How a ledger stands.

    Attributes:
        running: requests that have not ended.
        unwritten: ends that are not on disk yet.
        behind_seconds: how far the clock is behind the newest end or closed month.
        uncopied: requests that each copy does not have yet, by its name.
    """

    failing: bool
    running: int
    unwritten: int
    behind_seconds: float
    uncopied: Mapping[str, int]


def microseconds(seconds: float) -> int:
    """Unix seconds in whole microseconds."""
    return round(seconds * MICROSECONDS)


def encode_registration(registration: Registration) -> str:
    """For :func:`decode_registration`."""
    return msgspec.json.encode(registration).decode()


def decode_registration(text: str) -> Registration:
    """What was encoded."""
    return msgspec.json.decode(text, type=Registration)
