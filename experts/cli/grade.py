"""``flexgate experts grade``: find out how completely excluding each expert removes its influence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexgate.experts.cli.support import Json, print_table, progress_bar, reported
from flexgate.experts.errors import UsageInvalid


def grade(
    model: Annotated[Path, typer.Argument(help="FlexOlmo checkpoint whose experts are graded.")],
    siblings: Annotated[
        list[Path], typer.Argument(help="Checkpoints to compare it with: its anchor, and the owners' own ones.")
    ],
    as_json: Json = False,
) -> None:
    """Compare a model with its siblings, and print the grade of each expert.

    An expert is graded 'removed' if every other weight is bit-identical to one
    in a sibling without the expert: nothing else learnt from its data. It is
    graded 'shared' if none of these siblings has the model's shared weights,
    'router' if only router rows of other experts differ, and 'unknown' if a
    sibling that is needed for the comparison was not given.

    Reads every byte once and writes nothing. To use the grades, add them to the
    table that 'flexgate experts assign' takes.
    """
    with reported(as_json) as show:
        from flexgate.experts.checkpoint import grading
        from flexgate.experts.package.provenance import expert_entries

        names = {str(path): path for path in siblings}
        if len(names) != len(siblings):
            raise UsageInvalid("a checkpoint is given twice: name each sibling once")
        with progress_bar("read") as progress:
            of_model = grading.fingerprint(model, progress)
            of_siblings = {name: grading.fingerprint(path, progress) for name, path in names.items()}
        entries = expert_entries(model, len(of_model.experts))
        rows = []
        for expert in range(1, len(entries)):
            found = grading.grade(of_model, of_siblings, expert)
            rows.append((str(entries[expert]["id"]), found.grade, found.because))
        if as_json:
            show({"experts": [dict(zip(("id", "grade", "because"), row, strict=True)) for row in rows]})
        else:
            print_table(("id", "grade", "because"), rows, empty="the model has no expert but 'public'")
