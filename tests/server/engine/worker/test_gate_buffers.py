"""A step's gates as the layers read them, token by token."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexgate.kernels.gated_topk import CLOSED_GATE
from flexgate.server.engine.protocol import gates
from flexgate.server.engine.protocol.names import GATE_ARG
from flexgate.server.engine.protocol.slots import SlotMap, SlotTable
from flexgate.server.engine.worker.cache_usage import Remembered
from flexgate.server.engine.worker.gate_buffers import GateState

KEY = gates.new_seal_key()
TABLE = SlotTable(SlotMap(4, (bytes(range(4)),)), {0: 1, 1: 1, 2: 1})


def new_request(name: str, slots: tuple[int, ...]) -> Any:
    gate = gates.Gate(name, "tenant", tuple(TABLE.ref(slot) for slot in slots), math.inf, "salt")
    params = SimpleNamespace(extra_args={GATE_ARG: gates.seal(gate, KEY)})
    return SimpleNamespace(req_id=f"{name}-0123abcd", num_computed_tokens=0, block_ids=([0],), sampling_params=params)


def begun(tokens: dict[str, int]) -> GateState:
    """A step of requests `a`, which may use slots 0 and 1, and `b`, which may use 0 and 2."""
    state = GateState(TABLE, 16, KEY)
    new = [new_request("a", (0, 1)), new_request("b", (0, 2))]
    counts = {f"{name}-0123abcd": count for name, count in tokens.items()}
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], resumed_req_ids=set(), new_block_ids=[])
    state.begin_step(
        SimpleNamespace(  # type: ignore[arg-type]
            finished_req_ids=(),
            scheduled_cached_reqs=cached,
            scheduled_new_reqs=new,
            num_scheduled_tokens=counts,
        )
    )
    return state


@pytest.mark.parametrize(("of_a", "of_b"), [(1, 1), (3, 2)])
def test_every_token_has_its_own_requests_gate_in_the_batchs_order(of_a: int, of_b: int) -> None:
    state = begun({"a": of_a, "b": of_b})
    state.fill(["b-0123abcd", "a-0123abcd"], 8)
    padding = 8 - of_a - of_b
    assert state.gate_T[:8].tolist() == [0b101] * of_b + [0b011] * of_a + [CLOSED_GATE] * padding


def test_a_forward_pass_with_fewer_tokens_than_were_scheduled_is_refused() -> None:
    state = begun({"a": 3, "b": 2})
    with pytest.raises(gates.GateError, match="5 tokens were scheduled, the forward pass has 4"):
        state.fill(["a-0123abcd", "b-0123abcd"], 4)


def step(state: GateState, *new: Any, running: tuple[str, ...] = ()) -> None:
    """One step of a token each for new requests and for those that run."""
    names = [*(request.req_id for request in new), *(f"{name}-0123abcd" for name in running)]
    cached = SimpleNamespace(
        req_ids=names[len(new) :],
        num_computed_tokens=[1] * len(running),
        resumed_req_ids=set(),
        new_block_ids=[None] * len(running),
    )
    state.begin_step(
        SimpleNamespace(  # type: ignore[arg-type]
            finished_req_ids=(),
            scheduled_cached_reqs=cached,
            scheduled_new_reqs=list(new),
            num_scheduled_tokens=dict.fromkeys(names, 1),
        )
    )


def test_a_rank_refuses_a_running_request_of_a_slot_that_was_closed_though_the_engine_core_scheduled_it() -> None:
    table = SlotTable(SlotMap(4, (bytes(range(4)),)), {0: 1, 1: 1, 2: 1})
    state = GateState(table, 16, KEY)
    step(state, new_request("a", (0, 1)), new_request("b", (0, 2)))
    table.close(2)
    step(state, running=("a",))
    with pytest.raises(gates.GateError, match="closed slot was scheduled"):
        step(state, running=("b",))


@pytest.mark.parametrize("reopened", [False, True])
def test_a_rank_refuses_a_new_request_of_a_slot_that_was_closed(reopened: bool) -> None:
    table = SlotTable(SlotMap(4, (bytes(range(4)),)), {0: 1, 1: 1, 2: 1})
    state = GateState(table, 16, KEY)
    table.close(2)
    if reopened:
        table.open(2, 2)
    with pytest.raises(gates.GateError, match="no longer loaded"):
        step(state, new_request("b", (0, 2)))


def test_a_rank_refuses_a_gate_that_was_sealed_for_another_request() -> None:
    request = new_request("a", (0, 1))
    request.req_id = "b-0123abcd"
    with pytest.raises(gates.GateError):
        step(GateState(TABLE, 16, KEY), request)


def test_cached_positions_without_a_memory_of_their_routing_are_refused() -> None:
    request = new_request("a", (0, 1))
    request.num_computed_tokens = 16
    with pytest.raises(gates.GateError, match="not known to be routed"):
        step(GateState(TABLE, 16, KEY), request)


def test_cached_positions_are_read_where_their_blocks_lie() -> None:
    memory = Remembered.of(8, 4, 4, torch.device("cpu"))
    assert memory.places(([5, 2, 7],), 3, 10).tolist() == [23, 8, 9, 10, 11, 28, 29]


def test_positions_that_were_counted_before_a_preemption_are_not_read_again() -> None:
    """The request counted four positions; another one of its gate has computed eight when it goes on."""
    state = GateState(TABLE, 16, KEY)
    state.remember(4, 4)
    name = "a-0123abcd"
    resumed = SimpleNamespace(
        req_ids=[name], num_computed_tokens=[8], resumed_req_ids={name}, new_block_ids=[([3, 1, 2],)]
    )
    nothing = SimpleNamespace(req_ids=[], num_computed_tokens=[], resumed_req_ids=set(), new_block_ids=[])
    for new, running, count in ((new_request("a", (0, 1)), nothing, 4), (None, resumed, 2)):
        state.begin_step(
            SimpleNamespace(  # type: ignore[arg-type]
                finished_req_ids=(),
                scheduled_cached_reqs=running,
                scheduled_new_reqs=[] if new is None else [new],
                num_scheduled_tokens={name: count},
            )
        )
    cached = state._step[name].cached
    assert cached is not None
    assert cached.tolist() == [4, 5, 6, 7]
