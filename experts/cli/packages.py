"""``flexgate experts keygen|inspect|verify|extract|merge|sign``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from flexgate.experts.errors import UsageInvalid

if TYPE_CHECKING:
    from flexgate.experts.package.verify import VerifiedPackage

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
                "size": str(checked.manifest.size),
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
    rank: Annotated[
        int | None, typer.Option(help="Keep only the best difference of this rank to the public expert.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Keep only this many neurons, the largest.")] = None,
    as_json: Json = False,
) -> None:
    """Copy one expert out of a merged checkpoint, as a package. An interrupted run resumes when started again.

    With --rank or --width the package is smaller, and the relative error of its weights is printed.
    """
    with reported(as_json) as show, progress_bar("extract") as progress:
        from flexgate.experts.package.extract import extract_anchor, extract_expert
        from flexgate.experts.package.size import FULL, ExpertSize

        size = ExpertSize(rank, width)
        if expert in ("public", "0"):
            if size != FULL:
                raise UsageInvalid("--rank and --width are for an owner's expert: 'public' is the anchor")
            extract_anchor(model, target, progress=progress)
            show({"anchor": str(target)})
            return
        written = None if statement is None else read_statement(statement)
        errors: dict[str, Any] = {}
        manifest = extract_expert(
            model, expert, target, statement=written, key=key, size=size, on_errors=errors.update, progress=progress
        )
        show(
            {
                "package": str(target),
                "id": manifest.id,
                "size": str(manifest.size),
                "bytes": manifest.weights.bytes,
                "base": manifest.base.digest,
                **({"relative error": errors} if errors else {}),
            }
        )


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
        names = ["public", *(package.manifest.id for package in opened)]
        show({"model": str(into), "experts": names, **_widened(opened)})


def _widened(packages: Sequence[VerifiedPackage]) -> dict[str, Any]:
    """What a merge has made larger, and by how much."""
    from flexgate.experts.package.size import FULL
    from flexgate.experts.package.weights import package_bytes

    smaller = [package for package in packages if package.manifest.size != FULL]
    rows = [
        {
            "id": package.manifest.id,
            "size": str(package.manifest.size),
            "bytes": package.weights.nbytes,
            "bytes in the model": package_bytes(package.ticket.architecture, package.ticket.dtype),
        }
        for package in smaller
    ]
    return {"written as full experts": rows} if rows else {}


def sign(
    package: PackageArgument, key: Annotated[Path, typer.Option(help="The owner's private key.")], as_json: Json = False
) -> None:
    """Sign an unsigned package."""
    with reported(as_json) as show:
        from flexgate.experts.package.signature import key_id, read_private_key
        from flexgate.experts.package.write import sign_package

        sign_package(package, key)
        show({"signed": str(package), "key id": key_id(read_private_key(key).public_key())})
