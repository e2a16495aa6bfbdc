"""What the instruments of `speed.loop.tracing` wrote, by request, and what of it is beyond the bound."""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

BOUND_MS = 50.0
ROOT = Path(__file__).parents[3]
PACKAGES = ("policies", "kernels", "experts", "server")
SHOWN = 6  # frames of a stack


@dataclass(frozen=True)
class Long:
    """One callback or step that took long; milliseconds."""

    kind: str
    what: str
    at: float
    busy: float
    wall: float
    where: tuple[str, ...]


@dataclass
class Sent:
    """One request: what was sent and what came of it. Times are the monotonic clock's.

    `ended` is when the server was ended that had it, so that the start of the next one is not charged to it.
    """

    body: str
    size: int
    began: float = 0.0
    ended: float = math.inf
    outcome: str = ""  # a status, or what happened instead of an answer
    long: list[Long] = field(default_factory=list)

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Self:
        """A request as `dataclasses.asdict` gave it."""
        return cls(**{**kept, "long": [Long(**{**one, "where": tuple(one["where"])}) for one in kept["long"]]})

    @property
    def answered(self) -> bool:
        """Whether there was an answer at all."""
        return self.outcome.isdigit()

    @property
    def accepted(self) -> bool:
        """Whether the body was answered and not refused."""
        return self.outcome.startswith("2")

    def worst(self, kind: str) -> Long | None:
        """What of a kind had the most thread time."""
        return max((long for long in self.long if long.kind == kind), key=lambda long: long.busy, default=None)

    def busy(self, kind: str) -> float:
        """The most thread time of one callback or step, in milliseconds; 0 where all were too short to be noted."""
        worst = self.worst(kind)
        return 0.0 if worst is None else worst.busy


def read(folder: Path) -> list[Long]:
    """Every line of every process."""
    lines = (json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines())
    return [
        Long(line["kind"], line["what"], line["at"], 1000 * line["busy"], 1000 * line["wall"], where(line["stacks"]))
        for line in lines
    ]


def where(stacks: Iterable[tuple[Sequence[str], int]]) -> tuple[str, ...]:
    """The innermost frames of the stack that was seen most often, and the innermost one of ours."""
    for stack, _ in stacks:
        frames = [_shortened(frame) for frame in stack]
        inner = frames[:SHOWN]
        ours = next((frame for frame in frames if frame.startswith(PACKAGES)), None)
        return tuple(inner if ours is None or ours in inner else [*inner, ours])
    return ()


def _shortened(frame: str) -> str:
    for part in ("site-packages/flexgate/", "site-packages/", f"{ROOT}/"):
        if part in frame:
            return frame.partition(part)[2]
    return frame.rpartition("/")[2]


def assign(sent: Sequence[Sent], found: Iterable[Long]) -> None:
    """Give each request what began after it was sent and before the next one was: one is under way at a time."""
    begins = [one.began for one in sent]
    for long in found:
        position = bisect_right(begins, long.at) - 1
        if position >= 0 and long.at < sent[position].ended:
            sent[position].long.append(long)


def least(tries: Sequence[Sent], kind: str) -> Sent:
    """The try that other work disturbed least."""
    return min(tries, key=lambda one: one.busy(kind))


def callback(one: Sent) -> dict[str, Any]:
    """A request's longest callback as the report shows it."""
    return _shown(one, "callback", {})


def step(one: Sent, unconstrained: float) -> dict[str, Any]:
    """Its longest step, beside that of as many tokens without a constraint."""
    return _shown(one, "step", {"unconstrained_ms": round(unconstrained, 1)})


def _shown(one: Sent, kind: str, more: Mapping[str, Any]) -> dict[str, Any]:
    long = one.worst(kind)
    shown = {"body": one.body, "bytes": one.size, "outcome": one.outcome, **more}
    if long is None:
        return shown
    return {
        **shown,
        "thread_ms": round(long.busy, 1),
        "wall_ms": round(long.wall, 1),
        "where": list(long.where) or [long.what[:200]],
    }
