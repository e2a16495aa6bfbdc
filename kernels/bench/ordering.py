"""Would it pay to run requests of like gates together? A simulation on the roofline: calculated, not measured.

A step takes as long as reading what it reads or computing what it computes: in every layer the experts that any of its
tokens chose, and once the rest of the model and the keys and values of its requests. Requests wait in a backlog that
never runs dry, so that the order in which they are let in can matter at all. Three orders:

- arrival: first come, first served;
- like gates: whoever adds fewest experts to those of the running requests; waiting long goes first;
- split steps: first come, first served, but a step runs the requests of one gate only, taking turns.

Usage: `python -m flexgate.kernels.bench.ordering FOLDER` writes batch-ordering.json and batch-ordering.svg.
"""

import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flexgate.kernels.bench.plot import Chart, svg
from flexgate.kernels.bench.roofline import FLEXOLMO, H200_DATA_SHEET, Ceilings, floor_us
from flexgate.kernels.testing.configurations import Shape

Gate = frozenset[int]
ORDERS = ("arrival", "like gates", "split steps")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Model:
    """What a step reads apart from experts, for FlexOlmo-7x7B in bfloat16."""

    shape: Shape = FLEXOLMO
    layers: int = 32
    dense_bytes: float = 5.11e9  # attention 4.29 GB, output head 0.82 GB
    context_bytes: float = 2 * 2 * 4096 * 32  # keys and values of one token
    ceilings: Ceilings = H200_DATA_SHEET


@dataclass(frozen=True)
class Load:
    """Requests: their gates are drawn evenly from `gates`, their lengths from geometric distributions."""

    name: str
    gates: tuple[Gate, ...]
    requests: int = 400
    backlog: int = 128
    prompt: int = 200
    answer: int = 100


@dataclass
class Request:
    """One request and when it was seen."""

    gate: Gate
    left: int
    context: int
    arrived: float
    passed_over: int = 0


@dataclass(frozen=True)
class Outcome:
    """What an order came to."""

    load: str
    order: str
    batch: int
    tokens_per_s: float
    experts_per_step: float
    median_s: float
    p99_s: float


def simulate(load: Load, order: str, batch: int, model: Model = Model(), seed: int = 0) -> Outcome:
    """Serve all of `load` with at most `batch` requests at a time."""
    draw = random.Random(seed)
    run = _Run(load, order, batch, model, draw)
    while run.finished < load.requests:
        run.step()
    waits = sorted(run.latencies)
    return Outcome(
        load.name,
        order,
        batch,
        run.tokens / run.now,
        statistics.fmean(run.used),
        statistics.median(waits),
        waits[int(0.99 * (len(waits) - 1))],
    )


_PATIENCE = 64  # times that a request may be passed over


@dataclass
class _Run:
    load: Load
    order: str
    batch: int
    model: Model
    draw: random.Random
    now: float = 0.0
    tokens: int = 0
    finished: int = 0
    turn: int = 0
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Let requests in, run one step, let the finished ones go."""
        fresh = self._admit()
        stepped = self._turn() if self.order == "split steps" else self.running
        new_tokens = sum(request.context for request in fresh if request in stepped)
        self.now += self._seconds(stepped, len(stepped) + new_tokens)
        for request in stepped:
            request.left -= 1
            request.context += 1
        self.tokens += len(stepped)
        done = [request for request in stepped if request.left <= 0]
        self.latencies += [self.now - request.arrived for request in done]
        self.finished += len(done)
        self.running = [request for request in self.running if request.left > 0]

    def _admit(self) -> list[Request]:
        fresh = []
        while len(self.running) < self.batch:
            while len(self.waiting) < self.load.backlog:
                self.waiting.append(self._request())
            request = self.waiting.pop(self._next())
            self.running.append(request)
            fresh.append(request)
        return fresh

    def _next(self) -> int:
        if self.order != "like gates" or self.waiting[0].passed_over >= _PATIENCE:
            return 0
        open_now = frozenset[int]().union(*(request.gate for request in self.running))
        chosen = min(range(len(self.waiting)), key=lambda index: len(self.waiting[index].gate - open_now))
        for request in self.waiting[:chosen]:
            request.passed_over += 1
        return chosen

    def _turn(self) -> list[Request]:
        gates = list(dict.fromkeys(request.gate for request in self.running))
        self.turn += 1
        return [request for request in self.running if request.gate == gates[self.turn % len(gates)]]

    def _seconds(self, stepped: Sequence[Request], tokens: int) -> float:
        shape, ceilings = self.model.shape, self.model.ceilings
        chosen = [self.draw.sample(sorted(r.gate), min(shape.top_k, len(r.gate))) for r in stepped]
        used, picks = len({slot for slots in chosen for slot in slots}), sum(map(len, chosen))
        self.used.append(used)
        share = tokens / len(stepped)
        experts = self.model.layers * floor_us(shape, ceilings, used=used, picks=picks * share) * 1e-6
        context = sum(request.context for request in stepped) * self.model.context_bytes
        dense = max(
            self.model.dense_bytes / ceilings.bytes_per_s, tokens * self.model.dense_bytes / ceilings.flop_per_s
        )
        return experts + dense + context / ceilings.bytes_per_s

    def _request(self) -> Request:
        def length(mean: int) -> int:
            return 1 + int(self.draw.expovariate(1 / mean))

        return Request(self.draw.choice(self.load.gates), length(self.load.answer), length(self.load.prompt), self.now)


def loads() -> list[Load]:
    """Licences as they might be: one closed expert each, any subset, and everybody alike. `public`, 0, is in all."""
    closed = range(1, FLEXOLMO.slots)
    draw = random.Random(7)
    subsets = tuple(frozenset({0, *draw.sample(closed, draw.randint(0, 6))}) for _ in range(24))
    return [
        Load("one closed expert", tuple(frozenset({0, slot}) for slot in closed)),
        Load("24 random subsets", subsets),
        Load("everybody alike", (frozenset({0, 1, 2}),)),
    ]


def main(folder: Path, batches: Sequence[int] = BATCHES, say: Callable[[str], object] = sys.stdout.write) -> None:
    """Simulate all loads, orders and batch sizes, and write what came out."""
    outcomes = [simulate(load, order, batch) for load in loads() for order in ORDERS for batch in batches]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"calculated_from": asdict(H200_DATA_SHEET), "outcomes": [asdict(o) for o in outcomes]}, indent=1)
    (folder / "batch-ordering.json").write_text(text + "\n", encoding="utf-8")
    lines = {
        f"{order}: {load}": [(float(o.batch), o.tokens_per_s) for o in outcomes if (o.order, o.load) == (order, load)]
        for load in ("one closed expert", "24 random subsets")
        for order in ORDERS
    }
    chart = Chart("Order of requests, FlexOlmo-7x7B: calculated", "requests at a time", "tokens/s", lines)
    (folder / "batch-ordering.svg").write_text(svg(chart), encoding="utf-8")
    for o in outcomes:
        say(
            f"{o.load:24} {o.order:12} batch {o.batch:4}: {o.tokens_per_s:8.0f} tokens/s, "
            f"{o.experts_per_step:.1f} experts a step, median {o.median_s:6.2f} s, p99 {o.p99_s:6.2f} s\n"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
