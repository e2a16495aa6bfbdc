"""What an operator sees at start: progress, then a summary, or one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from flexgate.server.engine.frontend.client import GatedEngineClient
    from flexgate.server.engine.frontend.launch import LaunchPlan

MOST_OF_A_PATH: Final = 60


@dataclass(frozen=True, slots=True)
class Started:
    """A server that is about to answer.

    Attributes:
        admin_address: administration's own address, if it has one.
        admin_key: a first admin key, if this start made it.
        hint: what to try first, on a demo.
        set_aside: packages that were added and are not loaded, a sentence each.
        traces: where spans of requests are sent to.
    """

    plan: LaunchPlan
    client: GatedEngineClient
    address: str
    admin_address: str | None
    admin_key: str | None
    hint: str | None
    set_aside: Sequence[str]
    traces: str | None = None


class Progress:
    """A line that says what is happening; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._last = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stage(self, what: str, done: int, total: int) -> None:
        """Show a step, with how much of it is done when that is known."""
        share = f" {done * 100 // total} %" if total else ""
        if self._status is not None:
            self._status.update(f"{what}{share}")
        elif what != self._last:
            self._console.print(f"{what} ...", highlight=False)
        self._last = what

    def ready(self, started: Started) -> None:
        """Show the summary instead, in lines that wrap on a terminal and are whole elsewhere."""
        self.stop()
        rows = summary(started)
        if self._console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for name, value in rows:
                table.add_row(Text(name, style="bold"), Text(value))
            self._console.print(table)
        else:
            width = max(len(name) for name, _ in rows)
            self._print("".join(f"{name:{width}}  {value}\n" for name, value in rows), end="")
        if started.admin_key is not None:
            self._print(f"first admin key, shown only now: {started.admin_key}", style="bold yellow")
        if started.hint is not None:
            self._print(started.hint)

    def _print(self, text: str, *, style: str = "", end: str = "\n") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True, end=end)

    def stop(self) -> None:
        """Take the line away."""
        if self._status is not None:
            self._status.stop()


def summary(started: Started) -> list[tuple[str, str]]:
    """Model, experts, packages set aside, slots and their memory, kernels, addresses."""
    from flexgate.server.engine.frontend.memory import human

    planned, client = started.plan, started.client
    slots, a = planned.slots, planned.checkpoint.architecture
    held = f"{slots.held} of {human(slots.expert_bytes)} = {human(slots.held * slots.expert_bytes)}"
    if slots.low_ranks:
        rooms = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(Counter(slots.low_ranks).items()))
        held += f" and {rooms} = {human(slots.low_rank_bytes)}"
    cache = f"KV cache {human(slots.kv_bytes)}, its attribution {human(slots.attribution_bytes)}"
    memory = f"on each rank {held}, {cache}, in all {human(slots.total_bytes)}"
    return [
        ("model", f"{shortened(planned.checkpoint.path)} ({a.num_hidden_layers} layers, {planned.dtype})"),
        ("experts", ", ".join(f"{e.id} ({e.owner or 'no owner'})" for e in client.experts())),
        *(("set aside", sentence) for sentence in started.set_aside),
        ("slots", f"{slots.slots + len(slots.low_ranks)}, {memory}"),
        ("kernels", client.kernels),
        ("address", started.address),
        *([] if started.admin_address is None else [("administration", started.admin_address)]),
        *([] if started.traces is None else [("traces", started.traces)]),
    ]


def shortened(path: Path) -> str:
    """A path from the current folder or the home folder on; of others that are long, the last three parts."""
    whole = shown = path.absolute()
    for base, name in ((Path.home(), "~"), (Path.cwd(), ".")):
        if whole.is_relative_to(base) and len(base.parts) > 1:
            shown = Path(name, whole.relative_to(base))
    return str(shown) if len(str(shown)) <= MOST_OF_A_PATH else str(Path("…", *whole.parts[-3:]))


def expected_failures() -> tuple[type[Exception], ...]:
    """Errors that are answers to the operator: one sentence, no traceback."""
    from flexgate.experts.errors import ExpertsError
    from flexgate.policies.errors import PolicyError
    from flexgate.server.engine.frontend.capabilities import RefusedConfigurationError
    from flexgate.server.engine.frontend.checkpoint import CheckpointError
    from flexgate.server.experts.errors import ExpertError
    from flexgate.server.http.tracing import TracingRefused
    from flexgate.server.inference.errors import HandlersRefused
    from flexgate.server.ledger.errors import LedgerError
    from flexgate.server.ledger.receipts.book import BookError
    from flexgate.server.lifecycle.seed import DemoKeysFound, ManifestRefused
    from flexgate.server.lifecycle.store_settings import SettingsError
    from flexgate.server.policy.rollback_guard import ClockBehind

    return (
        BookError,
        CheckpointError,
        ClockBehind,
        DemoKeysFound,
        ExpertError,
        ExpertsError,
        ManifestRefused,
        PolicyError,
        RefusedConfigurationError,
        HandlersRefused,
        LedgerError,
        SettingsError,
        TracingRefused,
    )
