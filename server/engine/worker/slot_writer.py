"""Filling and clearing expert slots of a rank beside its running steps.

The slot is masked for everyone while this works on it: no gate that passes the guard names it, so
no token reads what is half written. Every slot has a task and a thread of its own at most, so that
zeroing one does not wait until another is filled.

Legend as in :mod:`flexgate.server.engine.worker.slot_arrays`.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from flexgate.experts.package.weights import WeightsTicket, open_weights
from flexgate.server.engine.protocol.slot_tasks import TaskReport
from flexgate.server.engine.worker.slot_arrays import SlotArrays

logger = logging.getLogger(__name__)


class SlotWriteError(RuntimeError):
    """A task cannot start, or its expert does not fit this model."""


@dataclass(slots=True)
class SlotWriter:
    """The slots of every layer on one rank, first layer first."""

    layers: Sequence[SlotArrays]
    _reports: dict[int, TaskReport] = field(default_factory=dict)
    _threads: dict[int, threading.Thread] = field(default_factory=dict)

    def load(self, slot: int, ticket: WeightsTicket) -> None:
        """Start copying an expert's file into ``slot`` on all layers; this rank checks the file again.

        Raises:
            SlotWriteError: the slot is being worked on.
        """
        self._start(slot, lambda report: self._load(report, ticket))

    def clear(self, slot: int) -> None:
        """Start zeroing ``slot`` on all layers; raises like :meth:`load`."""
        self._start(slot, self._clear)

    def report(self, slot: int) -> TaskReport:
        """The progress of a slot's task, or how its last one ended."""
        return TaskReport(**self._reports.get(slot, _idle(slot)))

    def wait(self, slot: int) -> TaskReport:
        """Wait for a slot's task."""
        if slot in self._threads:
            self._threads[slot].join()
        return self.report(slot)

    def digest(self, slot: int) -> str:
        """SHA-256 in hexadecimal over what ``slot`` holds, layer by layer."""
        hasher = hashlib.sha256()
        for layer in self.layers:
            hasher.update(layer.digest(slot))
        return hasher.hexdigest()

    def _start(self, slot: int, task: Callable[[TaskReport], None]) -> None:
        if self.report(slot)["state"] == "running":
            raise SlotWriteError(f"this rank is still busy with slot {slot}")
        report = TaskReport(state="running", slot=slot, done=0, total=len(self.layers), digest="", error="")
        self._reports[slot] = report
        thread = threading.Thread(target=self._run, args=(report, task), name=f"flexgate-slot-{slot}", daemon=True)
        self._threads[slot] = thread
        thread.start()

    def _run(self, report: TaskReport, task: Callable[[TaskReport], None]) -> None:
        try:
            with torch.inference_mode():
                task(report)
                report["digest"] = self.digest(report["slot"])
            report["state"] = "done"
        except BaseException as error:
            logger.error("slot %d: %s", report["slot"], error)
            report["error"] = f"{type(error).__name__}: {error}"
            report["state"] = "failed"

    def _load(self, report: TaskReport, ticket: WeightsTicket) -> None:
        with open_weights(ticket) as weights:
            if weights.layers != len(self.layers):
                raise SlotWriteError(f"the expert has {weights.layers} layers, the model {len(self.layers)}")
            rank = ticket.size.rank
            for layer in self.layers:
                layer.require_size(report["slot"], rank)  # before the first is written
            for number, layer in enumerate(self.layers):
                expert = weights.layer(number) if rank is None else weights.low_rank_layer(number)
                layer.write(report["slot"], expert)
                report["done"] += 1

    def _clear(self, report: TaskReport) -> None:
        for layer in self.layers:
            layer.clear(report["slot"])
            report["done"] += 1


def _idle(slot: int) -> TaskReport:
    return TaskReport(state="idle", slot=slot, done=0, total=0, digest="", error="")
