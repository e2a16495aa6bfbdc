"""`flexgate serve`: options, progress, the start-up summary, and one sentence when it fails."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console

from flexgate.server.cli.options import given, parameters
from flexgate.server.http import logs
from flexgate.server.lifecycle.console import Progress
from flexgate.server.lifecycle.settings import Settings, load_settings
from flexgate.server.lifecycle.store_settings import SettingsError

app = typer.Typer(add_completion=False, rich_markup_mode=None)  # plain help shortens no name
logger = logging.getLogger(__name__)

FAILED: Final = 1
BAD_USAGE: Final = 2
INTERRUPTED: Final = 130


def serve(**values: Any) -> None:
    """Serve the FlexOlmo checkpoint in a folder, or the demo with --demo.

    Every option can also be set by the environment variable that is named with it. The option has precedence.
    """
    try:
        settings = load_settings(**given(values))
    except SettingsError as error:
        raise _failed(error, BAD_USAGE) from None
    run(settings)


serve.__signature__ = inspect.Signature(parameters(Settings, argument="model"))  # type: ignore[attr-defined]
app.command()(serve)


def run(settings: Settings) -> None:
    """Serve until a signal arrives; a failing start exits with one sentence."""
    from flexgate.server.lifecycle.console import expected_failures

    os.environ["PYTHONSAFEPATH"] = "1"
    logs.configure(settings.log_level, settings.log_format)
    try:
        refuse_shadowed_kernels()
        with Progress(Console(soft_wrap=True)) as progress:
            _serve(settings, progress)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if not isinstance(error, expected_failures()):
            logger.error("the server failed", exc_info=error)
        raise _failed(error, FAILED) from None


def _serve(settings: Settings, progress: Progress) -> None:
    model = settings.model or demo_model()
    progress.stage("reading the checkpoint", 0, 0)
    import uvloop

    from flexgate.server.lifecycle.bootstrap import serve as serve_process

    uvloop.run(serve_process(settings, model, stage=progress.stage, ready=progress.ready))


def demo_model() -> Path:
    """The shipped demo checkpoint."""
    import flexgate.experts.demo

    path = Path(flexgate.experts.demo.__file__).with_name("checkpoint")
    if not path.is_dir():
        raise SettingsError(
            f"the demo model is not installed: {path} is missing. Name a model's folder instead of --demo"
        )
    return path


def refuse_shadowed_kernels() -> None:
    """Refuse to start if flexgate's folder `kernels` shadows the Python package of that name."""
    ours = Path(__file__).resolve().parents[2]
    for entry in sys.path:
        if Path(entry or ".").resolve() == ours:
            raise SettingsError(
                f"the folder {ours / 'kernels'} shadows the Python package 'kernels': start from another folder, "
                "or set PYTHONSAFEPATH=1"
            )


def _failed(error: BaseException, status: int) -> typer.Exit:
    sentence = " ".join(str(error).split()) or type(error).__name__
    typer.secho(f"flexgate: {sentence}", err=True, fg=typer.colors.RED)
    return typer.Exit(status)
