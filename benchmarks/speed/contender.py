"""One version of flexgate in its own environment, driven by lines of JSON: what `speed.versions` starts.

``PYTHON benchmarks/speed/contender.py {engine|server} MODEL FOLDER`` with the version's own `benchmarks` and
`tests/support` on PYTHONPATH, so that the version is driven by its own benchmarks. An engine takes batches and answers
with times; a server says where it listens. Either ends with its standard input.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

Say = Callable[[Any], None]


def serve(model: Path, folder: Path, say: Say) -> None:
    """Start the version's server, and end it once the input ends."""
    from speed.servers import flexgate

    with flexgate(model, folder) as server:
        say({"url": server.url, "ready_seconds": server.ready_seconds})
        sys.stdin.read()


def step(model: Path, folder: Path, say: Say) -> None:
    """Start the version's gated engine, eager, and run each batch that the input names."""
    from speed.engines import Batch, engine

    os.chdir(folder)
    with engine("gated", model, eager=True) as running:
        running.wait_until_started()
        say("started")
        for line in sys.stdin:
            say(astuple(running.run(Batch(**json.loads(line)))))


@contextmanager
def answers() -> Iterator[Say]:
    """Standard output for answers alone: whatever else is printed goes to standard error."""
    with os.fdopen(os.dup(1), "w", buffering=1) as file:
        os.dup2(2, 1)
        yield lambda answer: print(json.dumps(answer), file=file)


if __name__ == "__main__":
    kind, model, folder = sys.argv[1:]
    with answers() as say:
        {"engine": step, "server": serve}[kind](Path(model), Path(folder), say)
