"""Which expert holds which engine slot, as data that every engine process shares."""

from dataclasses import dataclass
from typing import Any

from flexgate.server.engine.gates import Gate, GateError, SlotLease

ANCHOR_SLOT = 0
CONFIG_KEY = "flexgate"  # key of vLLM's ``additional_config``


@dataclass(frozen=True, slots=True)
class SlotTable:
    """The engine's fixed arrays: ``total`` slots, of which ``live`` hold an expert.

    Attributes:
        total: number of expert slots in every layer, 1..64.
        live: slot -> generation of the expert in it; free slots are absent.
    """

    total: int
    live: dict[int, int]

    @classmethod
    def of_checkpoint(cls, num_experts: int, total: int) -> "SlotTable":
        """Expert *i* of a checkpoint takes slot *i*, generation 1; the rest is free."""
        return cls(total, dict.fromkeys(range(num_experts), 1))

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

    @property
    def live_mask(self) -> int:
        """Bit ``s`` is set when slot ``s`` holds an expert."""
        return sum(1 << slot for slot in self.live)

    def admit(self, gate: Gate) -> None:
        """Refuse a gate that names a slot whose tenancy has changed.

        Raises:
            GateError: some lease is not the slot's present one.
        """
        if any(self.live.get(lease.slot) != lease.generation for lease in gate.leases):
            raise GateError("the gate names an expert that is no longer loaded")

    def lease(self, slot: int) -> SlotLease:
        """The present tenancy of a live slot."""
        return SlotLease(slot, self.live[slot])
