"""What ``flexgate experts`` commands share: options, output, errors, progress, opening packages."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from flexgate.experts.errors import ExpertsError, ProcessLost, UsageInvalid

if TYPE_CHECKING:
    from flexgate.experts.checkpoint.base import BaseIdentity
    from flexgate.experts.package.manifest import Statement
    from flexgate.experts.package.verify import VerifiedPackage

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
TrustedKeysOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the public keys (OWNER.pem) of the owners whose signatures are accepted.", show_default=False
    ),
]
UnsignedOption = Annotated[bool, typer.Option(help="Do not check signatures. Only for your own packages.")]
KeyOption = Annotated[Path | None, typer.Option(help="The owner's private key; signs the package.", show_default=False)]


Show = Callable[[Mapping[str, Any]], None]


@contextmanager
def reported(as_json: bool, *, quiet: bool = False) -> Iterator[Show]:
    """Print the command's result; an error of this package becomes a message and exit status 1, or 2 for wrong usage.

    ``quiet`` leaves the printing to another process with the same result, except if that process is lost.
    """
    if quiet:
        logging.getLogger("flexgate.experts").setLevel(logging.ERROR)
    try:
        yield _shower(as_json, quiet)
    except ExpertsError as error:
        if not quiet or isinstance(error, ProcessLost):
            _show_error(error, as_json)
        raise typer.Exit(2 if isinstance(error, UsageInvalid) else 1) from error


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes, if there is a terminal."""
    with tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:
        yield lambda count: bar.update(count) and None


@contextmanager
def opener(
    trusted_keys: Path | None, unsigned: bool
) -> Iterator[Callable[[Path, BaseIdentity | None], VerifiedPackage]]:
    """Open packages; their private copies are deleted at the end of the block."""
    from flexgate.experts.package.signature import TrustedKeys
    from flexgate.experts.package.verify import open_package

    if (trusted_keys is None) != unsigned:
        raise typer.BadParameter("give either --trusted-keys FOLDER or --unsigned")
    trusted = None if trusted_keys is None else TrustedKeys.from_directory(trusted_keys)
    with tempfile.TemporaryDirectory(prefix="flexgate-") as private, ExitStack() as stack:
        count = 0

        def open_one(path: Path, base: BaseIdentity | None) -> VerifiedPackage:
            nonlocal count
            count += 1
            with progress_bar(f"verify {path.name}") as progress:
                into = Path(private) / str(count)
                return stack.enter_context(
                    open_package(path, base=base, trusted_keys=trusted, into=into, progress=progress)
                )

        yield open_one


def read_statement(path: Path) -> Statement:
    """Read an owner's statement; raises ``ManifestInvalid``."""
    from flexgate.experts.errors import ManifestInvalid
    from flexgate.experts.package.manifest import parse_statement

    try:
        return parse_statement(path.read_bytes(), str(path))
    except OSError as error:
        raise ManifestInvalid(f"{path} cannot be read: {error.strerror}") from error


def _shower(as_json: bool, quiet: bool) -> Show:
    if quiet:
        return lambda _: None
    return (lambda result: typer.echo(json.dumps(result, indent=1))) if as_json else _show_text


def _show_error(error: ExpertsError, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}, indent=1))
    else:
        typer.echo(f"error: {error}", err=True)


def _show_text(result: Mapping[str, Any], indent: str = "") -> None:
    width = max((len(name) for name in result), default=0) + 2
    for name, value in result.items():
        if isinstance(value, Mapping):
            typer.echo(f"{indent}{name}")
            _show_text(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            typer.echo(f"{indent}{name}")
            for item in value:
                _line(f"{indent}  " + ", ".join(f"{key} {part}" for key, part in item.items()))
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            _line(f"{indent}{name:<{width}}{text}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print aligned columns; whole lines where the output is no terminal, and ``empty`` where there are no rows."""
    if not rows:
        typer.echo(empty)
        return
    table = Table(*header, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    console = Console(soft_wrap=True, highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console.width = 10_000
    with console.capture() as captured:
        console.print(table)
    typer.echo("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()), nl=False)


def _line(text: str) -> None:
    typer.echo(_printable(text))


def _printable(text: str) -> str:
    """Foreign text must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
