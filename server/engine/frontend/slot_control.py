"""Changing what the running engine holds: one slot at a time, on every rank, beside the steps.

The order is what makes a change safe (promise 5 of the design). To add: fill the masked slot on all
ranks, open it on all ranks, then in the engine core, and only then let gates be sealed for it.
To revoke: the reverse.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flexgate.experts.package.weights import WeightsTicket
from flexgate.server.engine.protocol.names import SLOTS_UTILITY
from flexgate.server.engine.protocol.slot_tasks import to_wire
from flexgate.server.engine.seam.engine import RankFailed, ask_engine_core, ask_ranks

POLL_SECONDS = 0.01

Progress = Callable[[int, int, int], None]  # (ranks that are done, layers done, layers in all, over all ranks)


class SlotTaskFailed(RuntimeError):
    """A rank could not fill or clear a slot; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Closed:
    """What closing a slot did: requests that ended, cached blocks that were evicted."""

    ended: int
    evicted_blocks: int


class SlotOperator:
    """The slots of one engine. Calls about different slots may overlap.

    All of them raise `EngineDeadError` when the engine is dead or dies meanwhile, and `RankFailed` when a rank refuses.
    """

    def __init__(self, engine: Any) -> None:
        """``engine`` is an ``AsyncLLM``."""
        self._engine = engine

    async def fill(self, slot: int, ticket: WeightsTicket, progress: Progress) -> list[str]:
        """Copy an expert into a masked slot on every rank.

        Returns:
            Each rank's SHA-256 over what it now holds there, by rank.

        Raises:
            SlotTaskFailed: some rank could not; the slot may be half written and stays masked.
        """
        try:
            await ask_ranks(self._engine, "flexgate_load", slot, to_wire(ticket))
        except Exception:
            with suppress(SlotTaskFailed):  # some ranks may have begun; the slot is theirs until they are done
                await self._finish(slot, progress)
            raise
        return await self._finish(slot, progress)

    async def clear(self, slot: int) -> list[str]:
        """Zero a masked slot on every rank and read it back; returns and raises like :meth:`fill`."""
        await ask_ranks(self._engine, "flexgate_clear", slot)
        return await self._finish(slot, lambda *_: None)

    async def open(self, slot: int, slot_epoch: int) -> None:
        """Let sealed gates name the slot: on every rank, then in the engine core; everywhere or nowhere."""
        try:
            await ask_ranks(self._engine, "flexgate_open", slot, slot_epoch)
            await self._ask("open", slot, slot_epoch)
        except BaseException:
            with suppress(RankFailed):  # the ones that did not open it
                await ask_ranks(self._engine, "flexgate_close", slot)
            raise

    async def close(self, slot: int) -> Closed:
        """Let no gate name the slot: in the engine core, which ends its users, then on every rank."""
        closed = Closed(**await self._ask("close", slot))
        await ask_ranks(self._engine, "flexgate_close", slot)
        return closed

    async def users(self, slot: int) -> int:
        """Requests in the engine that may use the slot."""
        return int(await self._ask("users", slot))

    async def waiting(self, slot: int) -> int:
        """Those of :meth:`users` that wait for a place in the batch."""
        return int(await self._ask("waiting", slot))

    async def digests(self) -> list[list[str]]:
        """Per rank, SHA-256 of every slot. Reads all of them: for checks, not while serving."""
        found: list[list[str]] = await ask_ranks(self._engine, "flexgate_digests")
        return found

    async def _ask(self, do: str, slot: int, slot_epoch: int = 0) -> Any:
        command = {"do": do, "slot": slot, "slot_epoch": slot_epoch}
        return await ask_engine_core(self._engine, SLOTS_UTILITY, command)

    async def _finish(self, slot: int, progress: Progress) -> list[str]:
        while True:
            reports = await ask_ranks(self._engine, "flexgate_task", slot)
            running = [report for report in reports if report["state"] == "running"]
            done, total = (sum(report[name] for report in reports) for name in ("done", "total"))
            progress(len(reports) - len(running), done, total)
            if not running:
                break
            await asyncio.sleep(POLL_SECONDS)
        for rank, report in enumerate(reports):
            if report["state"] != "done":
                raise SlotTaskFailed(f"rank {rank}: {report['error'] or report['state']}")
        return [report["digest"] for report in reports]
