"""Start-up and memory: seconds to ready, to the first token of the first request, and bytes of a slot."""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from tqdm import tqdm

from flexgate.server.engine.frontend.launch import EngineSettings, plan
from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import spread
from speed.record import Run
from speed.servers import KEY, Server, demo, flexgate

DEMO_KEY = "sk-demo-all"
EXTRA_SLOTS = 24


def run(asked: Run) -> None:
    """Start the demo afresh for every first request, and the larger checkpoint with few and with many slots."""
    shape = TINY if asked.quick else MIDDLE
    starts = asked.starts or asked.rounds or (1 if asked.quick else 5)
    with tqdm(total=2 * starts + 2, desc="starts") as bar, checkpoint(shape) as model:
        measured = {
            "what": "flexgate serve --demo, as `make serve` starts it; then slots of the checkpoint below",
            "starts": starts,
            "demo": {
                name: _first_requests(logprobs, starts, bar)
                for name, logprobs in (("first_request", None), ("first_request_with_logprobs", 5))
            },
            "slots": _slots(model, shape.experts, bar),
        }
    asked.write("startup", measured, shape=described(shape))


def _first_requests(logprobs: int | None, starts: int, bar: Any) -> dict[str, Any]:
    ready, first, memory = [], [], []
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as directory, demo(Path(directory)) as server:
            ready.append(server.ready_seconds)
            first.append(_first_token(server, logprobs))
            memory.append(resident_bytes(server))
        bar.update()
    return {
        "ready_seconds": spread(ready) | {"worst": max(ready)},
        "first_token_seconds": spread(first) | {"worst": max(first)},
        "resident_bytes": _median(memory),
    }


def _first_token(server: Server, logprobs: int | None) -> float:
    """From sending the first request that the server ever gets to the first event with a token."""
    body: dict[str, Any] = {"model": "flexgate-demo", "prompt": "The", "max_tokens": 4, "stream": True}
    if logprobs is not None:
        body["logprobs"] = logprobs
    began = time.perf_counter()
    headers = {"Authorization": f"Bearer {DEMO_KEY}"}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=120) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line.removeprefix("data: "))["choices"]:
                return time.perf_counter() - began
    raise RuntimeError("the first answer had no token")


def _slots(model: Path, experts: int, bar: Any) -> dict[str, Any]:
    """What a free slot really takes, next to what the start-up summary says."""
    counts = (experts, experts + EXTRA_SLOTS)
    resident = []
    for count in counts:
        options = f"--max-experts={count}"
        with tempfile.TemporaryDirectory() as directory, flexgate(model, Path(directory), options) as server:
            resident.append(_after_a_request(server))
        bar.update()
    return {
        "slots": list(counts),
        "resident_bytes": resident,
        "resident_bytes_per_slot": (resident[1] - resident[0]) // EXTRA_SLOTS,
        "planned_bytes_per_slot": plan(EngineSettings(model=model)).slots.expert_bytes,
    }


def _after_a_request(server: Server) -> int:
    body = {"model": "bench", "prompt": "The", "max_tokens": 4}
    headers = {"Authorization": f"Bearer {KEY}"}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=120).raise_for_status()
    return resident_bytes(server)


def resident_bytes(server: Server) -> int:
    """Memory of the server's processes; a page that several share counts once."""
    parent = psutil.Process(server.pid)
    return sum(int(process.memory_full_info().pss) for process in (parent, *parent.children(recursive=True)))


def _median(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]
