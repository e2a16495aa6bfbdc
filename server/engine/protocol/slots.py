"""Which expert holds which engine slot, as data that every engine process shares."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from flexgate.server.engine.protocol.gates import Gate, GateError, SlotRef
from flexgate.server.engine.protocol.names import CONFIG_KEY

ANCHOR_SLOT = 0


class SlotError(ValueError):
    """A slot cannot be opened or closed as asked."""


@dataclass(slots=True)
class SlotTable:
    """The engine's fixed arrays: ``total`` slots, of which ``live`` hold an expert.

    Every process keeps one of its own. They change between two steps only: opened on all ranks
    before the engine core, and closed in the engine core before the ranks, so that no gate passes
    the guard that a rank would not know.

    Attributes:
        total: number of expert slots in every layer, 1..64.
        live: slot -> epoch of the expert in it; free slots are absent.
        live_mask: bit ``s`` is set when slot ``s`` holds an expert.
    """

    total: int
    live: dict[int, int]
    live_mask: int = field(init=False)

    def __post_init__(self) -> None:
        """Set the bits."""
        self.live_mask = sum(1 << slot for slot in self.live)

    @classmethod
    def of_checkpoint(
        cls, num_experts: int, total: int, without: Collection[int] = (), *, slot_epoch: int = 1
    ) -> "SlotTable":
        """Expert *i* of a checkpoint takes slot *i*; the rest, and ``without``, is free."""
        return cls(total, {slot: slot_epoch for slot in range(num_experts) if slot not in without})

    def to_config(self) -> dict[str, Any]:
        """Plain data for vLLM's ``additional_config`` (JSON, no integer keys)."""
        return {CONFIG_KEY: {"total": self.total, "live": sorted(self.live.items())}}

    @classmethod
    def from_config(cls, additional_config: object) -> "SlotTable":
        """Read back :meth:`to_config`.

        Raises:
            ValueError: the engine was not started by flexgate's launcher.
        """
        if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
            raise ValueError("vLLM was started without flexgate's slot table; use `flexgate serve`")
        data = additional_config[CONFIG_KEY]
        return cls(int(data["total"]), {int(s): int(g) for s, g in data["live"]})

    def validate(self, gate: Gate) -> None:
        """Refuse a gate that names a slot whose assignment has changed.

        Raises:
            GateError: some reference is not the slot's present one.
        """
        if any(self.live.get(ref.slot) != ref.slot_epoch for ref in gate.slots):
            raise GateError("the gate names an expert that is no longer loaded")

    def open(self, slot: int, slot_epoch: int) -> None:
        """Make a free slot live.

        Raises:
            SlotError: there is no such slot, or it holds an expert.
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
            SlotError: there is no such slot, or it holds a live expert.
        """
        if not 0 <= slot < self.total:
            raise SlotError(f"there is no slot {slot}; this engine has {self.total}")
        if slot in self.live:
            raise SlotError(f"slot {slot} is live; close it first")

    def ref(self, slot: int) -> SlotRef:
        """The present assignment of a live slot."""
        return SlotRef(slot, self.live[slot])
