"""`flexgate serve`: options, progress, the start-up summary, and one sentence when it fails."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from flexgate.server import logs
from flexgate.server.settings import Settings, SettingsError, load_settings
from flexgate.server.startup import Progress

app = typer.Typer(add_completion=False)
logger = logging.getLogger(__name__)

FAILED: Final = 1
BAD_USAGE: Final = 2
INTERRUPTED: Final = 130


def _option(name: str) -> Any:
    """An option as its setting describes it; None stands for not given."""
    description = Settings.model_fields[name].description
    return typer.Option(help=description, show_default=False)


@app.command()
def serve(
    model: Annotated[Path | None, typer.Argument(help=Settings.model_fields["model"].description)] = None,
    demo: Annotated[bool | None, _option("demo")] = None,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    admin_port: Annotated[int | None, _option("admin_port")] = None,
    allow_remote: Annotated[bool | None, _option("allow_remote")] = None,
    state_dir: Annotated[Path | None, _option("state_dir")] = None,
    database_url: Annotated[str | None, _option("database_url")] = None,
    served_model_name: Annotated[list[str] | None, _option("served_model_name")] = None,
    chat_template: Annotated[Path | None, _option("chat_template")] = None,
    tool_call_parser: Annotated[str | None, _option("tool_call_parser")] = None,
    max_experts: Annotated[int | None, _option("max_experts")] = None,
    experts_dir: Annotated[Path | None, _option("experts_dir")] = None,
    trusted_keys: Annotated[Path | None, _option("trusted_keys")] = None,
    allow_unsigned_experts: Annotated[bool | None, _option("allow_unsigned_experts")] = None,
    max_package_bytes: Annotated[int | None, _option("max_package_bytes")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    max_model_len: Annotated[int | None, _option("max_model_len")] = None,
    max_num_seqs: Annotated[int | None, _option("max_num_seqs")] = None,
    kv_cache_memory_bytes: Annotated[int | None, _option("kv_cache_memory_bytes")] = None,
    tensor_parallel_size: Annotated[int | None, _option("tensor_parallel_size")] = None,
    enable_expert_parallel: Annotated[bool | None, _option("enable_expert_parallel")] = None,
    moe_kernels: Annotated[str | None, _option("moe_kernels")] = None,
    enforce_eager: Annotated[bool | None, _option("enforce_eager")] = None,
    max_body_bytes: Annotated[int | None, _option("max_body_bytes")] = None,
    max_n: Annotated[int | None, _option("max_n")] = None,
    max_prompts: Annotated[int | None, _option("max_prompts")] = None,
    max_logprobs: Annotated[int | None, _option("max_logprobs")] = None,
    max_grammar_bytes: Annotated[int | None, _option("max_grammar_bytes")] = None,
    body_seconds: Annotated[float | None, _option("body_seconds")] = None,
    revoked_keys: Annotated[str | None, _option("revoked_keys")] = None,
    drain_seconds: Annotated[int | None, _option("drain_seconds")] = None,
    policy_poll_seconds: Annotated[float | None, _option("policy_poll_seconds")] = None,
    policy_lease_seconds: Annotated[float | None, _option("policy_lease_seconds")] = None,
    log_level: Annotated[str | None, _option("log_level")] = None,
) -> None:
    """Serve a FlexOlmo checkpoint directory, or the demo with --demo."""
    given = dict(locals())
    given["served_model_name"] = given["served_model_name"] or None
    try:
        settings = load_settings(**given)
    except SettingsError as error:
        raise _failed(error, BAD_USAGE) from None
    run(settings)


def run(settings: Settings) -> None:
    """Serve until a signal comes; a start that fails exits with one sentence."""
    from flexgate.server.startup import expected_failures

    os.environ["PYTHONSAFEPATH"] = "1"
    logs.configure(settings.log_level)
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

    from flexgate.server.process import serve as serve_process

    uvloop.run(serve_process(settings, model, stage=progress.stage, ready=progress.ready))


def demo_model() -> Path:
    """The shipped demo checkpoint."""
    import flexgate.experts.demo

    path = Path(flexgate.experts.demo.__file__).with_name("checkpoint")
    if not path.is_dir():
        raise SettingsError("this installation has no demo model")
    return path


def refuse_shadowed_kernels() -> None:
    """Refuse to start where our folder `kernels` hides the library of that name."""
    ours = Path(__file__).resolve().parent.parent
    for entry in sys.path:
        if Path(entry or ".").resolve() == ours:
            raise SettingsError(
                f"{ours} is on Python's path, where its folder 'kernels' hides a library of "
                "that name; start from another directory or set PYTHONSAFEPATH=1"
            )


def _failed(error: BaseException, status: int) -> typer.Exit:
    sentence = " ".join(str(error).split()) or type(error).__name__
    typer.secho(f"flexgate: {sentence}", err=True, fg=typer.colors.RED)
    return typer.Exit(status)
