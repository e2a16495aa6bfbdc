"""Attribution: how much of a request's routing each slot carried.

A worker reports integers per step and request; the engine core adds them up and
sends the running total with every output, so that the last one the client sees is
complete whatever ended the request (length, stop token, or a stop string that the
API process found). Each position counts once: the worker leaves out positions that
it computed before a preemption, see :class:`~flexgate.server.engine.worker.gate_buffers.GateState`.

Shapes: R requests of the step, U slots.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepUsage:
    """What one engine step adds.

    Attributes:
        request_ids: the step's requests, R long.
        first_R: first position counted now (earlier ones of the step were counted before).
        count_R: how many positions are counted now.
        used_R2U: per slot, routing weight over layers and counted positions, in 1/MASS_SCALE; then
            counted positions where the slot was chosen in at least one layer.
        overflowed: those of the requests whose numbers were not all finite.
    """

    request_ids: list[str]
    first_R: list[int]
    count_R: list[int]
    used_R2U: Int64Array
    overflowed: list[str]


@dataclass(slots=True)
class RequestUsage:
    """Running total of one request, laid out as a row of :attr:`StepUsage.used_R2U`."""

    prompt_tokens: int
    used_2U: Int64Array
    prompt_positions: int = 0

    def add(self, first: int, count: int, used_2U: Int64Array) -> None:
        """Add one step."""
        self.used_2U += used_2U
        if first < self.prompt_tokens:
            self.prompt_positions += min(count, self.prompt_tokens - first)

    def to_wire(self) -> list[Any]:
        """``[cached prompt tokens, masses, tokens]`` as plain integers."""
        cached = self.prompt_tokens - self.prompt_positions
        values = self.used_2U.tolist()
        return [cached, values[: len(values) // 2], values[len(values) // 2 :]]


@dataclass(slots=True)
class UsageLedger:
    """Per-request totals inside the engine core."""

    num_slots: int
    totals: dict[str, RequestUsage] = field(default_factory=dict)

    def open(self, request_id: str, prompt_tokens: int) -> None:
        """Start a request at zero."""
        self.totals[request_id] = RequestUsage(prompt_tokens, np.zeros(2 * self.num_slots, np.int64))

    def add(self, step: StepUsage) -> None:
        """Add a step for the requests that are still open."""
        rows = zip(step.request_ids, step.first_R, step.count_R, step.used_R2U, strict=True)
        for request_id, first, count, used_2U in rows:
            total = self.totals.get(request_id)
            if total is not None:
                total.add(first, count, used_2U)

    def close(self, request_id: str) -> None:
        """Forget a finished request; unknown ids are ignored."""
        self.totals.pop(request_id, None)
