"""How long one request waits for its first token while another project has 64 streams open, against an idle server."""

import asyncio
import math
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from speed.compare import spread
from speed.quiet import MOST, Used
from speed.record import Run
from speed.servers import Server, demo
from speed.statistics import Ratio, paired

STREAMS = 64
REQUESTS = 20  # of each block
FIRST = 2  # of each block that do not count: streams that were left are still being ended
BOUND = 3.0
TRIES = 3  # rounds that are measured for each one that is asked for, where others disturb them
ALLOWED = 0.1  # how far from 1 the interval of an idle server against itself may reach: far less than BOUND is from 1
BUSY, ASKING = "sk-demo-all", "sk-demo-press"
WHAT = (
    "seconds from sending a streamed completion to its first token, one request at a time, on the demo: on an idle "
    "server, with 64 streams of another project open, and on an idle server again; a round is one block of each, in an "
    "order that turns around, and is measured again where other programs used more than "
    f"{MOST} cores beside it; first_token_ratio is against the geometric mean of both idle blocks"
)
NAMES = ("idle", "loaded", "again")


@dataclass(frozen=True)
class Round:
    """Seconds of each block's requests, and the cores that other programs used beside them."""

    blocks: Mapping[str, Sequence[float]]
    others: float

    def median(self, name: str) -> float:
        """Of one block."""
        return float(np.median(self.blocks[name]))

    @property
    def quiet(self) -> bool:
        """Whether the round tells of the server rather than of the machine."""
        return self.others <= MOST


Found = Sequence[Sequence[Round]]  # of each start its rounds


def run(asked: Run) -> bool:
    """Measure on fresh servers; whether the first token comes within BOUND times an idle server's."""
    starts, rounds = asked.starts or (1 if asked.quick else 8), asked.rounds or (1 if asked.quick else 10)
    journal = asked.journal("fairness")
    for start in tqdm(range(starts), desc="starts"):
        if f"start {start}" not in journal:
            journal.add(f"start {start}", [asdict(one) for one in _start(rounds)])
    found = [[Round(**one) for one in journal[f"start {start}"]] for start in range(starts)]
    results, itself, held = report(found, rounds)
    against = _against(found, rounds)
    asked.write(
        "fairness", results, shape={"model": "the demo's"}, itself=[("idle", itself)], allowed=ALLOWED, against=against
    )
    journal.close()
    low, high = results["first_token_ratio"]["ci95"]
    value = results["first_token_ratio"]["median"]
    sys.stdout.write(
        f"first token beside {STREAMS} streams: {value:.2f} [{low}, {high}] × an idle server's, at most {BOUND}\n"
    )
    return held


def report(found: Found, rounds: int) -> tuple[dict[str, Any], Ratio, bool]:
    """The result file's content, an idle server against itself, and whether the whole interval keeps the bound."""
    chosen = [_chosen(start, rounds) for start in found]
    idle, loaded, again = ([[one.median(name) for one in start] for start in chosen] for name in NAMES)
    both = [[math.sqrt(a * b) for a, b in zip(*start, strict=True)] for start in zip(idle, again, strict=True)]
    against, itself = paired(loaded, both), paired(again, idle)
    results = {
        "what": WHAT,
        "starts": len(found),
        "rounds": rounds,
        "rounds_disturbed": sum(not one.quiet for start in found for one in start),
        "streams": STREAMS,
        "bound": BOUND,
        "first_token_ratio": against.report(),
        "idle_against_itself": itself.report(),
        "first_token_seconds": {name: _quantiles(chosen, name) for name in NAMES},
        "others_cores": spread([one.others for start in chosen for one in start]),
    }
    return results, itself, against.high <= BOUND


def _chosen(start: Sequence[Round], rounds: int) -> Sequence[Round]:
    """As many rounds as were asked for: those that others disturbed least, in the order in which they were measured."""
    least = sorted(start, key=lambda one: one.others)[:rounds]
    return [one for one in start if one in least]


def _against(found: Found, rounds: int) -> list[str]:
    disturbed = [start for start in found if sum(one.quiet for one in start) < rounds]
    if not disturbed:
        return []
    used = float(np.median([one.others for start in disturbed for one in start]))
    return [
        f"in {len(disturbed)} of {len(found)} starts, fewer than {rounds} rounds of {TRIES * rounds} were quiet: other "
        f"programs used {used:.2f} cores beside them, and may use {MOST}; measure while nothing else runs"
    ]


def _quantiles(found: Found, name: str) -> dict[str, float]:
    values = np.concatenate([one.blocks[name] for start in found for one in start])
    return {"median": round(float(np.median(values)), 4), "p95": round(float(np.quantile(values, 0.95)), 4)}


def _start(rounds: int) -> list[Round]:
    with tempfile.TemporaryDirectory(prefix="flexgate-fairness-") as directory, demo(Path(directory)) as server:
        return asyncio.run(_measure(server, rounds))


async def _measure(server: Server, rounds: int) -> list[Round]:
    """Rounds until as many were quiet as were asked for, TRIES times as many at most."""
    found: list[Round] = []
    async with aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await _block(session)  # what is made once, for the first requests
        while sum(one.quiet for one in found) < rounds and len(found) < TRIES * rounds:
            found.append(await _round(session, server.pid, NAMES[:: 1 if len(found) % 2 == 0 else -1]))
    return found


async def _round(session: aiohttp.ClientSession, pid: int, order: Sequence[str]) -> Round:
    blocks, before = {}, Used.now(pid)
    for name in order:
        async with _busy(session) if name == "loaded" else nullcontext():
            blocks[name] = await _block(session)
    return Round(blocks, Used.now(pid).others_since(before))


async def _block(session: aiohttp.ClientSession) -> list[float]:
    waits = []
    for _ in range(FIRST + REQUESTS):
        began = time.perf_counter()
        async with _stream(session, ASKING, tokens=4) as answer:
            await anext(_events(answer))
            waits.append(time.perf_counter() - began)
            await answer.read()
    return waits[FIRST:]


@asynccontextmanager
async def _busy(session: aiohttp.ClientSession) -> AsyncIterator[None]:
    """Keep every stream open, and leave them all at the end; begins once a first one has tokens."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def stream() -> None:
        while not ended.is_set():
            async with _stream(session, BUSY, tokens=200) as answer:
                async for _ in _events(answer):
                    begun.set()

    streams = [asyncio.ensure_future(stream()) for _ in range(STREAMS)]
    try:
        await asyncio.wait_for(begun.wait(), 60)
        yield
    finally:
        ended.set()
        for task in streams:
            task.cancel()
        ends = await asyncio.gather(*streams, return_exceptions=True)
    broken = [end for end in ends if isinstance(end, Exception)]
    if broken:
        raise RuntimeError(f"{len(broken)} of {STREAMS} streams broke off") from broken[0]


def _stream(session: aiohttp.ClientSession, key: str, *, tokens: int) -> Any:
    body = {"model": "flexgate-demo", "prompt": "The river rose over", "max_tokens": tokens, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    return session.post("/v1/completions", json={**body, "stream": True}, headers=headers, raise_for_status=True)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for line in answer.content:
        if line.startswith(b"data: {"):
            yield line
