"""Write `docs/clients.md` from what `--record` wrote: ``python tests/clients/table.py RESULTS``."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/clients.json"
PAGE = ROOT / "docs/clients.md"
PATHS = {
    "conversation": "several turns",
    "tools": "tools",
    "stream": "streams",
    "structured": "structured output",
    "scores": "log-probabilities",
    "load": "load",
    "refusal": "errors",
}
MARKS = {"passed": "✓", "failed": "✗", None: "–"}
HEAD = """# Works with

Real clients run their own paths against the running demo (`make test-clients`); this page is made from what came of it
(`docs/results/clients.json`). ✓ passed, ✗ failed, – the client has no such path. Several turns put answers back as the
client does it, tools are called and answered, and an error is a prompt that is too long, which the client has to know.

"""


def page(results: dict[str, dict[str, object]]) -> str:
    """The page."""
    rows = [["client", "version", *PATHS.values()], ["---"] * (2 + len(PATHS))]
    for name, row in results.items():
        paths = row["paths"]
        assert isinstance(paths, dict)
        rows.append([name, str(row["version"]), *(MARKS[paths.get(path)] for path in PATHS)])
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text())))
