"""Requests per second and latency through `flexgate serve`, against `vllm serve` on the same checkpoint.

vLLM's server is there twice: the second set of starts is measured against the first by the same code (A/A).
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import spread, take_turns
from speed.load import NEW_TOKENS, PROMPT_WORDS, Traffic, Turn, send
from speed.record import Journal, Run
from speed.servers import SAME, Server, flexgate, vllm
from speed.statistics import Ratio, paired, pooled_quantile

AGAIN = "vllm again"
CONTENDERS = {"flexgate": flexgate, "vllm": vllm, AGAIN: vllm}
STARTS = 5
ROUNDS = 4
Turns = Mapping[str, Sequence[Sequence[Turn]]]  # of each contender its starts, of each start its rounds
CLIENTS = (1, 8, 32)
REQUESTS = {1: 4, 8: 16, 32: 64}


def run(asked: Run) -> None:
    """Start the servers again and again, and let them take turns at every kind of traffic."""
    shape, clients = (TINY, CLIENTS[:1]) if asked.quick else (MIDDLE, CLIENTS)
    cases = [
        Traffic(endpoint, stream, number, REQUESTS[number])
        for endpoint, stream, number in itertools.product(("completions", "chat"), (False, True), clients)
    ]
    starts, journal = asked.starts or (1 if asked.quick else STARTS), asked.journal("serving")
    rounds = asked.rounds or (2 if asked.quick else ROUNDS)
    with checkpoint(shape) as model:
        for start in range(starts):
            measure(model, start, cases, rounds, journal)
    measured, itself = report(journal, starts, cases)
    measured |= {"starts": starts, "rounds": rounds}
    asked.write("serving", measured, shape=described(shape), itself=itself)
    journal.close()


def measure(model: Path, start: int, cases: Sequence[Traffic], rounds: int, journal: Journal) -> None:
    """Start every contender once, and measure what the journal does not have yet of each endpoint and concurrency."""
    missing = [(number, traffic) for number, traffic in enumerate(cases) if _name(start, number) not in journal]
    if not missing:
        return
    total = len(missing) * rounds * len(CONTENDERS)
    with ExitStack() as stack, tqdm(total=total, desc=f"start {start + 1}") as bar:
        servers = _servers(model, stack)
        for number, traffic in missing:
            bar.set_description(
                f"start {start + 1}: {traffic.endpoint}{' streamed' * traffic.stream} {traffic.clients}"
            )
            contenders = {name: _contender(server.url, traffic) for name, server in servers.items()}
            for contender in contenders.values():
                contender()  # warm
            turns = take_turns(contenders, rounds, bar.update)
            journal.add(_name(start, number), {name: [asdict(turn) for turn in turns[name]] for name in turns})


def _servers(model: Path, stack: ExitStack) -> dict[str, Server]:
    """All load at once; none is asked before all are ready."""
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def begin(name: str) -> Server:
        (root / name).mkdir()
        return stack.enter_context(CONTENDERS[name](model, root / name))

    with ThreadPoolExecutor() as pool:
        return dict(zip(CONTENDERS, pool.map(begin, CONTENDERS), strict=True))


def report(journal: Journal, starts: int, cases: Sequence[Traffic]) -> tuple[dict[str, Any], list[tuple[str, Ratio]]]:
    """What a result file says, and of each case vLLM's server against itself."""
    found, itself = [], []
    for number, traffic in enumerate(cases):
        kept = [journal[_name(start, number)] for start in range(starts)]
        turns = {name: [[Turn(**turn) for turn in start[name]] for start in kept] for name in CONTENDERS}
        ratios, again = _ratios(turns, "flexgate"), _ratios(turns, AGAIN)
        name = f"{traffic.endpoint}{', streamed' * traffic.stream}, {traffic.clients} clients"
        itself.append((name, again["requests_per_second"]))  # its quantiles are shown, and too coarse to refuse by
        found.append(
            {
                **asdict(traffic),
                "ratio": {name: ratio.report() for name, ratio in ratios.items()},
                f"{AGAIN}/vllm": {name: ratio.report() for name, ratio in again.items()},
                "servers": {name: _figures([turn for start in turns[name] for turn in start]) for name in turns},
            }
        )
    return {
        "what": "closed loop; ratios are of speed, flexgate / vllm, so that 1 is equal and less is slower",
        "options": list(SAME),
        "threads": 1,
        "prompt_words": PROMPT_WORDS,
        "new_tokens": NEW_TOKENS,
        "cases": found,
    }, itself


def _name(start: int, case: int) -> str:
    return f"start {start}, case {case}"


def _contender(url: str, traffic: Traffic) -> Callable[[], Turn]:
    """Sends texts that are new in every turn, and the same to both servers."""
    seeds = itertools.count()
    return lambda: send(url, traffic, next(seeds))


def _ratios(turns: Turns, ours: str) -> dict[str, Ratio]:
    """Ratios of speed: of latencies, vLLM's are on top."""
    mine, theirs = turns[ours], turns["vllm"]
    rates = [[[turn.rate for turn in start] for start in starts] for starts in (mine, theirs)]
    latencies = [[[turn.latencies for turn in start] for start in starts] for starts in (theirs, mine)]
    return {
        "requests_per_second": paired(*rates),
        **{name: pooled_quantile(*latencies, q) for name, q in (("p50", 0.5), ("p99", 0.99))},
    }


def _figures(turns: Sequence[Turn]) -> dict[str, Any]:
    latencies = np.concatenate([turn.latencies for turn in turns])
    first = np.concatenate([turn.first_bytes for turn in turns])
    return {
        "requests_per_second": spread([turn.rate for turn in turns]),
        "p50_ms": round(float(np.quantile(latencies, 0.5)) * 1000, 2),
        "p99_ms": round(float(np.quantile(latencies, 0.99)) * 1000, 2),
        "first_byte_p50_ms": round(float(np.quantile(first, 0.5)) * 1000, 2),
        "client_cpu_share": round(sum(t.client_cpu for t in turns) / sum(t.wall for t in turns), 3),
    }
