"""Which unit holds which engine slot, and which experts of each layer a slot is made of.

A *slot* is what a gate has a bit for and what is opened and closed as a whole: the place of one unit, that is, of one
owner's contribution. In each layer it has a fixed set of the layer's experts, none to all of them. In FlexOlmo's layout
slot *i* has expert *i* of every layer; see `docs/decisions/0066-a-gate-names-units.md`.

Legend: L layers, E experts of a layer.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgate.kernels.gated_topk import MAX_EXPERTS, MAX_UNITS
from flexgate.server.engine.protocol.gates import Gate, GateError, SlotRef
from flexgate.server.engine.protocol.names import CONFIG_KEY

ANCHOR_SLOT = 0


class SlotError(ValueError):
    """A slot cannot be opened or closed as asked, or a map of slots cannot be."""


@dataclass(frozen=True, slots=True)
class SlotMap:
    """The slots of an engine, which never change.

    Attributes:
        total: number of slots, 1..64.
        unit_LE: of each layer the slot of each of its experts, a byte each; layers have equally many experts, or none.
        low_ranks: the ranks of the last slots, each of which has the expert of the same place from the end in every
            layer that has experts; the slots and experts before are full.
        layer_masks: the slots that have an expert in a layer as bits, once for all layers that have the same.
        single: the full slots that have exactly one expert in every layer that has any, as a package has.
    """

    total: int
    unit_LE: tuple[bytes, ...]
    low_ranks: tuple[int, ...] = ()
    layer_masks: tuple[int, ...] = field(init=False, repr=False, compare=False)
    single: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive the masks.

        Raises:
            SlotError: too many slots or experts, a layer names a slot that is not there, or a low-rank slot has other
                experts than its own.
        """
        if not 1 <= self.total <= MAX_UNITS:
            raise SlotError(f"an engine has 1 to {MAX_UNITS} slots, not {self.total}")
        moe = self.moe_layers
        widths = {len(unit_E) for unit_E in moe}
        if len(widths) != 1 or max(widths) > MAX_EXPERTS:
            raise SlotError(f"all layers have equally many experts, 1 to {MAX_EXPERTS}, not {sorted(widths)}")
        for unit_E in moe:
            if max(unit_E) >= self.total:
                raise SlotError(f"a layer has an expert of slot {max(unit_E)}; this engine has {self.total}")
        self._check_ranks()
        masks = (sum(1 << unit for unit in set(unit_E)) for unit_E in moe)
        single = (s for s in range(self.total - len(self.low_ranks)) if all(unit_E.count(s) == 1 for unit_E in moe))
        object.__setattr__(self, "layer_masks", tuple(dict.fromkeys(masks)))
        object.__setattr__(self, "single", frozenset(single))

    def _check_ranks(self) -> None:
        if any(rank < 1 for rank in self.low_ranks) or len(self.low_ranks) >= self.total:
            raise SlotError(f"low-rank slots come after full ones and have ranks of 1 or more, not {self.low_ranks}")
        last = bytes(range(self.total - len(self.low_ranks), self.total))
        for unit_E in self.moe_layers:
            if unit_E[len(unit_E) - len(last) :] != last or any(unit_E.count(slot) != 1 for slot in last):
                raise SlotError("each low-rank slot has one expert in every layer, after those of all full slots")

    @classmethod
    def of_checkpoint(
        cls, unit_LE: Sequence[bytes], units: int, total: int, low_ranks: tuple[int, ...] = ()
    ) -> "SlotMap":
        """Unit *i* of a checkpoint has slot *i*.

        Each of the free slots, from ``units`` to ``total``, has one expert in every layer that has experts, after the
        checkpoint's own; a slot of each of ``low_ranks`` comes after those.
        """
        free = bytes(range(units, total + len(low_ranks)))
        return cls(total + len(low_ranks), tuple(unit_E and unit_E + free for unit_E in unit_LE), low_ranks)

    def slots_for(self, rank: int | None) -> tuple[int, ...]:
        """The slots that a package fits into, taken ones included, the best first.

        Args:
            rank: of its expert; None for one with an FFN of its own.
        """
        if rank is None:
            return tuple(sorted(self.single))
        room = {
            slot: room for slot, room in enumerate(self.low_ranks, self.total - len(self.low_ranks)) if room >= rank
        }
        return tuple(sorted(room, key=lambda slot: (room[slot], slot)))

    def rank_of(self, slot: int) -> int | None:
        """The rank that a slot has room for; None for a full one."""
        place = slot - (self.total - len(self.low_ranks))
        return self.low_ranks[place] if 0 <= place < len(self.low_ranks) else None

    @property
    def moe_layers(self) -> tuple[bytes, ...]:
        """The maps of the layers that have experts."""
        return tuple(filter(None, self.unit_LE))

    @property
    def experts(self) -> int:
        """How many experts a layer has that has any."""
        return len(self.moe_layers[0])

    def covers(self, bitmask: int) -> bool:
        """Whether the slots of ``bitmask`` have an expert in every layer, so that each layer can route."""
        return all(bitmask & mask for mask in self.layer_masks)


@dataclass(slots=True)
class SlotTable:
    """Which slots hold a unit now.

    Every process keeps one of its own. They change between two steps only: opened on all ranks
    before the engine core, and closed in the engine core before the ranks, so that no gate passes
    the guard that a rank would not know.

    Attributes:
        live: slot -> epoch of the unit in it; free slots are absent.
        live_mask: bit ``s`` is set when slot ``s`` holds a unit.
    """

    map: SlotMap
    live: dict[int, int]
    live_mask: int = field(init=False)

    def __post_init__(self) -> None:
        """Set the bits."""
        self.live_mask = sum(1 << slot for slot in self.live)

    @classmethod
    def at_start(cls, map_: SlotMap, units: int, without: Collection[int] = (), *, slot_epoch: int = 1) -> "SlotTable":
        """The checkpoint's ``units`` are in their slots; ``without`` and the rest are free."""
        return cls(map_, {slot: slot_epoch for slot in range(units) if slot not in without})

    @property
    def total(self) -> int:
        """Number of slots."""
        return self.map.total

    def to_config(self) -> dict[str, Any]:
        """Plain data for vLLM's ``additional_config`` (JSON, no integer keys)."""
        layers = [unit_E.hex() for unit_E in self.map.unit_LE]
        live, low_ranks = sorted(self.live.items()), list(self.map.low_ranks)
        return {CONFIG_KEY: {"total": self.total, "live": live, "layers": layers, "low_ranks": low_ranks}}

    @classmethod
    def from_config(cls, additional_config: object) -> "SlotTable":
        """Read back :meth:`to_config`.

        Raises:
            ValueError: the engine was not started by flexgate's launcher.
        """
        if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
            raise ValueError("vLLM was started without flexgate's slot table; use `flexgate serve`")
        data = additional_config[CONFIG_KEY]
        layers, low_ranks = (bytes.fromhex(unit_E) for unit_E in data["layers"]), map(int, data["low_ranks"])
        map_ = SlotMap(int(data["total"]), tuple(layers), tuple(low_ranks))
        return cls(map_, {int(s): int(g) for s, g in data["live"]})

    def validate(self, gate: Gate) -> None:
        """Refuse a gate that names a slot whose assignment has changed, or with which a layer could not route.

        Raises:
            GateError: some reference is not the slot's present one, or some layer has no expert of the gate.
        """
        if any(self.live.get(ref.slot) != ref.slot_epoch for ref in gate.slots):
            raise GateError("the gate names an expert that is no longer loaded")
        if not self.map.covers(gate.bitmask):
            raise GateError("the gate leaves a layer without an expert")

    def open(self, slot: int, slot_epoch: int) -> None:
        """Make a free slot live.

        Raises:
            SlotError: there is no such slot, or it holds a unit.
        """
        if not 0 <= slot < self.total:
            raise SlotError(f"there is no slot {slot}; this engine has {self.total}")
        if slot in self.live:
            raise SlotError(f"slot {slot} holds an expert")
        self.live[slot] = slot_epoch
        self.live_mask |= 1 << slot

    def close(self, slot: int) -> None:
        """Take a slot out of use; the anchor's never.

        Raises:
            SlotError: the slot is free, or it is the anchor's.
        """
        if slot == ANCHOR_SLOT:
            raise SlotError("the anchor's slot cannot be closed")
        if slot not in self.live:
            raise SlotError(f"slot {slot} holds no expert")
        del self.live[slot]
        self.live_mask &= ~(1 << slot)

    def require_masked(self, slot: int) -> None:
        """Refuse to touch the weights of a slot that some request may read.

        Raises:
            SlotError: there is no such slot, or it holds a live unit.
        """
        if not 0 <= slot < self.total:
            raise SlotError(f"there is no slot {slot}; this engine has {self.total}")
        if slot in self.live:
            raise SlotError(f"slot {slot} is live; close it first")

    def ref(self, slot: int) -> SlotRef:
        """The present assignment of a live slot."""
        return SlotRef(slot, self.live[slot])
