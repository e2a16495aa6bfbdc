"""The `flexgate` command. Sub-commands are imported when they are used, and vLLM only to serve."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Final

import typer
from typer.core import TyperGroup

SUBCOMMANDS: Final = {"serve": "flexgate.server.cli_serve", "experts": "flexgate.experts.cli"}


class LazyGroup(TyperGroup):
    """A group whose sub-commands live in modules that have an `app`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - Typer's signature
        """The sub-commands that are installed."""
        return [name for name, module in SUBCOMMANDS.items() if _installed(module)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import one sub-command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(SUBCOMMANDS[cmd_name])
        return typer.main.get_command(module.app)


app = typer.Typer(
    cls=LazyGroup,
    name="flexgate",
    no_args_is_help=True,
    add_completion=False,
    help="Serve merged mixture-of-experts models with a gate per request.",
)


@app.callback()
def _root() -> None:
    """Serve merged mixture-of-experts models with a gate per request."""


def main() -> None:
    """Run the command."""
    app()


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
