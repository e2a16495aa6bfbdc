"""Per-request gates turned into the fixed-address buffers that the MoE layers read.

Legend: T tokens, U slots of units, R requests of the step.

The hooks call, in this order and once per engine step: :meth:`GateState.begin_step`
with the scheduler's output, :meth:`GateState.fill` once the runner has fixed the
order of requests in the batch, the forward pass, and :meth:`GateState.collect`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from flexgate.kernels.gated_topk import CLOSED_GATE, MAX_UNITS
from flexgate.server.engine.protocol.gates import GateError, SealKey, check_owner, open_seal
from flexgate.server.engine.protocol.names import GATE_ARG
from flexgate.server.engine.protocol.slots import SlotTable
from flexgate.server.engine.protocol.usage import Float32Array, Int64Array, StepUsage
from flexgate.server.engine.seam.engine import SchedulerOutput
from flexgate.server.engine.seam.requests import external_id
from flexgate.server.engine.worker.cache_usage import Remembered, Used

_BITS = np.arange(MAX_UNITS)


@dataclass(slots=True)
class _RequestGate:
    """One live request: its gate as a bitmask, and up to which position it has been counted."""

    bitmask: int
    counted: int = 0


class _Scheduled(NamedTuple):
    """One request of the step, which computes ``tokens`` positions from ``first`` on. Each position counts once.

    Of a request that begins with positions which another one of the same gate computed, these count, too; of one that
    goes on after a preemption, those that are computed again do not::

        counted      first         end              first       counted    end
           |  cached   |    new     |                 |   skip     |  new   |
           +===========+============+                 +............+========+

    ``cached`` has the places of these positions in the KV cache, None where there are none; ``skip`` is a number.
    """

    bitmask: int
    first: int
    tokens: int
    skip: int
    cached: Int64Array | None = None


class GateState(torch.nn.Module):
    """The gate and attribution buffers of one model replica on one rank.

    Buffers (addresses never change, for CUDA graphs and torch.compile):
        gate_T: int64 bitmask of allowed units per token; padding and dummy batches have the common unit alone.
        mass_TU: int64 routing weight per token and unit, summed over layers, in 1/MASS_SCALE.
        chosen_T: int64 bitmask of units chosen in at least one layer.
        sum_T: float32 sum of each token's final hidden state; finite if all of it is.
    """

    gate_T: torch.Tensor
    mass_TU: torch.Tensor
    chosen_T: torch.Tensor
    sum_T: torch.Tensor

    def __init__(self, table: SlotTable, max_tokens: int, key: SealKey) -> None:
        """Allocate for at most ``max_tokens`` tokens a step, everything closed."""
        super().__init__()
        self.table = table
        self.key = key
        self.requests: dict[str, _RequestGate] = {}
        self._step: dict[str, _Scheduled] = {}
        self._order: Sequence[str] = ()
        self._num_tokens = 0
        self._memory_now: _HostBuffers | _DeviceBuffers | None = None
        self._remembered: Remembered | None = None
        closed = torch.full((max_tokens,), CLOSED_GATE, dtype=torch.int64)
        self.register_buffer("gate_T", closed, persistent=False)
        mass = torch.zeros(max_tokens, table.total, dtype=torch.int64)
        self.register_buffer("mass_TU", mass, persistent=False)
        chosen = torch.zeros(max_tokens, dtype=torch.int64)
        self.register_buffer("chosen_T", chosen, persistent=False)
        self.register_buffer("sum_T", torch.zeros(max_tokens, dtype=torch.float32), persistent=False)

    def remember(self, blocks: int, block_size: int) -> None:
        """Remember what is routed in each position of a KV cache, for requests that will read it from there."""
        self._remembered = Remembered.of(blocks, block_size, self.table.total, self.gate_T.device)
        self._memory_now = None

    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Drop finished requests, register new ones, and note what each may count.

        Raises:
            GateError: a request has no genuine gate, or one that names a slot which was closed. The
                engine core refuses and ends such requests before they get here, so this stops the
                engine.
        """
        for request_id in scheduled.finished_req_ids:
            self.requests.pop(request_id, None)
        running = scheduled.scheduled_cached_reqs
        starts = dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        blocks = {}  # of requests that begin or go on after a preemption: all of their cache
        for new in scheduled.scheduled_new_reqs:
            starts[new.req_id], blocks[new.req_id] = new.num_computed_tokens, new.block_ids
            if new.req_id not in self.requests:
                params = new.sampling_params
                self._register(new.req_id, params.extra_args if params else None)
        for request_id in running.resumed_req_ids:
            blocks[request_id] = running.new_block_ids[running.req_ids.index(request_id)]
        self._step = {
            request_id: self._schedule(request_id, starts[request_id], count, blocks.get(request_id))
            for request_id, count in scheduled.num_scheduled_tokens.items()
        }
        self._num_tokens = 0

    def expects(self, order: Sequence[str]) -> bool:
        """Whether ``order`` names exactly the requests of this step."""
        return len(order) == len(self._step) and all(name in self._step for name in order)

    def fill(self, order: Sequence[str], num_padded: int) -> None:
        """Write the step's per-token gates in the batch's order; close the padding.

        Args:
            order: request ids in batch order; each occupies its scheduled tokens, contiguously.
            num_padded: tokens of the forward pass, padding included.

        Raises:
            GateError: the forward pass has fewer tokens than were scheduled.
        """
        step = [self._step[request_id] for request_id in order]
        counts = [entry.tokens for entry in step]
        total = sum(counts)
        if total > num_padded:
            raise GateError(f"{total} tokens were scheduled, the forward pass has {num_padded}")
        masks = np.array([entry.bitmask for entry in step], np.uint64).view(np.int64)
        self._order, self._num_tokens = order, total
        self._memory().start(np.repeat(masks, counts), num_padded)

    def close(self) -> None:
        """Close every token, for profiling, warm-up, capture and dummy batches."""
        self._step, self._order, self._num_tokens = {}, (), 0
        self.gate_T.fill_(CLOSED_GATE)

    def note(self, hidden_TH: torch.Tensor) -> None:
        """Note which tokens' final hidden states are finite; part of the forward pass.

        A number that is not finite stays in its token's residual stream to the end: every block adds to it, and
        attention passes it on to the request's later tokens.
        """
        torch.sum(hidden_TH, -1, dtype=torch.float32, out=self.sum_T[: hidden_TH.shape[0]])

    def collect(self, places_T: torch.Tensor) -> "PendingUsage | None":
        """Remember the forward pass's attribution in the cache, and send it on its way to the host.

        Args:
            places_T: where in the KV cache each token lies, padding included.
        """
        if not self._num_tokens:
            return None
        step = [self._step[request_id] for request_id in self._order]
        # After the pass: requests of one step may read what another of them has just computed.
        reading = {row: entry.cached for row, entry in enumerate(step) if entry.cached is not None}
        taken = self._memory().take(self._num_tokens, places_T[: self._num_tokens], list(reading.values()))
        return PendingUsage(list(self._order), step, list(reading), *taken)

    def _memory(self) -> "_HostBuffers | _DeviceBuffers":
        """The buffers where they lie now: a module may be moved after it was made."""
        gate_T = self.gate_T
        if self._memory_now is None or self._memory_now.gate_T is not gate_T:
            kind = _HostBuffers if gate_T.is_cpu else _DeviceBuffers
            self._memory_now = kind(gate_T, self.mass_TU, self.chosen_T, self.sum_T, self._remembered)
        return self._memory_now

    def _register(self, request_id: str, extra_args: dict[str, object] | None) -> None:
        gate = open_seal((extra_args or {}).get(GATE_ARG), self.key)
        check_owner(gate, external_id(request_id))
        self.table.validate(gate)
        self.requests[request_id] = _RequestGate(gate.bitmask)

    def _schedule(self, request_id: str, first: int, count: int, blocks: Sequence[list[int]] | None) -> _Scheduled:
        """Count the positions up to ``first + count``; raises as :meth:`begin_step`."""
        gate = self.requests[request_id]
        if gate.bitmask & ~self.table.live_mask:
            raise GateError("a request that may use a closed slot was scheduled")
        cached = None
        if gate.counted < first:
            if self._remembered is None or blocks is None:
                raise GateError("a request reads cached positions that are not known to be routed under its gate")
            cached = self._remembered.places(blocks, gate.counted, first)
        skip = min(max(gate.counted - first, 0), count)
        gate.counted = max(gate.counted, first + count)
        return _Scheduled(gate.bitmask, first, count, skip, cached)


@dataclass(frozen=True, slots=True)
class PendingUsage:
    """A step's attribution on its way from the device, still per token.

    Attributes:
        step: the step's requests in the batch's order, R long.
        reading: rows of those that read cached positions, as `cached` has what these were routed to.
    """

    request_ids: list[str]
    step: list[_Scheduled]
    reading: list[int]
    mass_TU: Int64Array
    chosen_T: Int64Array
    sum_T: Float32Array
    cached: list[Used]
    copied: "torch.cuda.Event | None"

    def get(self) -> StepUsage:
        """Wait for the copy and add up each request's tokens and cached positions, without those counted before."""
        if self.copied is not None:
            self.copied.synchronize()
        first_R = [entry.first + entry.skip for entry in self.step]
        count_R = [entry.tokens - entry.skip for entry in self.step]
        cached_R = [0] * len(self.step)
        used_R2U = self._computed()
        for row, used in zip(self.reading, self.cached, strict=True):
            cached_R[row] = len(used[0])
            first_R[row] -= cached_R[row]  # they lie right before those that were computed
            count_R[row] += cached_R[row]
            used_R2U[row] += _used(*used).sum(0)
        return StepUsage(self.request_ids, first_R, count_R, cached_R, used_R2U, self._overflowed())

    def _overflowed(self) -> list[str]:
        finite_T = np.isfinite(self.sum_T)
        if finite_T.all():
            return []
        tokens = [entry.tokens for entry in self.step]
        bad = np.repeat(np.arange(len(tokens)), tokens)[~finite_T]
        return [self.request_ids[index] for index in np.unique(bad)]

    def _computed(self) -> Int64Array:
        """What each request's computed positions used, without those counted before, [R, 2U]; an array of its own."""
        used_T2U = _used(self.mass_TU, self.chosen_T)
        starts, start = [], 0
        for entry in self.step:
            starts.append(start)
            if entry.skip:
                used_T2U[start : start + entry.skip] = 0
            start += entry.tokens
        if start == len(starts):  # one token each, as in every step that only decodes
            return used_T2U
        sums: Int64Array = np.add.reduceat(used_T2U, starts, axis=0)  # every request of a step has at least one token
        return sums


def _used(mass_TU: Int64Array, chosen_T: Int64Array) -> Int64Array:
    """Masses, then whether each unit was chosen, [T, 2U]."""
    units = mass_TU.shape[1]
    used_T2U = np.empty((len(chosen_T), 2 * units), np.int64)
    used_T2U[:, :units] = mass_TU
    np.bitwise_and(chosen_T[:, None] >> _BITS[:units], 1, out=used_T2U[:, units:])
    return used_T2U


class _HostBuffers:
    """On CPU, their own memory: next to a small step, a tensor operation's overhead is what gating costs."""

    def __init__(
        self,
        gate_T: torch.Tensor,
        mass_TU: torch.Tensor,
        chosen_T: torch.Tensor,
        sum_T: torch.Tensor,
        remembered: Remembered | None,
    ) -> None:
        self.gate_T = gate_T
        self._remembered = None if remembered is None else remembered.arrays()
        self._gate_T: Int64Array = gate_T.numpy()
        self._mass_TU: Int64Array = mass_TU.numpy()
        self._chosen_T: Int64Array = chosen_T.numpy()
        self._sum_T: Float32Array = sum_T.numpy()

    def start(self, gates: Int64Array, num_padded: int) -> None:
        """Write a step's gates, close its padding, and count from zero."""
        self._gate_T[: len(gates)] = gates
        self._gate_T[len(gates) : num_padded] = CLOSED_GATE
        self._mass_TU[:num_padded] = 0
        self._chosen_T[:num_padded] = 0

    def take(
        self, length: int, places_T: torch.Tensor, cached: Sequence[Int64Array]
    ) -> tuple[Int64Array, Int64Array, Float32Array, list[Used], None]:
        """Copies that the next step does not write to, those of cached positions included."""
        mass_TU, chosen_T = self._mass_TU[:length].copy(), self._chosen_T[:length].copy()
        found: list[Used] = []
        if self._remembered is not None:
            mass_PU, chosen_P = self._remembered
            places = places_T.numpy()
            mass_PU[places], chosen_P[places] = mass_TU, chosen_T
            found = [(mass_PU[of_one], chosen_P[of_one]) for of_one in cached]
        return mass_TU, chosen_T, self._sum_T[:length].copy(), found, None


class _DeviceBuffers:
    """On CUDA, through fresh pinned memory, never a reused buffer, and without waiting."""

    def __init__(
        self,
        gate_T: torch.Tensor,
        mass_TU: torch.Tensor,
        chosen_T: torch.Tensor,
        sum_T: torch.Tensor,
        remembered: Remembered | None,
    ) -> None:
        self.gate_T, self._mass_TU, self._chosen_T, self._sum_T = gate_T, mass_TU, chosen_T, sum_T
        self._remembered = remembered

    def start(self, gates: Int64Array, num_padded: int) -> None:
        """As on CPU."""
        padded = np.full(num_padded, CLOSED_GATE, np.int64)
        padded[: len(gates)] = gates
        self.gate_T[:num_padded].copy_(torch.from_numpy(padded).pin_memory(), non_blocking=True)
        self._mass_TU[:num_padded].zero_()
        self._chosen_T[:num_padded].zero_()

    def take(
        self, length: int, places_T: torch.Tensor, cached: Sequence[Int64Array]
    ) -> "tuple[Int64Array, Int64Array, Float32Array, list[Used], torch.cuda.Event]":
        """Copies that are complete once the event has happened."""
        buffers = self._mass_TU, self._chosen_T, self._sum_T
        mass_TU, chosen_T, sum_T = (buffer[:length].to("cpu", non_blocking=True).numpy() for buffer in buffers)
        found: list[Used] = []
        if self._remembered is not None:
            self._remembered.mass_PU.index_copy_(0, places_T, self._mass_TU[:length])
            self._remembered.chosen_P.index_copy_(0, places_T, self._chosen_T[:length])
            for of_one in cached:
                places = torch.from_numpy(of_one).pin_memory().to(self.gate_T.device, non_blocking=True)
                kept = self._remembered.mass_PU[places], self._remembered.chosen_P[places]
                mass, chosen = (part.to("cpu", non_blocking=True).numpy() for part in kept)
                found.append((mass, chosen))
        copied = torch.cuda.Event()
        copied.record()
        return mass_TU, chosen_T, sum_T, found, copied
