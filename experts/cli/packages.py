"""``flexgate experts keygen|inspect|verify|extract|merge|sign``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexgate.experts.cli.support import (
    Json,
    KeyOption,
    TrustedKeysOption,
    UnsignedOption,
    opener,
    progress_bar,
    read_statement,
    reported,
)

PackageArgument = Annotated[Path, typer.Argument(help="Folder of a package.")]


def keygen(
    owner: Annotated[str, typer.Argument(help="Id of the owner; names the files.")],
    into: Annotated[Path, typer.Option(help="Folder to write the two files into.")] = Path(),
    as_json: Json = False,
) -> None:
    """Create a key pair: OWNER.key stays with the owner, OWNER.pem is given to operators."""
    with reported(as_json) as show:
        from flexgate.experts.package.signature import generate, key_id, read_public_keys

        private, public = generate(owner, into)
        show({"private key": str(private), "public key": str(public), "key id": key_id(read_public_keys(public)[0])})


def inspect(path: Annotated[Path, typer.Argument(help="Package or merged checkpoint.")], as_json: Json = False) -> None:
    """Show the manifest of a package or a merged checkpoint. Nothing is verified."""
    with reported(as_json) as show:
        from flexgate.experts.checkpoint.layout import CONFIG_NAME
        from flexgate.experts.package.inspect import inspect_checkpoint, inspect_package

        show(inspect_checkpoint(path) if (path / CONFIG_NAME).is_file() else inspect_package(path))


def verify(
    package: PackageArgument,
    base: Annotated[Path | None, typer.Option(help="Anchor or merged checkpoint that the package must fit.")] = None,
    trusted_keys: TrustedKeysOption = None,
    unsigned: UnsignedOption = False,
    as_json: Json = False,
) -> None:
    """Check a whole package, on a private copy that is deleted afterwards."""
    with reported(as_json) as show, opener(trusted_keys, unsigned) as open_one:
        from flexgate.experts.checkpoint.base import base_identity

        with progress_bar("base") as progress:
            identity = None if base is None else base_identity(base, progress)
        checked = open_one(package, identity)
        show(
            {
                "verified": True,
                "id": checked.manifest.id,
                "owner": checked.manifest.owner,
                "signed by": checked.signer or "signature not checked (--unsigned)",
                "base": checked.manifest.base.digest,
                "base checked": base is not None,
                "tensors": len(checked.weights.digests),
                "bytes": checked.weights.nbytes,
            }
        )


def extract(
    model: Annotated[Path, typer.Argument(help="Merged checkpoint.")],
    expert: Annotated[str, typer.Argument(help="Id or index; 'public' gives the anchor as a checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    statement: Annotated[Path | None, typer.Option(help="JSON file: id, owner, domain, training, licence.")] = None,
    key: KeyOption = None,
    as_json: Json = False,
) -> None:
    """Copy one expert out of a merged checkpoint, as a package. An interrupted run resumes when started again."""
    with reported(as_json) as show, progress_bar("extract") as progress:
        from flexgate.experts.package.extract import extract_anchor, extract_expert

        if expert in ("public", "0"):
            extract_anchor(model, target, progress=progress)
            show({"anchor": str(target)})
            return
        written = None if statement is None else read_statement(statement)
        manifest = extract_expert(model, expert, target, statement=written, key=key, progress=progress)
        show({"package": str(target), "id": manifest.id, "bytes": manifest.weights.bytes, "base": manifest.base.digest})


def merge(
    anchor: Annotated[Path, typer.Argument(help="Checkpoint of the public model.")],
    packages: Annotated[list[Path], typer.Argument(help="Folders of packages.")],
    into: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    top_k: Annotated[int, typer.Option(help="Number of experts per token in the merged model.")] = 2,
    trusted_keys: TrustedKeysOption = None,
    unsigned: UnsignedOption = False,
    as_json: Json = False,
) -> None:
    """Verify packages and merge them with an anchor. An interrupted run resumes when started again."""
    with reported(as_json) as show, opener(trusted_keys, unsigned) as open_one:
        from flexgate.experts.checkpoint.base import base_identity
        from flexgate.experts.package.merge import combine

        with progress_bar("base") as progress:
            base = base_identity(anchor, progress)
        opened = [open_one(package, base) for package in packages]
        with progress_bar("merge") as progress:
            combine(anchor, opened, into, top_k=top_k, progress=progress)
        show({"model": str(into), "experts": ["public", *(package.manifest.id for package in opened)]})


def sign(
    package: PackageArgument, key: Annotated[Path, typer.Option(help="The owner's private key.")], as_json: Json = False
) -> None:
    """Sign an unsigned package."""
    with reported(as_json) as show:
        from flexgate.experts.package.signature import key_id, read_private_key
        from flexgate.experts.package.write import sign_package

        sign_package(package, key)
        show({"signed": str(package), "key id": key_id(read_private_key(key).public_key())})
