"""``python -m flexgate.experts.demo``: train the demo model from nothing, ship and measure it; write public texts."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from flexgate.experts.demo.measure import report_lines, write_report, write_training
from flexgate.experts.demo.recipe import train
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.ship import CHECKPOINT, read_digests
from flexgate.experts.demo.stages import seconds
from flexgate.experts.demo.texts import write_public_texts

PUBLIC_TEXTS = 4_000


def main() -> None:
    """Parse the command line and run the stages that have not run in the work directory."""
    parser = argparse.ArgumentParser(prog="python -m flexgate.experts.demo", description=__doc__)
    parser.add_argument(
        "--work", type=Path, help="keep the stages here and go on from them (default: a temporary directory)"
    )
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="checkpoint directory to write")
    parser.add_argument(
        "--report", type=Path, help="also measure every probe under every gate and write the figures here"
    )
    parser.add_argument("--measure-only", action="store_true", help="train nothing, measure the checkpoint at --output")
    parser.add_argument(
        "--public-texts", type=Path, help="train nothing, write public texts into this folder for an owner's training"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if arguments.public_texts:
        write_public_texts(Settings(), arguments.public_texts, PUBLIC_TEXTS)
        return
    console = Console()
    if not arguments.measure_only:
        with tempfile.TemporaryDirectory() as temporary:
            figures = _train(arguments.work or Path(temporary), arguments.output)
        console.print(figures)
        if arguments.report:
            write_training(arguments.report, figures)
    if arguments.report:
        for line in report_lines(write_report(arguments.output, arguments.report)):
            console.print(line)


def _train(work: Path, output: Path) -> dict[str, Any]:
    """Train, merge and ship; says what it took."""
    fresh, began = not work.is_dir() or not any(work.iterdir()), time.monotonic()
    train(Settings(), work, output)
    wall = round(time.monotonic() - began, 1)
    return {
        "command": "python -m flexgate.experts.demo",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "wall_seconds": wall if fresh else None,
        "processor_seconds": seconds(work),
        "weights_sha256": read_digests(output)["model.safetensors"],
    }


if __name__ == "__main__":
    main()
