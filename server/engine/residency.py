"""Filling and clearing expert slots of a rank beside its running steps.

The slot is masked for everyone while this works on it: no gate that passes the guard names it, so
no token reads what is half written. One task at a time; its thread is the worker process's own.

Legend as in :mod:`flexgate.server.engine.weights`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from flexgate.experts.base import BaseArchitecture
from flexgate.experts.package import WeightsTicket, open_weights
from flexgate.server.engine.weights import SlotArrays

logger = logging.getLogger(__name__)


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
    architecture = BaseArchitecture(**values["architecture"])
    return WeightsTicket(**{**values, "path": Path(values["path"]), "architecture": architecture})


class ResidencyError(RuntimeError):
    """A task cannot start, or its expert does not fit this model."""


@dataclass(slots=True)
class SlotWriter:
    """The slots of every layer on one rank, first layer first."""

    layers: Sequence[SlotArrays]
    _report: TaskReport = field(default_factory=lambda: _idle())
    _thread: threading.Thread | None = None

    def load(self, slot: int, ticket: WeightsTicket) -> None:
        """Start copying an expert's file into ``slot`` on all layers; this rank checks the file again.

        Raises:
            ResidencyError: another task is running.
        """
        self._start(slot, lambda: self._load(slot, ticket))

    def clear(self, slot: int) -> None:
        """Start zeroing ``slot`` on all layers; raises like :meth:`load`."""
        self._start(slot, lambda: self._clear(slot))

    def report(self) -> TaskReport:
        """The running task's progress, or how the last one ended."""
        return TaskReport(**self._report)

    def wait(self) -> TaskReport:
        """Wait for the running task."""
        if self._thread is not None:
            self._thread.join()
        return self.report()

    def digest(self, slot: int) -> str:
        """SHA-256 in hexadecimal over what ``slot`` holds, layer by layer."""
        hasher = hashlib.sha256()
        for layer in self.layers:
            hasher.update(layer.digest(slot))
        return hasher.hexdigest()

    def _start(self, slot: int, task: Callable[[], None]) -> None:
        if self._report["state"] == "running":
            raise ResidencyError(f"this rank is still busy with slot {self._report['slot']}")
        self._report = TaskReport(state="running", slot=slot, done=0, total=len(self.layers), digest="", error="")
        self._thread = threading.Thread(target=self._run, args=(slot, task), name="flexgate-slots", daemon=True)
        self._thread.start()

    def _run(self, slot: int, task: Callable[[], None]) -> None:
        report = self._report
        try:
            with torch.inference_mode():
                task()
                report["digest"] = self.digest(slot)
            report["state"] = "done"
        except BaseException as error:
            logger.error("slot %d: %s", slot, error)
            report["error"] = f"{type(error).__name__}: {error}"
            report["state"] = "failed"

    def _load(self, slot: int, ticket: WeightsTicket) -> None:
        with open_weights(ticket) as weights:
            if weights.layers != len(self.layers):
                raise ResidencyError(f"the expert has {weights.layers} layers, the model {len(self.layers)}")
            for number, layer in enumerate(self.layers):
                layer.write(slot, weights.layer(number))
                self._report["done"] += 1

    def _clear(self, slot: int) -> None:
        for layer in self.layers:
            layer.clear(slot)
            self._report["done"] += 1


def _idle() -> TaskReport:
    return TaskReport(state="idle", slot=-1, done=0, total=0, digest="", error="")
