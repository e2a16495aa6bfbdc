"""Attribution: how much of a request's routing each expert slot carried.

A worker reports integers per step and request; the engine core adds them up and
sends the running total with every output, so that the last one the client sees is
complete whatever ended the request (length, stop token, or a stop string that the
API process found). Each position counts once: the worker leaves out positions that
it computed before a preemption, see :class:`~flexgate.server.engine.state.GateState`.

Shapes: R requests of the step, E expert slots.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepUsage:
    """What one engine step adds.

    Attributes:
        request_ids: the step's requests, R long.
        first_R: first position counted now (earlier ones of the step were counted before).
        count_R: how many positions are counted now.
        mass_RE: routing weight over layers and counted positions, in 1/MASS_SCALE.
        tokens_RE: counted positions where the slot was chosen in at least one layer.
    """

    request_ids: list[str]
    first_R: list[int]
    count_R: list[int]
    mass_RE: Int64Array
    tokens_RE: Int64Array


@dataclass(slots=True)
class RequestUsage:
    """Running total of one request."""

    mass_E: Int64Array
    tokens_E: Int64Array
    prompt_positions: int = 0

    def to_wire(self, num_prompt_tokens: int) -> list[Any]:
        """``[cached prompt tokens, masses, tokens]`` as plain integers."""
        cached = num_prompt_tokens - self.prompt_positions
        return [cached, self.mass_E.tolist(), self.tokens_E.tolist()]


@dataclass(slots=True)
class UsageLedger:
    """Per-request totals inside the engine core."""

    num_slots: int
    totals: dict[str, RequestUsage] = field(default_factory=dict)

    def open(self, request_id: str) -> None:
        """Start a request at zero."""
        zeros = np.zeros(self.num_slots, np.int64)
        self.totals[request_id] = RequestUsage(zeros, zeros.copy())

    def add(self, step: StepUsage, prompt_lengths: dict[str, int]) -> None:
        """Add a step for the requests that are still open."""
        for row, request_id in enumerate(step.request_ids):
            total = self.totals.get(request_id)
            if total is None:
                continue
            total.mass_E += step.mass_RE[row]
            total.tokens_E += step.tokens_RE[row]
            first, end = step.first_R[row], step.first_R[row] + step.count_R[row]
            total.prompt_positions += max(0, min(end, prompt_lengths[request_id]) - first)

    def close(self, request_id: str) -> None:
        """Forget a finished request; unknown ids are ignored."""
        self.totals.pop(request_id, None)
