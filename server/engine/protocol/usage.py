"""Attribution: how much of a request's routing each slot carried.

A worker reports integers per step and request; the engine core adds them up and
sends the running total with every output, so that the last one the client sees is
complete whatever ended the request (length, stop token, or a stop string that the
API process found). Each position counts once: the worker leaves out positions that
it computed before a preemption, and counts those that it read from the prefix cache,
see :class:`~flexgate.server.engine.worker.gate_buffers.GateState`.

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
        count_R: how many positions are counted now, those read from the cache included.
        cached_R: how many of them were read from the cache.
        used_R2U: per slot, routing weight over layers and counted positions, in 1/MASS_SCALE; then
            counted positions where the slot was chosen in at least one layer.
        overflowed: those of the requests whose numbers were not all finite.
    """

    request_ids: list[str]
    first_R: list[int]
    count_R: list[int]
    cached_R: list[int]
    used_R2U: Int64Array
    overflowed: list[str]


@dataclass(slots=True)
class RequestUsage:
    """Running total of one request.

    Attributes:
        prompt_2U, completion_2U: laid out as a row of :attr:`StepUsage.used_R2U`.
        prompt_positions: how many of the prompt's positions were counted.
        cached: how many of those were read from the cache.
    """

    prompt_tokens: int
    prompt_2U: Int64Array
    completion_2U: Int64Array
    prompt_positions: int = 0
    cached: int = 0

    def add(self, first: int, count: int, cached: int, used_2U: Int64Array) -> None:
        """Add one step, of the prompt or of the completion: nothing is generated before the prompt was counted."""
        if first < self.prompt_tokens:
            self.prompt_2U += used_2U
            self.prompt_positions += count
            self.cached += cached
        else:
            self.completion_2U += used_2U

    def to_wire(self) -> list[Any]:
        """``[prompt positions, those of them from the cache, prompt_2U, completion_2U]`` as plain integers."""
        return [self.prompt_positions, self.cached, self.prompt_2U.tolist(), self.completion_2U.tolist()]


@dataclass(slots=True)
class UsageLedger:
    """Per-request totals inside the engine core."""

    num_slots: int
    totals: dict[str, RequestUsage] = field(default_factory=dict)

    def open(self, request_id: str, prompt_tokens: int) -> None:
        """Start a request at zero."""
        prompt_2U, completion_2U = np.zeros((2, 2 * self.num_slots), np.int64)
        self.totals[request_id] = RequestUsage(prompt_tokens, prompt_2U, completion_2U)

    def add(self, step: StepUsage) -> None:
        """Add a step for the requests that are still open."""
        rows = zip(step.request_ids, step.first_R, step.count_R, step.cached_R, step.used_R2U, strict=True)
        for request_id, first, count, cached, used_2U in rows:
            total = self.totals.get(request_id)
            if total is not None:
                total.add(first, count, cached, used_2U)

    def close(self, request_id: str) -> None:
        """Forget a finished request; unknown ids are ignored."""
        self.totals.pop(request_id, None)
