"""The command line that every kill harness has: how many kills, which seed, and a report that fails the run."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Verdict = dict[str, Any]  # ``wrong`` is empty where all is well


def command(
    name: str,
    description: str | None,
    kills: int,
    run: Callable[[int, int], list[Verdict]],
    figures: Callable[[list[Verdict]], dict[str, Any]],
) -> None:
    """Run ``python -m kills.NAME``; exit status 1 when a verdict is bad."""
    parser = argparse.ArgumentParser(prog=f"python -m kills.{name}", description=description)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    verdicts = run(arguments.kills, arguments.seed)
    report = {
        "command": f"python -m kills.{name} --kills {arguments.kills} --seed {arguments.seed}",
        "device": platform.machine(),
        "seconds": round(time.monotonic() - began),
        **figures(verdicts),
        "neither_old_nor_new": [verdict for verdict in verdicts if verdict["wrong"]],
    }
    text = json.dumps(report, indent=1) + "\n"
    if arguments.report:
        arguments.report.write_text(text)
    sys.stdout.write(text)
    sys.exit(bool(report["neither_old_nor_new"]))
