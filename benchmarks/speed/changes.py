"""Experts that come and go under load: gaps between tokens, time to load, time to revoke, memory over many cycles."""

import asyncio
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from enginekit.checkpoints import Shape
from packagekit import statement
from tqdm import tqdm

from flexgate.experts.package.extract import extract_expert
from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import spread
from speed.record import Run
from speed.servers import ADMIN_KEY, KEY, Server, flexgate
from speed.startup import resident_bytes

LARGE = replace(MIDDLE, intermediate=2048, experts=4)  # an expert takes 101 MB in its file, 50 MB in its bfloat16 slot
STREAMS = 4
BIN_SECONDS = 0.005
ALLOWED_GAP = 0.05  # seconds beyond the quiet p99, or one step if that is longer
BYSTANDER = "expert-1"  # of the checkpoint; always there
Stages = defaultdict[str, list[float]]
LONG_PROMPT = "The old mill by the river was opened by the mayor of the town. " * 12


def run(asked: Run) -> None:
    """Gaps on a model with large experts, then cycles on a tiny one."""
    shape = TINY if asked.quick else LARGE
    turns = asked.rounds or (1 if asked.quick else 6)
    with _server(shape) as (server, package):
        measured = {
            "what": f"{STREAMS} streams; one expert is added meanwhile, or not",
            "gaps": asyncio.run(_gaps(server, package, turns, tokens=40 if asked.quick else 150)),
        }
    with _server(TINY) as (server, package):
        cycles = 3 if asked.quick else 1000
        measured["cycles"] = asyncio.run(_cycles(server, package, cycles))
    asked.write("changes", measured, shape=described(shape))


@dataclass
class Stream:
    """When each token of one answer came, and how it ended."""

    times: list[float] = field(default_factory=list)
    error: str | None = None


@asynccontextmanager
async def _clients(server: Server) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    def made(key: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120)

    async with made(KEY) as asking, made(ADMIN_KEY) as changing:
        yield asking, changing


async def _gaps(server: Server, package: Path, turns: int, *, tokens: int) -> dict[str, Any]:
    quiet: list[float] = []
    busy: list[float] = []
    during: list[float] = []
    loads: list[float] = []
    reads: list[float] = []
    stages: Stages = defaultdict(list)
    async with _clients(server) as (asking, changing):
        for _ in tqdm(range(turns), desc="gaps"):
            quiet += _between(await _streams(asking, tokens))
            reading = asyncio.ensure_future(_streams(asking, tokens))
            await asyncio.sleep(0.3)
            began = time.perf_counter()
            job = await _add(changing, package, stages)
            ended = time.perf_counter()
            streams = await reading
            busy += _between(streams)
            during += _between(streams, began, ended)
            loads.append(ended - began)
            reads.append(_read(package))
            await _revoke(changing, job["expert"])
    bound = _quantile(quiet, 0.99) + max(ALLOWED_GAP, _quantile(quiet, 0.5))
    return {
        "package_bytes": _bytes(package),
        "quiet_seconds": _described(quiet),
        "with_an_add_seconds": _described(busy),
        "while_adding_seconds": _described(during),
        "bound_seconds": bound,
        "beyond_bound": sum(gap > bound for gap in busy),
        "beyond_bound_when_quiet": sum(gap > bound for gap in quiet),
        "add_seconds": spread(loads),
        "stage_seconds": {stage: spread(seconds) for stage, seconds in stages.items()},
        "read_file_seconds": spread(reads),
        "histogram": {
            "bin_seconds": BIN_SECONDS,
            "quiet": _histogram(quiet),
            "with_an_add": _histogram(busy),
            "while_adding": _histogram(during),
        },
    }


async def _cycles(server: Server, package: Path, cycles: int) -> dict[str, Any]:
    """Add, ask, revoke while two streams use the expert and one does not."""
    revokes: list[float] = []
    lasted: list[float] = []
    late = hits = unharmed = undelivered = 0
    memory = []
    part = max(1, cycles // 10)
    async with _clients(server) as (asking, changing):
        for cycle in tqdm(range(cycles), desc="cycles"):
            if cycle % part == 0:
                memory.append(resident_bytes(server))
            cycle_began = time.perf_counter()
            job = await _add(changing, package)
            answer = await asking.post("/v1/completions", json=_body(2, job["expert"], prompt=LONG_PROMPT))
            hits += answer.json()["flexgate"]["attribution"]["cached_prompt_tokens"]
            users = [Stream(), Stream()]
            other = Stream()
            reading = [asyncio.ensure_future(_stream(asking, user, _body(400, job["expert"]))) for user in users]
            reading.append(asyncio.ensure_future(_stream(asking, other, _body(60, BYSTANDER))))
            while not all(user.times for user in users):
                await asyncio.sleep(0.001)
            began = time.perf_counter()
            record = await _revoke(changing, job["expert"])
            answered = time.perf_counter()
            revokes.append(answered - began)
            await asyncio.gather(*reading)
            lasted.append(time.perf_counter() - cycle_began)
            late += sum(at > answered for user in users for at in user.times)
            undelivered += record["undelivered_responses"]
            unharmed += other.error is None and [user.error for user in users] == ["expert_revoked"] * 2
        memory.append(resident_bytes(server))
    return {
        "cycles": cycles,
        "cycle_seconds": {"first_tenth": spread(lasted[:part]), "last_tenth": spread(lasted[-part:])},
        "revoke_seconds": _described(revokes),
        "tokens_after_the_answer": late,
        "prompt_tokens_hit_in_the_cache_of_a_revoked_expert": hits,
        "users_ended_and_others_unharmed": unharmed,
        "undelivered_responses": undelivered,
        "resident_bytes": memory,
    }


async def _streams(client: httpx.AsyncClient, tokens: int) -> list[Stream]:
    streams = [Stream() for _ in range(STREAMS)]
    await asyncio.gather(*(_stream(client, stream, _body(tokens, BYSTANDER)) for stream in streams))
    return streams


async def _stream(client: httpx.AsyncClient, stream: Stream, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith('data: {"error"'):
                stream.error = json.loads(line.removeprefix("data: "))["error"]["code"]
            elif line.startswith("data: {"):
                stream.times.append(time.perf_counter())


async def _add(client: httpx.AsyncClient, package: Path, stages: Stages | None = None) -> dict[str, Any]:
    """Add a package by name and wait until it is live; returns the job, and into ``stages`` how long each took."""
    seen: list[tuple[str, float]] = []
    job = (await client.post("/v1/experts", json={"package": package.name})).raise_for_status().json()
    async with client.stream("GET", f"/v1/expert_jobs/{job['id']}", params={"stream": "true"}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                job = json.loads(line.removeprefix("data: "))
                if not seen or seen[-1][0] != job["stage"]:
                    seen.append((job["stage"], time.perf_counter()))
    if stages is not None:
        for (stage, began), (_, ended) in pairwise(seen):
            stages[stage].append(ended - began)
    if job["status"] != "succeeded":
        raise RuntimeError(f"the expert was not added: {job['error']}")
    return job


async def _revoke(client: httpx.AsyncClient, expert: str) -> dict[str, Any]:
    record: dict[str, Any] = (await client.delete(f"/v1/experts/{expert}")).raise_for_status().json()
    return record


def _body(tokens: int, expert: str | None = None, prompt: str = "The") -> dict[str, Any]:
    body: dict[str, Any] = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return body if expert is None else {**body, "flexgate": {"experts": {"only": [expert]}}}


def _between(streams: Sequence[Stream], began: float = 0.0, ended: float = float("inf")) -> list[float]:
    """Gaps between tokens that overlap with a time."""
    return [
        after - before
        for stream in streams
        for before, after in zip(stream.times, stream.times[1:], strict=False)
        if after >= began and before <= ended
    ]


def _read(package: Path) -> float:
    began = time.perf_counter()
    for path in package.iterdir():
        path.read_bytes()
    return time.perf_counter() - began


def _bytes(package: Path) -> int:
    return sum(path.stat().st_size for path in package.iterdir())


def _described(values: Sequence[float]) -> dict[str, Any]:
    quantiles = {f"p{round(100 * q)}": _quantile(values, q) for q in (0.5, 0.9, 0.99)}
    return {"count": len(values), **quantiles, "worst": max(values, default=0.0)}


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def _histogram(values: Sequence[float], bins: int = 60) -> list[int]:
    """Counts by ``BIN_SECONDS``; the last bin holds all that is longer."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(value / BIN_SECONDS))] += 1
    return counts


@contextmanager
def _server(shape: Shape) -> Iterator[tuple[Server, Path]]:
    """A server whose --experts-dir holds one package, `extra`."""
    with checkpoint(shape) as model, tempfile.TemporaryDirectory(prefix="flexgate-bench-") as name:
        package = Path(name) / "packages" / "extra"
        package.parent.mkdir()
        extract_expert(model, "1", package, statement=statement("extra", "unknown"))
        options = (f"--experts-dir={package.parent}", "--allow-unsigned-experts", f"--state-dir={name}")
        with flexgate(model, Path(name), *options, expected=("extra",)) as server:
            yield server, package
