"""``flexgate experts``: make, check and combine expert packages, put them into a server. Runs without vLLM.

Every command prints what it did, or with ``--json`` one JSON object; an error is one sentence and exit status 1.
Modules that load PyTorch are imported when a command needs them, so that help is quick.
"""

from __future__ import annotations

import typer

from flexgate.experts import cli_evaluate, cli_packages, cli_remote, cli_train

app = typer.Typer(
    name="experts", no_args_is_help=True, add_completion=False, help="Make, check and combine expert packages."
)
app.command("train-anchor")(cli_train.train_anchor)
app.command()(cli_train.train)
app.command("tune-router")(cli_train.tune_router)
app.command()(cli_evaluate.evaluate)
for command in (
    cli_packages.keygen,
    cli_packages.sign,
    cli_packages.inspect,
    cli_packages.verify,
    cli_packages.extract,
    cli_packages.merge,
    cli_remote.add,
    cli_remote.revoke,
):
    app.command()(command)
app.command("list")(cli_remote.list_experts)
