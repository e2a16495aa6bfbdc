import base64
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.server.engine.protocol.gates import (
    Gate,
    GateError,
    SlotRef,
    cache_salt,
    check,
    new_seal_key,
    open_seal,
    seal,
)
from flexgate.server.engine.protocol.slots import SlotError, SlotMap, SlotTable

KEY = new_seal_key()
SLOTS = (SlotRef(0, 1), SlotRef(3, 7))
SIX = SlotMap(6, (bytes(range(6)),))


def gate(**changes: object) -> Gate:
    values: dict[str, object] = {
        "request_id": "r1",
        "tenant": "t1",
        "slots": SLOTS,
        "valid_until": 100.0,
        "cache_salt": "salt",
    }
    return Gate(**(values | changes))  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 2**40)), min_size=1, max_size=64))
def test_a_sealed_gate_opens_to_the_same_gate(pairs: list[tuple[int, int]]) -> None:
    refs = tuple(SlotRef(s, g) for s, g in sorted(dict(pairs).items()))
    original = gate(slots=refs, valid_until=math.inf)
    assert open_seal(seal(original, KEY), KEY) == original
    assert original.bitmask == sum(2**ref.slot for ref in refs)


@given(st.integers(min_value=0), st.integers(1, 255))
def test_one_changed_byte_breaks_the_seal(position: int, flip: int) -> None:
    sealed = seal(gate(), KEY)
    index = position % len(sealed)
    changed = sealed[:index] + chr((ord(sealed[index]) ^ flip) % 128) + sealed[index + 1 :]
    if changed == sealed:
        return
    try:
        opened = open_seal(changed, KEY)
    except GateError:
        return
    # base64 ignores trailing bits of the last character: the value is then the same one
    assert opened == gate()


def test_a_widened_payload_with_the_old_seal_is_refused() -> None:
    payload, _, mac = seal(gate(), KEY).partition(".")
    values = json.loads(base64.urlsafe_b64decode(payload + "=="))
    values[2] = [[0, 1], [1, 1], [3, 7]]
    wider = base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode()
    with pytest.raises(GateError, match=r"^the gate's seal is broken$"):
        open_seal(wider.rstrip("=") + "." + mac, KEY)


def test_a_seal_under_another_key_is_refused() -> None:
    with pytest.raises(GateError, match="seal is broken"):
        open_seal(seal(gate(), new_seal_key()), KEY)


@pytest.mark.parametrize("sealed", [b"bytes", 7, ["x"], {"slots": [0]}, "", "x", "a.b.c", "é.é", "x" * 9000])
def test_what_is_not_a_seal_is_refused(sealed: object) -> None:
    with pytest.raises(GateError):
        open_seal(sealed, KEY)


def test_a_missing_gate_says_so() -> None:
    with pytest.raises(GateError, match=r"^request without a gate$"):
        open_seal(None, KEY)


def test_a_gate_for_another_request_is_refused() -> None:
    with pytest.raises(GateError, match="another request"):
        check(gate(), request_id="r2", now=0.0)


def test_a_gate_is_refused_from_the_second_it_ends() -> None:
    check(gate(), request_id="r1", now=99.999)
    with pytest.raises(GateError, match="expired"):
        check(gate(), request_id="r1", now=100.0)


@pytest.mark.parametrize("valid_until", [math.nan, -math.inf])
def test_a_gate_without_a_usable_end_is_expired(valid_until: float) -> None:
    with pytest.raises(GateError, match="expired"):
        check(gate(valid_until=valid_until), request_id="r1", now=0.0)


@pytest.mark.parametrize(
    "refs",
    [
        (),
        (SlotRef(1, 1), SlotRef(0, 1)),
        (SlotRef(1, 1), SlotRef(1, 2)),
        (SlotRef(-1, 1),),
        (SlotRef(0, -1),),
        (SlotRef(64, 1),),
    ],
)
def test_an_impossible_set_of_slots_is_refused(refs: tuple[SlotRef, ...]) -> None:
    with pytest.raises(GateError):
        gate(slots=refs)


@pytest.mark.parametrize("field", ["request_id", "tenant", "cache_salt"])
def test_a_gate_must_name_its_request_tenant_and_cache(field: str) -> None:
    with pytest.raises(GateError):
        gate(**{field: ""})


def test_the_cache_salt_tells_tenants_gates_epochs_and_client_salts_apart() -> None:
    def salt(
        tenant: str = "t",
        experts: tuple[tuple[str, int], ...] = (("a", 1), ("b", 1)),
        client: str | None = None,
        key: bytes = KEY,
    ) -> str:
        return cache_salt(key, tenant=tenant, experts=experts, client_salt=client)  # type: ignore[arg-type]

    variants = {
        salt(),
        salt(tenant="u"),
        salt(experts=(("a", 1),)),
        salt(experts=(("a", 1), ("b", 2))),
        salt(client=""),
        salt(client="x"),
        salt(key=new_seal_key()),
    }
    assert len(variants) == 7
    assert salt(experts=(("b", 1), ("a", 1))) == salt()


def test_a_gate_naming_an_earlier_assignment_of_a_slot_is_refused() -> None:
    table = SlotTable(SIX, {0: 1, 3: 8})
    with pytest.raises(GateError, match="no longer loaded"):
        table.validate(gate())
    SlotTable(SIX, {0: 1, 3: 7}).validate(gate())


def test_a_gate_that_leaves_a_layer_without_an_expert_is_refused() -> None:
    table = SlotTable(SlotMap.of_checkpoint([b"\0\1\1\2", b"\1\1\2\2"], 3, 6), {0: 7, 3: 7, 1: 7})
    with pytest.raises(GateError, match="leaves a layer without an expert"):
        table.validate(gate(slots=(SlotRef(0, 7),)))
    for slots in [(SlotRef(1, 7),), (SlotRef(0, 7), SlotRef(3, 7)), (SlotRef(3, 7),)]:
        table.validate(gate(slots=slots))


def test_a_map_of_slots_knows_which_fit_a_package() -> None:
    map_ = SlotMap.of_checkpoint([b"\0\1\1\2\3", b"\0\1\1\2\2"], 4, 6)
    assert map_.unit_LE == (b"\0\1\1\2\3\4\5", b"\0\1\1\2\2\4\5")
    assert map_.single == {0, 4, 5}
    assert [map_.covers(mask) for mask in (0b1, 0b1000, 0b1100, 0b10000)] == [True, False, True, True]


def test_low_rank_slots_come_last_and_take_no_full_package() -> None:
    map_ = SlotMap.of_checkpoint([b"\0\1\1\2", b"", b"\2\1\1\0"], 3, 4, (8, 64, 8))
    assert map_.moe_layers == (b"\0\1\1\2\3\4\5\6", b"\2\1\1\0\3\4\5\6")
    assert [map_.rank_of(slot) for slot in range(8)] == [None] * 4 + [8, 64, 8, None]
    assert map_.slots_for(None) == (0, 2, 3)
    assert [map_.slots_for(rank) for rank in (1, 8, 9, 64, 65)] == [(4, 6, 5), (4, 6, 5), (5,), (5,), ()]
    table = SlotTable.at_start(map_, 3)
    assert SlotTable.from_config(json.loads(json.dumps(table.to_config()))) == table


@pytest.mark.parametrize(
    ("unit_E", "ranks", "said"),
    [
        (b"\0\1", (0,), "ranks of 1 or more"),
        (b"\0\1", (8, 8), "come after full ones"),
        (b"\1\0", (8,), "after those of all full slots"),
        (b"\1\0\1", (8,), "one expert in every layer"),
        (b"\0\0", (8,), "one expert in every layer"),
    ],
)
def test_low_rank_slots_that_cannot_be_are_refused(unit_E: bytes, ranks: tuple[int, ...], said: str) -> None:
    with pytest.raises(SlotError, match=said):
        SlotMap(2, (unit_E,), ranks)


def test_a_layer_without_experts_has_no_slot_and_needs_none() -> None:
    map_ = SlotMap.of_checkpoint([b"", b"\0\1\1", b"", b"\1\0\1"], 2, 2)
    assert (map_.unit_LE, map_.moe_layers) == ((b"", b"\0\1\1", b"", b"\1\0\1"), (b"\0\1\1", b"\1\0\1"))
    assert (map_.experts, map_.single) == (3, {0})
    assert map_.covers(0b01)
    table = SlotTable.at_start(map_, 2)
    assert SlotTable.from_config(json.loads(json.dumps(table.to_config()))) == table


@pytest.mark.parametrize(
    ("total", "unit_LE", "said"),
    [
        (0, (b"\0",), "1 to 64 slots"),
        (65, (b"\0",), "1 to 64 slots"),
        (2, (), "equally many experts"),
        (2, (b"",), "equally many experts"),
        (2, (b"\0\1", b"\0"), "equally many experts"),
        (2, (bytes(513),), "equally many experts"),
        (2, (b"\0\1", b"\0\2"), "has an expert of slot 2; this engine has 2"),
    ],
)
def test_a_map_of_slots_that_cannot_be_is_refused(total: int, unit_LE: tuple[bytes, ...], said: str) -> None:
    with pytest.raises(SlotError, match=said):
        SlotMap(total, unit_LE)


def test_the_slot_table_survives_vllms_configuration() -> None:
    table = SlotTable.at_start(SlotMap.of_checkpoint([b"\0\1\2\3", b"\3\2\1\0"], 4, 6), 4)
    assert SlotTable.from_config(json.loads(json.dumps(table.to_config()))) == table
    assert table.live_mask == 0b1111
    with pytest.raises(ValueError, match="flexgate serve"):
        SlotTable.from_config({})
