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
    *,
    resume: Callable[[int, int, Path, float], list[Verdict]] | None = None,
) -> None:
    """Run ``python -m kills.NAME``; exit status 1 when a verdict is bad.

    Args:
        resume: goes on in a folder with what an earlier run has left there, for some seconds; it may kill less often.
    """
    parser = argparse.ArgumentParser(prog=f"python -m kills.{name}", description=description)
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    if resume is not None:
        parser.add_argument("--kept", type=Path, help="a folder to go on in with what an earlier run has left there")
        parser.add_argument("--minutes", type=float, default=1e6, help="begin no kill later; with --kept, run again")
    arguments = parser.parse_args()
    began = time.monotonic()
    if resume is not None and arguments.kept is not None:
        verdicts = resume(arguments.kills, arguments.seed, arguments.kept, 60 * arguments.minutes)
    else:
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
