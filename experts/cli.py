"""``flexgate experts``: make, check and combine expert packages. Runs without vLLM.

Every command prints what it did, or with ``--json`` one JSON object; an error is one sentence and exit status 1.
Modules that load PyTorch are imported when a command needs them, so that help is quick.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from flexgate.experts.errors import ExpertsError

if TYPE_CHECKING:
    from flexgate.experts.base import BaseIdentity
    from flexgate.experts.manifest import Statement
    from flexgate.experts.verify import VerifiedPackage

app = typer.Typer(name="experts", no_args_is_help=True, help="Make, check and combine expert packages.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
TrustedKeysOption = Annotated[
    Path | None, typer.Option(help="Folder with OWNER.pem files: whose signatures count.", show_default=False)
]
UnsignedOption = Annotated[bool, typer.Option(help="Ask for no signature; for packages of your own only.")]
KeyOption = Annotated[Path | None, typer.Option(help="The owner's private key, to sign with.", show_default=False)]


@app.command()
def keygen(
    owner: str,
    into: Annotated[Path, typer.Option(help="Folder for the two files.")] = Path(),
    as_json: Json = False,
) -> None:
    """Make a key pair: OWNER.key stays with the owner, OWNER.pem goes to operators."""
    with reported(as_json) as show:
        from flexgate.experts.signature import generate, key_id, read_public_keys

        private, public = generate(owner, into)
        show({"private key": str(private), "public key": str(public), "key id": key_id(read_public_keys(public)[0])})


@app.command()
def inspect(path: Path, as_json: Json = False) -> None:
    """Show what a package or a merged checkpoint says of itself. Nothing is verified."""
    with reported(as_json) as show:
        from flexgate.experts.inspect import inspect_checkpoint, inspect_package
        from flexgate.experts.layout import CONFIG_NAME

        show(inspect_checkpoint(path) if (path / CONFIG_NAME).is_file() else inspect_package(path))


@app.command()
def verify(
    package: Path,
    base: Annotated[Path | None, typer.Option(help="Anchor or merged checkpoint that it must belong to.")] = None,
    trusted_keys: TrustedKeysOption = None,
    unsigned: UnsignedOption = False,
    as_json: Json = False,
) -> None:
    """Check a package from the first byte to the last, on a private copy that is deleted afterwards."""
    with reported(as_json) as show, opener(trusted_keys, unsigned) as open_one:
        from flexgate.experts.base import base_identity

        with progress_bar("base") as progress:
            identity = None if base is None else base_identity(base, progress)
        checked = open_one(package, identity)
        show(
            {
                "verified": True,
                "id": checked.manifest.id,
                "owner": checked.manifest.owner,
                "signed by": checked.signer or "nobody that was asked for",
                "base": checked.manifest.base.digest,
                "base checked": base is not None,
                "tensors": len(checked.weights.digests),
                "bytes": checked.weights.nbytes,
            }
        )


@app.command()
def extract(
    model: Path,
    expert: Annotated[str, typer.Argument(help="Id or index; 'public' gives the anchor as a checkpoint.")],
    target: Path,
    statement: Annotated[Path | None, typer.Option(help="JSON file: id, owner, domain, training, licence.")] = None,
    key: KeyOption = None,
    as_json: Json = False,
) -> None:
    """Take one expert out of a merged checkpoint; an interrupted run goes on when started again."""
    with reported(as_json) as show, progress_bar("extract") as progress:
        from flexgate.experts.extract import extract_anchor, extract_expert

        if expert in ("public", "0"):
            extract_anchor(model, target, progress=progress)
            show({"anchor": str(target)})
            return
        written = None if statement is None else read_statement(statement)
        manifest = extract_expert(model, expert, target, statement=written, key=key, progress=progress)
        show({"package": str(target), "id": manifest.id, "bytes": manifest.weights.bytes, "base": manifest.base.digest})


@app.command()
def merge(
    anchor: Path,
    packages: list[Path],
    into: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    top_k: Annotated[int, typer.Option(help="Experts per token of the merged model.")] = 2,
    trusted_keys: TrustedKeysOption = None,
    unsigned: UnsignedOption = False,
    as_json: Json = False,
) -> None:
    """Verify packages and put them behind an anchor; an interrupted run goes on when started again."""
    with reported(as_json) as show, opener(trusted_keys, unsigned) as open_one:
        from flexgate.experts.base import base_identity
        from flexgate.experts.combine import combine

        with progress_bar("base") as progress:
            base = base_identity(anchor, progress)
        opened = [open_one(package, base) for package in packages]
        with progress_bar("merge") as progress:
            combine(anchor, opened, into, top_k=top_k, progress=progress)
        show({"model": str(into), "experts": ["public", *(package.manifest.id for package in opened)]})


@app.command()
def sign(
    package: Path, key: Annotated[Path, typer.Option(help="The owner's private key.")], as_json: Json = False
) -> None:
    """Sign an unsigned package."""
    with reported(as_json) as show:
        from flexgate.experts.signature import key_id, read_private_key
        from flexgate.experts.write import sign_package

        sign_package(package, key)
        show({"signed": str(package), "key id": key_id(read_private_key(key).public_key())})


Show = Callable[[Mapping[str, Any]], None]


@contextmanager
def reported(as_json: bool) -> Iterator[Show]:
    """Print what the command found; an error of this package becomes a message and exit status 1."""
    try:
        yield (lambda result: typer.echo(json.dumps(result, indent=1))) if as_json else _show_text
    except ExpertsError as error:
        if as_json:
            typer.echo(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}, indent=1))
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int], None]]:
    """Bytes done, on the terminal if there is one."""
    with tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:
        yield lambda count: bar.update(count) and None


@contextmanager
def opener(
    trusted_keys: Path | None, unsigned: bool
) -> Iterator[Callable[[Path, BaseIdentity | None], VerifiedPackage]]:
    """Opens packages; their private copies live as long as the block."""
    from flexgate.experts.signature import TrustedKeys
    from flexgate.experts.verify import open_package

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
    """What the owner wrote; raises ``ManifestInvalid``."""
    from flexgate.experts.errors import ManifestInvalid
    from flexgate.experts.manifest import parse_statement

    try:
        return parse_statement(path.read_bytes(), str(path))
    except OSError as error:
        raise ManifestInvalid(f"{path} cannot be read: {error.strerror}") from error


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


def _line(text: str) -> None:
    """Foreign text must not steer the terminal."""
    typer.echo("".join(character if character.isprintable() else "?" for character in text))
