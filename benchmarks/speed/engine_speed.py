"""Tokens per second of the engine: gated, with the gate compiled out, and vLLM's Transformers backend."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import ratio, spread, take_turns
from speed.engines import VARIANTS, Batch, Timed, engine
from speed.record import write

# Short turns, many rounds: what disturbs a turn then disturbs its neighbour too.
CASES = (
    ("prefill", Batch(1, 128, 1), 60),
    ("prefill", Batch(8, 32, 1), 40),
    ("prefill", Batch(32, 32, 1), 20),
    ("decode", Batch(1, 4, 17), 100),
    ("decode", Batch(8, 4, 13), 50),
    ("decode", Batch(32, 4, 9), 40),
)


def run(mode: str, *, quick: bool, rounds: int | None, results: Path) -> None:
    """Measure ``eager`` or ``compiled`` engines."""
    shape = TINY if quick else MIDDLE
    cases = [(phase, batch, rounds or (2 if quick else usual)) for phase, batch, usual in CASES]
    with checkpoint(shape) as model:
        measured = measure(model, eager=mode == "eager", cases=cases)
    write(f"engine-{mode}", measured, shape=described(shape), directory=results, rounds=rounds)


def measure(model: Path, *, eager: bool, cases: Sequence[tuple[str, Batch, int]]) -> dict[str, Any]:
    """Let the three variants take turns at every batch."""
    turns_in_all = sum(rounds for _, _, rounds in cases) * len(VARIANTS)
    with ExitStack() as stack, tqdm(total=turns_in_all, desc="starting engines") as bar:
        engines = {name: stack.enter_context(engine(name, model, eager=eager)) for name in VARIANTS}
        for running in engines.values():
            running.wait_until_started()
        found = []
        for phase, batch, rounds in cases:
            bar.set_description(f"{phase} of {batch.requests}")
            contenders = {name: partial(running.run, batch) for name, running in engines.items()}
            turns = take_turns(contenders, rounds, bar.update)
            found.append({"phase": phase, "batch": asdict(batch), "rounds": rounds, **_report(turns, phase, batch)})
    return {"what": "tokens per second; ratios are gated / other, per round", "threads": 1, "cases": found}


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
