"""What a change of the policy waits for while 200 streams run, and how much of that is the shared event loop."""

import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from streams import MOST, Streams
from tqdm import tqdm

from speed.checkpoint import DEMO
from speed.loop.target import TRACING
from speed.record import Run
from speed.servers import ADMIN_KEY, KEY, MODEL, Server, flexgate

BOUND_SECONDS = 2.0
EXPERTS = ("math", "news", "code", "legal")
STREAM = {"model": MODEL, "prompt": "The river rose over", "max_tokens": 24, "ignore_eos": True}
WHAT = (
    f"changes one after the other while {MOST} streams of another project run, each of 24 tokens and begun anew when "
    "it ends: seconds at the client; and in the HTTP process, from the call of the operation to its answer, how many "
    "passes of the event loop it saw, the thread time of the loop meanwhile, whatever it was for, and that of its "
    "longest pass (asyncio's loop stands in for uvloop)"
)
Seen = dict[str, list[dict[str, float]]]


def run(asked: Run) -> bool:
    """Change and revoke under load; whether no change took longer than BOUND_SECONDS."""
    rounds = asked.rounds or (2 if asked.quick else 40)
    with tempfile.TemporaryDirectory(prefix="flexgate-emergency-") as directory:
        folder = Path(directory)
        trace = folder / "trace"
        trace.mkdir()
        path = os.pathsep.join(filter(None, (str(TRACING), os.environ.get("PYTHONPATH"))))
        environment = {"PYTHONPATH": path, "FLEXGATE_TRACE": str(trace), "FLEXGATE_TRACE_CHANGES": "1"}
        with flexgate(DEMO, folder, f"--state-dir={folder / 'state'}", environment=environment) as server:
            with Streams(server.url, KEY, "/v1/completions", STREAM) as streams:
                _await_load(streams)
                operator = _Operator(server)
                operator.change(rounds)
                statuses = dict(streams.statuses)
            seen = _seen(trace)
    found = report(operator.took, seen)
    results = {"what": WHAT, "rounds": rounds, "streams": MOST, **found, "statuses_of_streams": statuses}
    asked.write("emergency", results, shape={"model": "the demo's"})
    worst = max(one["seconds"]["worst"] for one in found["changes"].values())
    sys.stdout.write(f"slowest change beside {MOST} streams: {worst:.2f} s, at most {BOUND_SECONDS}\n")
    return worst <= BOUND_SECONDS


def report(took: dict[str, list[float]], seen: Seen) -> dict[str, Any]:
    """Of each kind of change, what the client and the loop saw."""
    changes = {
        kind: {
            "count": len(seconds),
            "seconds": _spread(seconds),
            "passes": _spread([one["passes"] for one in seen[kind]]),
            "loop_thread_ms": _spread([1000 * one["busy"] for one in seen[kind]]),
        }
        for kind, seconds in took.items()
    }
    longest = [1000 * one["longest"] for kind in took for one in seen[kind]]
    return {"bound_seconds": BOUND_SECONDS, "changes": changes, "longest_pass_thread_ms": _spread(longest)}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(float(np.median(values)), 4), "worst": round(max(values), 4)}


def _await_load(streams: Streams) -> None:
    deadline = time.monotonic() + 60
    while streams.statuses["200"] < MOST:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the streams did not begin: {dict(streams.statuses)}")
        time.sleep(0.05)


class _Operator:
    """Makes changes, and notes the seconds that each took by its kind."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.took: dict[str, list[float]] = defaultdict(list)

    def change(self, rounds: int) -> None:
        """Everything that can be taken away: permissions, keys and projects many times, then each expert."""
        one = "/v1/organization/projects/{project_id}"
        for number in tqdm(range(rounds), desc="rounds of changes"):
            project = self._ask("POST", "/v1/organization/projects", {"name": f"p{number}"})["id"]
            none = {"mode": "allow_list", "expert_ids": []}
            self._ask("POST", f"{one}/expert_permissions", none, project, wait=True)
            key = self._ask("POST", f"{one}/service_accounts", {"name": "robot"}, project)["api_key"]["id"]
            self._ask("DELETE", f"{one}/api_keys/{{key_id}}", None, project, key, wait=True)
            self._ask("POST", f"{one}/archive", None, project, wait=True)
        for expert in EXPERTS:
            self._ask("DELETE", "/v1/experts/{expert}", None, expert)

    def _ask(self, method: str, path: str, body: Any, *ids: str, wait: bool = False) -> dict[str, Any]:
        here = path
        for name, value in zip(re.findall(r"{\w+}", path), ids, strict=True):
            here = here.replace(name, value)
        url = f"{self._server.url}{here}{'?wait=all' * wait}"
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, content, headers, method=method)
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as answer:
            said: dict[str, Any] = json.loads(answer.read())
        self.took[f"{method} {path}"].append(time.monotonic() - began)
        return said


def _seen(trace: Path) -> Seen:
    seen: Seen = defaultdict(list)
    for file in trace.glob("*.changes.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            seen[line["what"]].append(line)
    return seen
