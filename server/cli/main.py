"""The `flexgate` command. Sub-commands are imported when they are used, and vLLM only to serve."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from flexgate.server.engine.frontend.leaving import leaving

SUBCOMMANDS: Final = {
    "serve": ("flexgate.server.cli.serve", "Serve the FlexOlmo checkpoint in a folder, or the demo with --demo."),
    "experts": (
        "flexgate.experts.cli.main",
        "Make, check and merge expert packages; add and revoke experts of a running server.",
    ),
    "tenants": (
        "flexgate.server.cli.tenants",
        "Create tenants, set which experts each may use, create and revoke keys.",
    ),
    "admin-keys": (
        "flexgate.server.cli.admin_keys",
        "Create and revoke keys of admins, auditors and owners.",
    ),
    "agreements": ("flexgate.server.cli.agreements", "Create, show, revise and terminate agreements."),
    "sets": ("flexgate.server.cli.sets", "Create, change and delete named sets of experts."),
    "corrections": ("flexgate.server.cli.corrections", "Correct what is owed; open, decide and list disputes."),
    "statements": (
        "flexgate.server.cli.statements",
        "Show how an owner's experts were used in a period, and what is owed.",
    ),
    "policy": ("flexgate.server.cli.policy", "Manage the policy as a file, explain it, and simulate changes."),
    "receipts": ("flexgate.server.cli.receipts", "Show and verify receipts; rotate the key that signs them."),
    "audit": ("flexgate.server.cli.audit", "Verify, export and trim the audit log."),
}


class LazyCommand(TyperCommand):
    """A name and one line of help; the module with the command's `app` is imported to run it."""

    def __init__(self, name: str, module: str, help_: str) -> None:
        super().__init__(name, help=help_)
        self._module = module

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """The real command's context, which knows the real command."""
        app = importlib.import_module(self._module).app
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


class LazyGroup(TyperGroup):
    """A group whose sub-commands live in modules that have an `app`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - Typer's signature
        """The sub-commands that are installed."""
        return [name for name, (module, _) in SUBCOMMANDS.items() if _installed(module)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One sub-command, not imported yet."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return LazyCommand(cmd_name, *SUBCOMMANDS[cmd_name])


app = typer.Typer(
    cls=LazyGroup,
    name="flexgate",
    no_args_is_help=True,
    add_completion=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"flexgate {importlib.metadata.version('flexgate')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve merged mixture-of-experts models, and decide for each request which experts it may use."""


def main() -> None:
    """Run the command, as a process of its own."""
    with leaving():
        app()


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
