"""``make bench``, or ``python -m speed NAME…``: run benchmarks and write their result files."""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console

from speed import (
    admission,
    changes,
    constraints,
    counterfactual,
    decisions,
    emergency,
    enforcement,
    engine_speed,
    fairness,
    ledger,
    loop,
    low_rank,
    mixture,
    packages,
    serving,
    startup,
    statement,
    tracing,
    versions,
)
from speed.plot import draw
from speed.record import RESULTS, Run, minutes

BENCHMARKS = {
    "engine-eager": partial(engine_speed.run, "eager"),
    "engine-compiled": partial(engine_speed.run, "compiled"),
    "mixture-eager": partial(mixture.run, "eager"),
    "mixture-compiled": partial(mixture.run, "compiled"),
    "serving": serving.run,
    "startup": startup.run,
    "admission": admission.run,
    "packages": packages.run,
    "low-rank": low_rank.run,
    "changes": changes.run,
    "decisions": decisions.run,
    "constraints": constraints.run,
    "counterfactual": counterfactual.run,
    "enforcement": enforcement.run,
    "emergency": emergency.run,
    "loop": loop.run,
    "fairness": fairness.run,
    "ledger": ledger.run,
    "statement": statement.run,
    "tracing": tracing.run,
    "versions": versions.run,
}


def main() -> None:
    """Run what was asked for, one after the other."""
    parser = argparse.ArgumentParser(prog="speed", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds, to see that it runs")
    parser.add_argument("--starts", type=int, help="how often every contender is started, where ratios are measured")
    parser.add_argument("--rounds", type=int, help="turns of every contender within a start")
    parser.add_argument("--before", type=Path, help="of 'versions': a checkout of the older commit with its own .venv")
    parser.add_argument("--results", type=Path, help="where files are written; with --quick a temporary directory")
    asked = parser.parse_args()
    if unknown := set(asked.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    results = asked.results or (Path(tempfile.mkdtemp(prefix="flexgate-bench-")) if asked.quick else RESULTS)
    names = asked.names or [name for name in BENCHMARKS if name != "versions" or asked.before]
    if (asked.before is not None) != ("versions" in names):
        parser.error("'versions' and --before FOLDER go together")
    options = {name: getattr(asked, name) for name in ("quick", "rounds", "starts", "before")} | {"results": results}
    console = Console(stderr=True)
    for name in names:
        console.print(minutes(name, Run(**options)))
    held = [BENCHMARKS[name](Run(**options)) for name in names]
    draw(results)
    sys.exit(False in held)


if __name__ == "__main__":
    main()
