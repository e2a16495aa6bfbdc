"""``flexgate experts``: make, check and merge expert packages, add them to a server. Runs without vLLM.

Every command prints what it did, or with ``--json`` one JSON object; an error is one sentence and exit status 1.
Modules that load PyTorch are imported when a command needs them, so that help is quick.
"""

from __future__ import annotations

import typer

from flexgate.experts.cli import assign, evaluate, find_set, grade, packages, remote, train

app = typer.Typer(
    name="experts",
    no_args_is_help=True,
    add_completion=False,
    help="Make, check and merge expert packages; add and revoke experts of a running server.",
)
app.command("train-anchor")(train.train_anchor)
app.command()(train.train)
app.command("tune-router")(train.tune_router)
app.command()(evaluate.evaluate)
for command in (
    packages.keygen,
    packages.sign,
    packages.inspect,
    packages.verify,
    packages.extract,
    packages.merge,
    assign.assign,
    grade.grade,
    find_set.find_set,
    remote.add,
    remote.revoke,
):
    app.command()(command)
app.command("list")(remote.list_experts)
