"""What a counterfactual costs, against as many scoring passes: `"explain": "counterfactual"` on a running server."""

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from speed.checkpoint import MIDDLE, TINY, checkpoint, described
from speed.compare import take_turns
from speed.record import Run
from speed.servers import KEY, MODEL, flexgate
from speed.statistics import paired

BOUND = 1.3
PROMPT, RESPONSE = 192, 64
REQUESTS = 2  # of each block
PASSES = 8  # of a request, one for each expert of the model: a block of scoring has as many
ALLOWED = 0.1  # BOUND is that far from 1
LEAST = 1e-6  # seconds that are added, where a round of small blocks measured less than none
WHAT = (
    f"seconds of blocks of {REQUESTS} requests, one after another, each of {PROMPT} new tokens answered by {RESPONSE}: "
    f"without and with a counterfactual, and {PASSES} times as many prompts as long as both scored in an echoed "
    "prompt, twice; `ratio` is what a counterfactual adds to a request against as many scoring passes as it makes"
)


def run(asked: Run) -> bool:
    """Measure on fresh servers; whether the whole interval keeps the bound."""
    starts, rounds = asked.starts or (1 if asked.quick else 5), asked.rounds or (1 if asked.quick else 12)
    shape = TINY if asked.quick else MIDDLE
    journal = asked.journal("counterfactual")
    with checkpoint(shape) as model:
        for start in tqdm(range(starts), desc="starts"):
            if f"start {start}" not in journal:
                with tempfile.TemporaryDirectory() as directory, flexgate(model, Path(directory)) as server:
                    journal.add(f"start {start}", _start(server.url, rounds, shape.vocab))
    found = [journal[f"start {start}"] for start in range(starts)]
    added = [
        [
            max(LEAST, with_ - without) * PASSES / passes
            for without, with_, passes in zip(*(one[kind] for kind in KINDS), strict=True)
        ]
        for one in found
    ]
    ratio = paired(added, [one["scored"] for one in found])
    itself = paired([one["scored again"] for one in found], [one["scored"] for one in found])
    results = {
        "what": WHAT,
        "starts": starts,
        "rounds": rounds,
        "passes": sum(sum(one["passes"]) for one in found) / (starts * rounds),
        "bound": BOUND,
        "ratio": ratio.report(),
        "pass_against_itself": itself.report(),
    }
    shown = described(shape)
    asked.write("counterfactual", results, shape=shown, itself=[("a scoring pass", itself)], allowed=ALLOWED)
    journal.close()
    low, high = results["ratio"]["ci95"]
    sys.stdout.write(f"a counterfactual: {ratio.value:.2f} [{low}, {high}] × its scoring passes, at most {BOUND}\n")
    return ratio.high <= BOUND


KINDS = ("without", "with", "passes")


def _start(url: str, rounds: int, vocabulary: int) -> dict[str, list[float]]:
    """Seconds of each block, and the passes of a request, of one start."""
    drawn = random.Random(0)
    passes: list[float] = []
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=300) as client:

        def prompts(tokens: int, count: int) -> Sequence[list[int]]:
            return [[drawn.randrange(10, vocabulary) for _ in range(tokens)] for _ in range(count)]

        def ask(prompt: list[int], **more: Any) -> dict[str, Any]:
            fields = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": RESPONSE, "ignore_eos": True}
            response = client.post("/v1/completions", json=fields | more)
            response.raise_for_status()
            answer: dict[str, Any] = response.json()
            return answer

        def block(tokens: int, count: int = REQUESTS, **more: Any) -> float:
            asked, began = prompts(tokens, count), time.perf_counter()
            answers = [ask(prompt, **more) for prompt in asked]
            seconds = time.perf_counter() - began
            if "flexgate" in more:
                made = [answer["flexgate"]["attribution"]["counterfactual"]["passes"] for answer in answers]
                passes.append(sum(made) / REQUESTS)
            return seconds

        scoring = {"max_tokens": 0, "echo": True, "logprobs": 0, "ignore_eos": False}
        contenders = {
            "without": lambda: block(PROMPT),
            "with": lambda: block(PROMPT, flexgate={"explain": "counterfactual"}),
            "scored": lambda: block(PROMPT + RESPONSE, REQUESTS * PASSES, **scoring),
            "scored again": lambda: block(PROMPT + RESPONSE, REQUESTS * PASSES, **scoring),
        }
        take_turns(contenders, 1)
        passes.clear()
        return take_turns(contenders, rounds) | {"passes": passes}
