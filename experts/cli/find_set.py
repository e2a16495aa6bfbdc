"""``flexgate experts find-set``: propose the units that a task needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from flexgate.experts.cli.support import Json, print_table, reported
from flexgate.policies.ids import PUBLIC

NOTHING_TO_CREATE = "No set is needed: 'public' alone is best, and always used."


def find_set(
    model: Annotated[Path, typer.Argument(help="FlexOlmo checkpoint.")],
    examples: Annotated[
        Path, typer.Argument(help="Examples of the task: a .jsonl file of texts, or of prompts and answers.")
    ],
    most: Annotated[int, typer.Option(min=1, max=63, help="Units to add to what every request uses, at most.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Longest piece of an example, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the split of the examples into two halves.")] = 0,
    as_json: Json = False,
) -> None:
    """Propose a set of units for a task, by the loss on examples of it.

    Units are chosen one by one on one half of the examples, each time the one
    that lowers the loss most. The set that is proposed has the least loss on
    the other half. The public unit and required ones are always in it.

    Prints every set that was best of its size, and the command that creates
    the proposed one: 'public' is in none, because it is always used. Name the
    set in 'flexgate.experts.only' or in a tenant's default experts. What a set
    permits is still up to agreements.
    """
    with reported(as_json) as show:
        from flexgate.experts.evaluation import find_set as finding

        with tqdm(desc="sets", disable=None) as bar:
            steps = finding.find_set(
                model, examples, most=most, length=length, seed=seed, progress=lambda count: bar.update(count) and None
            )
        proposed = finding.best(steps)
        if as_json:
            show({"proposed": list(proposed.units), "sets": [asdict(step) for step in steps]})
            return
        rows = [
            (
                ", ".join(step.units),
                f"{step.nats:.4f}",
                f"{step.held_out_nats:.4f}",
                "proposed" if step is proposed else "",
            )
            for step in steps
        ]
        print_table(("units", "loss", "held-out loss", ""), rows, empty="")
        members = [unit for unit in proposed.units if unit != PUBLIC]
        command = f"flexgate sets create set:NAME {' '.join(members)}"
        typer.echo(f"\n{command if members else NOTHING_TO_CREATE}")
