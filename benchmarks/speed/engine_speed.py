"""Tokens per second of the engine: gated, with the gate compiled out, and vLLM's Transformers backend.

The ungated engine is there twice: the second set of starts is measured against the first by the same code (A/A).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import spread, take_turns
from speed.engines import Batch, Timed, engine
from speed.record import Journal, Run
from speed.statistics import Ratio, paired

AGAIN = "ungated again"
CONTENDERS = {"gated": "gated", "ungated": "ungated", "transformers": "transformers", AGAIN: "ungated"}
RATIOS = {"gated/ungated": ("gated", "ungated"), "gated/transformers": ("gated", "transformers")}
ITSELF = f"{AGAIN}/ungated"
STARTS = 5
Turns = Mapping[str, Sequence[Sequence[Timed]]]  # of each contender its starts, of each start its rounds
Case = tuple[str, Batch, int]

# Short turns, many rounds: what disturbs a turn then disturbs its neighbour too.
CASES = (
    ("prefill", Batch(1, 128, 1), 20),
    ("prefill", Batch(8, 32, 1), 14),
    ("prefill", Batch(32, 32, 1), 8),
    ("decode", Batch(1, 4, 17), 30),
    ("decode", Batch(8, 4, 13), 16),
    ("decode", Batch(32, 4, 9), 12),
)


def run(mode: str, asked: Run) -> None:
    """Measure ``eager`` or ``compiled`` engines."""
    name, shape = f"engine-{mode}", TINY if asked.quick else MIDDLE
    cases = [(phase, batch, asked.rounds or (2 if asked.quick else usual)) for phase, batch, usual in CASES]
    starts, journal = asked.starts or (1 if asked.quick else STARTS), asked.journal(name)
    with checkpoint(shape) as model:
        for start in range(starts):
            measure(model, start, cases, journal, eager=mode == "eager")
    measured, itself = report(journal, starts, cases)
    asked.write(name, measured, shape=described(shape), itself=itself)
    journal.close()


def measure(
    model: Path,
    start: int,
    cases: Sequence[Case],
    journal: Journal,
    *,
    eager: bool,
    contenders: Mapping[str, str] = CONTENDERS,
) -> None:
    """Start every contender once, and let them take turns at each batch that the journal does not have yet."""
    missing = [(number, case) for number, case in enumerate(cases) if _name(start, number) not in journal]
    if not missing:
        return
    turns_in_all = sum(rounds for _, (_, _, rounds) in missing) * len(contenders)
    with ExitStack() as stack, tqdm(total=turns_in_all, desc=f"start {start + 1}") as bar:
        engines = {
            name: stack.enter_context(engine(variant, model, eager=eager)) for name, variant in contenders.items()
        }
        for running in engines.values():
            running.wait_until_started()
        for number, (phase, batch, rounds) in missing:
            bar.set_description(f"start {start + 1}: {phase} of {batch.requests}")
            turns = take_turns({name: partial(each.run, batch) for name, each in engines.items()}, rounds, bar.update)
            journal.add(_name(start, number), {name: [astuple(timed) for timed in turns[name]] for name in turns})


def report(
    journal: Journal, starts: int, cases: Sequence[Case], contenders: Mapping[str, str] = CONTENDERS
) -> tuple[dict[str, Any], list[tuple[str, Ratio]]]:
    """What a result file says, and of each case the ungated engine against itself."""
    found, itself = [], []
    for number, (phase, batch, rounds) in enumerate(cases):
        kept = [journal[_name(start, number)] for start in range(starts)]
        turns = {name: [[Timed(*timed) for timed in start[name]] for start in kept] for name in contenders}
        ratios, busy = (_ratios(turns, clock) for clock in (phase, f"{phase}_cpu"))
        itself.append((f"{phase} of {batch.requests}", ratios[ITSELF]))
        found.append(
            {
                "phase": phase,
                "batch": asdict(batch),
                "rounds": rounds,
                "tokens_per_second": _speeds(turns, phase, batch),
                "ratio": {name: ratio.report() for name, ratio in ratios.items()},
                "ratio_per_cpu_second": {name: ratio.report() for name, ratio in busy.items()},
            }
        )
    what = f"tokens per second, of {starts} starts of every contender; ratios are gated / other, intervals over starts"
    return {"what": what, "threads": 1, "starts": starts, "cases": found}, itself


def _ratios(turns: Turns, clock: str) -> dict[str, Ratio]:
    """Ratios of speed, which are those of time turned around."""
    times = {name: [[getattr(timed, clock) for timed in start] for start in turns[name]] for name in turns}
    pairs = {name: pair for name, pair in ({**RATIOS, ITSELF: (AGAIN, "ungated")}).items() if {*pair} <= turns.keys()}
    return {name: paired(times[theirs], times[ours]) for name, (ours, theirs) in pairs.items()}


def _speeds(turns: Turns, phase: str, batch: Batch) -> dict[str, Any]:
    tokens = batch.requests * (batch.prompt_tokens if phase == "prefill" else batch.new_tokens - 1)
    return {
        name: spread([tokens / getattr(timed, phase) for start in starts for timed in start])
        for name, starts in turns.items()
    }


def _name(start: int, case: int) -> str:
    return f"start {start}, case {case}"
