"""Kill the process that writes a ledger at random times, and count again what its clients got.

``python -m kills.ledger --kills 1000 --report docs/results/ledger-kills.json``; with ``--kept FOLDER --minutes 4`` a
piece of it, which the next run goes on with.

The killed process runs the real journal under streams that generate, cover and deliver tokens; what it generates and
delivers goes into a file, line by line, which a kill does not take back. All processes write to one ledger, one after
the other. The judge shares no code with it: it reads the database with sqlite3 and the file, and for every request asks
that delivered ≤ recorded ≤ generated, that it is recorded once, and that its experts' parts fit its tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flexgate.server.ledger.entries import COMPLETED, RegisteredExpert, Registration, Used
from flexgate.server.ledger.journal import Journal
from kills.report import Verdict, command

STREAMS = 16
LONGEST = 40
SECONDS = 0.15
PROMPT = 7
PARTS = (
    "sequence, expert, owner, agreement, agreement_version, share_ppm, "
    "prompt_mass, prompt_positions, completion_mass, completion_positions"
)


def main_of_a_writer(path: Path, transcript: int, seed: int) -> None:
    """Serve streams for ever."""
    asyncio.run(_serve(path, transcript, seed))


async def _serve(path: Path, transcript: int, seed: int) -> None:
    journal = Journal(path, clock=time.time)
    rng = random.Random(seed)

    async def serve(stream: int) -> None:
        for number in range(1_000_000):
            await _stream(journal, transcript, f"{seed}-{stream}-{number}", rng.randint(1, LONGEST))

    await asyncio.gather(*(serve(stream) for stream in range(STREAMS)))


async def _stream(journal: Journal, transcript: int, name: str, length: int) -> None:
    """One request: every token is generated, covered, then delivered."""
    experts = (RegisteredExpert(0, "public", "commons"), RegisteredExpert(1, "news", "gazette", "a-news", 4))
    registration = Registration(name, 1, "proj", "key", "completions", "m", 1, 1, experts)
    entry = journal.register(registration)
    await entry.registered()
    for tokens in range(1, length + 1):
        os.write(transcript, f"generated {name} {tokens}\n".encode())
        await entry.cover(PROMPT + tokens, lambda tokens=tokens: _used(tokens))  # type: ignore[misc]
        os.write(transcript, f"delivered {name} {tokens}\n".encode())
    entry.end(COMPLETED, _used(length))


def _used(tokens: int) -> Used:
    return Used(PROMPT, 0, tokens, [PROMPT, 0, PROMPT, 0], [tokens, tokens, tokens, tokens])


def trial(path: Path, transcript: Path, seed: int) -> bool:
    """Run a writer and kill it at a random time; whether it was the kill that ended it."""
    descriptor = os.open(transcript, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    pid = os.fork()
    if not pid:
        try:
            main_of_a_writer(path, descriptor, seed)
        finally:
            os._exit(1)
    os.close(descriptor)
    time.sleep(random.Random(seed).random() * SECONDS)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def judge(path: Path, transcript: Path) -> Iterator[str]:
    """What is wrong, a sentence each; the ledger was opened since the last kill."""
    counts: dict[str, Counter[str]] = {"generated": Counter(), "delivered": Counter()}
    for line in transcript.read_text().splitlines():
        what, name, tokens = line.split()
        counts[what][name] = max(counts[what][name], int(tokens))
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT request, sequence, completion_tokens, outcome FROM usage").fetchall()
    parts: dict[int, list[tuple[Any, ...]]] = {}
    for sequence, *part in connection.execute(f"SELECT {PARTS} FROM parts ORDER BY sequence, expert"):
        parts.setdefault(sequence, []).append(tuple(part))
    (running,) = connection.execute("SELECT count(*) FROM running").fetchone()
    connection.close()
    if running:
        yield f"{running} requests still run"
    recorded = {name: tokens for name, _, tokens, _ in rows}
    if len(recorded) != len(rows):
        yield f"{len(rows) - len(recorded)} requests are recorded twice"
    for name, tokens in counts["delivered"].items():
        if name not in recorded:
            yield f"{name}: {tokens} tokens were delivered and nothing is recorded"
    for name, sequence, tokens, outcome in rows:
        if not counts["delivered"][name] <= tokens <= counts["generated"][name]:
            found = counts["delivered"][name], tokens, counts["generated"][name]
            yield f"{name} ({outcome}): delivered, recorded and generated are {found}"
        share = round(1_000_000 * tokens / (PROMPT + 2 * tokens))
        news = ("news", "gazette", "a-news", 4, share, 0, 0, tokens, tokens)
        public = ("public", "commons", None, None, 1_000_000 - share, PROMPT, PROMPT, tokens, tokens)
        wanted = [news, public] if tokens else []
        if parts.get(sequence, []) != wanted:
            yield f"{name}: its experts' parts are {parts.get(sequence)} for {tokens} tokens"


def run(kills: int, seed: int) -> list[Verdict]:
    """Kill ``kills`` writers of one ledger."""
    with tempfile.TemporaryDirectory() as directory:
        return resume(kills, seed, Path(directory), math.inf)


def resume(kills: int, seed: int, kept: Path, seconds: float) -> list[Verdict]:
    """So many kills in all, those of earlier runs in the folder among them; after some seconds, no other follows."""
    kept.mkdir(parents=True, exist_ok=True)
    path, transcript, count = kept / "ledger.db", kept / "transcript", kept / "kills.json"
    tried, killed = json.loads(count.read_text()) if count.exists() else (0, 0)
    until = time.monotonic() + seconds
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("kills", total=kills, completed=killed)
        while killed < kills and tried < 10 * kills and time.monotonic() < until:
            killed += trial(path, transcript, seed * 1_000_003 + tried)
            tried += 1
            count.write_text(json.dumps([tried, killed]))
            progress.update(task, completed=killed)
    asyncio.run(_recover(path))
    wrong = list(judge(path, transcript))
    if killed < kills and tried == 10 * kills:
        wrong.append(f"{killed} of {kills} writers could be killed; the others ended by themselves")
    with closing(sqlite3.connect(path)) as connection:
        outcomes = dict(connection.execute("SELECT outcome, count(*) FROM usage GROUP BY outcome"))
    return [{"kills": killed, "requests": outcomes, "wrong": wrong[:20]}]


async def _recover(path: Path) -> None:
    Journal(path, clock=time.time).close()


def figures(verdicts: list[Verdict]) -> dict[str, Any]:
    """What the report counts."""
    (verdict,) = verdicts
    return {"kills": verdict["kills"], "requests": verdict["requests"]}


if __name__ == "__main__":
    command("ledger", __doc__, 1000, run, figures, resume=resume)
