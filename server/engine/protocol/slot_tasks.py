"""What crosses to a rank and back when a slot is filled or cleared: plain data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypedDict

from flexgate.experts.checkpoint.base import BaseArchitecture
from flexgate.experts.package.size import ExpertSize
from flexgate.experts.package.weights import WeightsTicket


class TaskReport(TypedDict):
    """What a rank says of its last task; plain data, since it crosses a process boundary.

    ``done`` of ``total`` layers; ``digest`` is SHA-256, in hexadecimal, over what is resident in
    the slot after it, layer by layer; ``error`` is one sentence.
    """

    state: Literal["idle", "running", "done", "failed"]
    slot: int
    done: int
    total: int
    digest: str
    error: str


def to_wire(ticket: WeightsTicket) -> dict[str, Any]:
    """A ticket as plain data, for a process boundary."""
    return {**asdict(ticket), "path": str(ticket.path)}


def from_wire(values: dict[str, Any]) -> WeightsTicket:
    """Read back :func:`to_wire`."""
    architecture, size = BaseArchitecture(**values["architecture"]), ExpertSize(**values["size"])
    return WeightsTicket(**{**values, "path": Path(values["path"]), "architecture": architecture, "size": size})
