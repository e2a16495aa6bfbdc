"""The table "works with" of `docs/support.md`, made of what `make test-clients ARGS=--record=FILE` wrote."""

import json
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parents[2] / "docs/results/clients.json"
PATHS: Final = {
    "conversation": "several turns",
    "tools": "tools",
    "stream": "streams",
    "structured": "structured output",
    "refusal": "errors",
}
BESIDES: Final = {"scores": "log-probabilities of prompts", "load": "load"}
LACKING: Final = {
    "guidellm": {"structured": "sends no schema"},
    "lm-eval": {"tools": "sends none", "stream": "reads whole answers", "structured": "sends no schema"},
    "vllm bench serve": {
        "conversation": "single requests",
        "tools": "sends none",
        "structured": "sends no schema",
    },
}
"""Paths that were not run, and why; a path that is neither here nor in the results is an error."""


def recorded() -> dict[str, Any]:
    """What the last recorded run found: `tests` counts outcomes, `clients` has a version and paths of each."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def table(clients: dict[str, dict[str, Any]]) -> str:
    """A row a client: passed, failed, or why there is nothing to run."""
    rows = [["Client", "Version", *(name.capitalize() for name in PATHS.values()), "Besides"], ["---"] * 8]
    for name, row in clients.items():
        outcomes, lacking = row["paths"], LACKING.get(name, {})
        cells = [outcomes[path] if path in outcomes else lacking[path] for path in PATHS]
        besides = [f"{what}: {outcomes[path]}" for path, what in BESIDES.items() if path in outcomes]
        rows.append([name, row["version"], *cells, ", ".join(besides)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
