"""``make evaluation``, or ``python -m merging WORK``: train small models from nothing, and compare ways to merge them.

Every stage is kept in WORK, and a run that was stopped goes on from there.
"""

import argparse
import json
import sys
from pathlib import Path

from flexgate.experts.errors import ExpertsError
from flexgate.experts.evaluation.heatmap import draw
from flexgate.experts.evaluation.markdown import write_figures
from merging.protocol import run
from merging.report import heatmap_rows, report
from merging.settings import QUICK, Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def main() -> None:
    """Run the protocol; write its figures into docs, or into WORK with ``--quick``."""
    parser = argparse.ArgumentParser(prog="merging", description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", default=ROOT / "build/merging", help="folder of its stages")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    given = parser.parse_args()
    try:
        found = run(QUICK if given.quick else Settings(), given.work)
        docs = given.work if given.quick else DOCS
        results = docs / ("evaluation.json" if given.quick else "results/evaluation.json")
        results.write_text(json.dumps(found, indent=1) + "\n")
        write_figures(docs / "evaluation.md", report(found))
        draw(heatmap_rows(found), docs / "evaluation.svg", title="exact answers, %")
    except ExpertsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
