"""A closed-loop load: a fixed number of clients, each sending its next request when one has ended.

The client shares the machine's cores with the server, as both servers suffer alike; it does no more
than read the answer, and reports its own processor time so that a reader can see what it took.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from speed.servers import KEY, MODEL

TEXT = "when the river rose over old stone bridges people walked north with bread salt and letters"
PROMPT_WORDS = 16
NEW_TOKENS = 16


@dataclass(frozen=True)
class Traffic:
    """One kind of request at one concurrency."""

    endpoint: str
    stream: bool
    clients: int
    requests: int


@dataclass
class Turn:
    """What one server did with one block of requests; times in seconds."""

    wall: float = 0.0
    client_cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)
    first_bytes: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.wall


def send(url: str, traffic: Traffic, seed: int) -> Turn:
    """One block of requests; the same seed sends the same texts."""
    return asyncio.run(_send(url, traffic, seed))


async def _send(url: str, traffic: Traffic, seed: int) -> Turn:
    bodies = iter([_body(traffic, np.random.default_rng((seed, number))) for number in range(traffic.requests)])
    path = "/v1/chat/completions" if traffic.endpoint == "chat" else "/v1/completions"
    turn = Turn()
    connector = aiohttp.TCPConnector(limit=traffic.clients)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(url, connector=connector, headers=headers) as session:

        async def client() -> None:
            for body in bodies:
                began = time.perf_counter()
                async with session.post(path, data=body) as answer:
                    first = await answer.content.readany()
                    turn.first_bytes.append(time.perf_counter() - began)
                    rest = await answer.content.read()
                turn.latencies.append(time.perf_counter() - began)
                if answer.status != 200 or not (first or rest):
                    raise RuntimeError(f"{answer.status}: {(first + rest)[:400]!r}")

        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client() for _ in range(traffic.clients)))
        turn.wall, turn.client_cpu = time.perf_counter() - began, time.process_time() - cpu
    return turn


def _body(traffic: Traffic, generator: np.random.Generator) -> bytes:
    text = " ".join(generator.choice(TEXT.split(), PROMPT_WORDS))
    body: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    if traffic.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if traffic.stream:
        body["stream"] = True
    return json.dumps(body).encode()
