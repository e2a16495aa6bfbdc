"""``python -m flexgate.experts.demo``: train the demo model from nothing, ship it, measure it."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console

from flexgate.experts.demo.closed import closed_domains
from flexgate.experts.demo.measure import report_lines, write_report
from flexgate.experts.demo.public import public_domain
from flexgate.experts.demo.recipe import all_probes, build_anchor, build_pair, build_tokenizer, merge_pairs
from flexgate.experts.demo.settings import Settings
from flexgate.experts.demo.ship import CHECKPOINT, ship

WORKERS = 2


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
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    console = Console()
    if not arguments.measure_only:
        with tempfile.TemporaryDirectory() as temporary:
            train(arguments.work or Path(temporary), arguments.output, console)
    if arguments.report:
        for line in report_lines(write_report(arguments.output, arguments.report)):
            console.print(line)


def train(work: Path, output: Path, console: Console) -> None:
    """Tokenizer and anchor in this process, owners in parallel ones, then merge and ship."""
    began = time.monotonic()
    settings = Settings()
    torch.set_num_threads(WORKERS)
    tokenizer = build_tokenizer(settings, work)
    build_anchor(settings, work)
    with ProcessPoolExecutor(
        WORKERS, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = [pool.submit(build_pair, settings, work, owner, line) for line, owner in enumerate(closed_domains())]
        for job in jobs:
            job.result()
    architecture, tensors = merge_pairs(settings, work)
    ship(output, architecture, tensors, tokenizer, (public_domain(), *closed_domains()), all_probes())
    console.print(f"trained, merged and written to {output} in {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
