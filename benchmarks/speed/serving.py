"""Requests per second and latency through `flexgate serve`, against `vllm serve` on the same checkpoint."""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import pooled_quantile_ratio, ratio, spread, take_turns
from speed.load import NEW_TOKENS, PROMPT_WORDS, Traffic, Turn, send
from speed.record import write
from speed.servers import SAME, flexgate, vllm

STARTS = (flexgate, vllm)
CLIENTS = (1, 8, 32)
REQUESTS = {1: 4, 8: 16, 32: 64}


def run(*, quick: bool, rounds: int | None, results: Path) -> None:
    """Start both servers and let them take turns at every kind of traffic."""
    shape = TINY if quick else MIDDLE
    with checkpoint(shape) as model, tempfile.TemporaryDirectory() as directory:
        measured = measure(model, Path(directory), rounds or (2 if quick else 12), CLIENTS[:1] if quick else CLIENTS)
    write("serving", measured, shape=described(shape), directory=results, rounds=rounds)


def measure(model: Path, directory: Path, rounds: int, clients: Sequence[int]) -> dict[str, Any]:
    """Every endpoint, streamed and not, at every concurrency."""
    cases = [
        Traffic(endpoint, stream, number, REQUESTS[number])
        for endpoint, stream, number in itertools.product(("completions", "chat"), (False, True), clients)
    ]
    found = []
    with ExitStack() as stack, tqdm(total=len(cases) * rounds * 2, desc="starting servers") as bar:
        with ThreadPoolExecutor() as pool:  # both load at once; neither is asked before both are ready
            running = pool.map(lambda start: stack.enter_context(start(model, directory)), STARTS)
        servers = {start.__name__: server for start, server in zip(STARTS, running, strict=True)}
        for traffic in cases:
            bar.set_description(f"{traffic.endpoint}{' streamed' * traffic.stream} of {traffic.clients}")
            contenders = {name: _contender(server.url, traffic) for name, server in servers.items()}
            for contender in contenders.values():
                contender()  # warm
            found.append({**asdict(traffic), **_report(take_turns(contenders, rounds, bar.update))})
    return {
        "what": "closed loop; ratios are of speed, flexgate / vllm, so that 1 is equal and less is slower",
        "options": list(SAME),
        "threads": 1,
        "prompt_words": PROMPT_WORDS,
        "new_tokens": NEW_TOKENS,
        "rounds": rounds,
        "cases": found,
    }


def _contender(url: str, traffic: Traffic) -> Callable[[], Turn]:
    """Sends texts that are new in every turn, and the same to both servers."""
    seeds = itertools.count()
    return lambda: send(url, traffic, next(seeds))


def _report(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    ours, theirs = turns["flexgate"], turns["vllm"]
    speeds: dict[str, Any] = {"requests_per_second": ratio([t.rate for t in ours], [t.rate for t in theirs])}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        speeds[name] = pooled_quantile_ratio([t.latencies for t in theirs], [t.latencies for t in ours], quantile)
    return {
        "ratio": speeds,
        "servers": {name: _figures(values) for name, values in turns.items()},
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
