"""How long one request waits for its first token while another project has 64 streams open, against an idle server."""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from speed.record import Run
from speed.servers import demo
from speed.statistics import Ratio, paired

STREAMS = 64
REQUESTS = 10  # of each block
BOUND = 3.0
BUSY, ASKING = "sk-demo-all", "sk-demo-press"
WHAT = (
    "seconds from sending a streamed completion to its first token, one request at a time, on the demo: on an idle "
    "server, with 64 streams of another project open, and on an idle server again; a round is one block of each"
)
Blocks = dict[str, list[list[float]]]


def run(asked: Run) -> bool:
    """Measure on fresh servers; whether the first token comes within BOUND times an idle server's."""
    starts, rounds = asked.starts or (1 if asked.quick else 4), asked.rounds or (1 if asked.quick else 6)
    found: list[Blocks] = []
    for _ in tqdm(range(starts), desc="starts"):
        with tempfile.TemporaryDirectory(prefix="flexgate-fairness-") as directory, demo(Path(directory)) as server:
            found.append(asyncio.run(_measure(server.url, rounds)))
    against = _ratio(found, "loaded", "idle")
    itself = _ratio(found, "again", "idle")
    results = {
        "what": WHAT,
        "starts": starts,
        "rounds": rounds,
        "streams": STREAMS,
        "bound": BOUND,
        "first_token_ratio": against.report(),
        "idle_against_itself": itself.report(),
        "first_token_seconds": {name: _quantiles(found, name) for name in ("idle", "loaded", "again")},
        "load_while_measuring": os.getloadavg(),
    }
    asked.write("fairness", results, shape={"model": "the demo's"}, itself=[("idle", itself)])
    sys.stdout.write(f"first token beside {STREAMS} streams: {against.value:.2f} × an idle server's, at most {BOUND}\n")
    return against.value <= BOUND


def _ratio(found: Sequence[Blocks], ours: str, theirs: str) -> Ratio:
    """Of each round's medians."""
    return paired(*([[float(np.median(block)) for block in start[name]] for start in found] for name in (ours, theirs)))


def _quantiles(found: Sequence[Blocks], name: str) -> dict[str, float]:
    values = np.concatenate([block for start in found for block in start[name]])
    return {"median": round(float(np.median(values)), 4), "p95": round(float(np.quantile(values, 0.95)), 4)}


async def _measure(url: str, rounds: int) -> Blocks:
    blocks: Blocks = {"idle": [], "loaded": [], "again": []}
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        await _block(session)  # what is made once, for the first requests
        for _ in range(rounds):
            blocks["idle"].append(await _block(session))
            async with _busy(session):
                blocks["loaded"].append(await _block(session))
            blocks["again"].append(await _block(session))
    return blocks


async def _block(session: aiohttp.ClientSession) -> list[float]:
    waits = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        async with _stream(session, ASKING, tokens=4) as answer:
            await anext(_events(answer))
            waits.append(time.perf_counter() - began)
            await answer.read()
    return waits


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
