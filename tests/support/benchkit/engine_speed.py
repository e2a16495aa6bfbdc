"""Tokens per second of the engine: gated, with the gate compiled out, and vLLM's Transformers backend."""

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchkit.checkpoint import MIDDLE, TINY, checkpoint, described
from benchkit.compare import ratio, spread, take_turns
from benchkit.engines import VARIANTS, Batch, Timed, engine
from benchkit.record import write

SIZES = (1, 8, 32)
PREFILL = {size: Batch(size, 256 if size == 1 else 64, 1) for size in SIZES}
DECODE = {size: Batch(size, 16, 65 if size == 1 else 33) for size in SIZES}


def run(*, quick: bool, rounds: int | None, results: Path) -> None:
    """Measure eager and compiled engines and write a file for each."""
    shape = TINY if quick else MIDDLE
    with checkpoint(shape) as model:
        for mode in ("eager",) if quick else ("eager", "compiled"):
            measured = measure(model, eager=mode == "eager", rounds=rounds or (2 if quick else 40))
            write(f"engine-{mode}", measured, shape=described(shape), directory=results, benchmark="engine_speed")


def measure(model: Path, *, eager: bool, rounds: int) -> dict[str, Any]:
    """Let the three variants take turns at every batch."""
    cases = [(phase, batch) for phase, sizes in (("prefill", PREFILL), ("decode", DECODE)) for batch in sizes.values()]
    with ExitStack() as stack, tqdm(total=len(cases) * rounds * len(VARIANTS)) as bar:
        bar.set_description("starting engines")
        engines = {name: stack.enter_context(engine(name, model, eager=eager)) for name in VARIANTS}
        found = []
        for phase, batch in cases:
            bar.set_description(f"{phase} of {batch.requests}")
            turns = take_turns(
                {name: partial(running.run, batch) for name, running in engines.items()}, rounds, bar.update
            )
            found.append({"phase": phase, "batch": asdict(batch), **_report(turns, phase, batch)})
    return {
        "what": "tokens per second; ratios are gated / other, per round",
        "rounds": rounds,
        "threads": 1,
        "cases": found,
    }


def _report(turns: dict[str, list[Timed]], phase: str, batch: Batch) -> dict[str, Any]:
    tokens = batch.requests * (batch.prompt_tokens if phase == "prefill" else batch.new_tokens - 1)
    speeds, busy = (
        {name: [tokens / getattr(timed, clock) for timed in values] for name, values in turns.items()}
        for clock in (phase, f"{phase}_cpu")
    )
    return {
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "ratio": {f"gated/{other}": ratio(speeds["gated"], speeds[other]) for other in VARIANTS[1:]},
        "ratio_per_cpu_second": {f"gated/{other}": ratio(busy["gated"], busy[other]) for other in VARIANTS[1:]},
    }
