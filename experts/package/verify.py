"""The only way to a package that may be loaded: a private copy of it, checked from the first byte to the last."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flexgate.experts.checkpoint.base import BaseIdentity
from flexgate.experts.errors import BaseMismatch, DigestMismatch, PackageUnreadable, SignatureInvalid
from flexgate.experts.io.output import new_directory, write_new
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.tensorfile import MAX_HEADER
from flexgate.experts.package.files import MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAME
from flexgate.experts.package.intake import Source
from flexgate.experts.package.manifest import MAX_MANIFEST, Manifest, parse_manifest
from flexgate.experts.package.signature import SIGNATURE_BYTES, TrustedKeys
from flexgate.experts.package.weights import CheckedWeights, ExpertLayer, WeightsTicket, check_weights, package_bytes

_VERIFIED: Final = object()


@dataclass(frozen=True)
class VerifiedPackage:
    """A package that passed every check, and its private copy; only ``open_package`` makes one."""

    token: object
    manifest: Manifest
    signer: str | None
    """Id of the key that signed; None only where the caller asked for no signature."""
    directory: Path
    """The private copy, which belongs to the caller."""
    weights: CheckedWeights

    def __post_init__(self) -> None:
        if self.token is not _VERIFIED:
            raise TypeError("a VerifiedPackage comes from open_package only")

    @property
    def ticket(self) -> WeightsTicket:
        """What another process needs for ``open_weights``."""
        return self.weights.ticket

    def layer(self, number: int) -> ExpertLayer:
        """One layer's tensors, read from the copy."""
        return self.weights.layer(number)

    def close(self) -> None:
        """Close the copy's file."""
        self.weights.close()

    def __enter__(self) -> VerifiedPackage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_package(
    path: Path,
    *,
    base: BaseIdentity | None,
    trusted_keys: TrustedKeys | None,
    into: Path,
    progress: Progress = silent,
    keep_free: int = 0,
) -> VerifiedPackage:
    """Copy the package at ``path`` to the new private folder ``into`` and check the copy.

    Args:
        base: the model that the expert must belong to; None checks no more than that the package fits its own manifest.
        trusted_keys: whose signatures count; None asks for no signature, which is for one's own packages only.
        into: must not exist; exists afterwards only if the package is good.
        keep_free: bytes that the copy must leave free on the disk.

    Raises:
        PackageError: the package may not be used, and why.
        OutputRefused: ``into`` exists or cannot be written; ``DiskFull`` before what does not fit is written.
    """
    with Source(path) as source, new_directory(into, mode=0o700) as partial:
        text = source.read(MANIFEST_NAME, MAX_MANIFEST)
        manifest = parse_manifest(text)
        signer = _check_signature(source, manifest, text, trusted_keys, partial)
        ticket = _check_base(manifest, base, into / WEIGHTS_NAME)
        _check_size(manifest, ticket)
        write_new(partial / MANIFEST_NAME, text, mode=0o600)
        source.copy(WEIGHTS_NAME, manifest.weights.bytes, partial / WEIGHTS_NAME, progress, keep_free=keep_free)
        weights = check_weights(os.open(partial / WEIGHTS_NAME, os.O_RDONLY | os.O_CLOEXEC), ticket, progress)
        try:
            _check_digests(manifest, weights)
        except BaseException:
            weights.close()
            raise
    return VerifiedPackage(_VERIFIED, manifest, signer, into, weights)


def _check_signature(
    source: Source, manifest: Manifest, text: bytes, trusted_keys: TrustedKeys | None, partial: Path
) -> str | None:
    if SIGNATURE_NAME not in source.names:
        if trusted_keys is None:
            return None
        raise SignatureInvalid(f"{source.path} is not signed: it has no {SIGNATURE_NAME}")
    signature = source.read(SIGNATURE_NAME, SIGNATURE_BYTES)
    write_new(partial / SIGNATURE_NAME, signature, mode=0o600)
    return None if trusted_keys is None else trusted_keys.signer(manifest.owner, text, signature)


def _check_base(manifest: Manifest, base: BaseIdentity | None, copy: Path) -> WeightsTicket:
    own = manifest.base.identity()
    if base is not None and (difference := base.difference(own)):
        raise BaseMismatch(f"expert {manifest.id!r} was made for another base model: {difference}")
    return WeightsTicket(copy, manifest.weights.digest, own.architecture, own.dtype, manifest.size)


def _check_size(manifest: Manifest, ticket: WeightsTicket) -> None:
    least = package_bytes(ticket.architecture, ticket.dtype, ticket.size)
    if not least <= manifest.weights.bytes <= least + 2 * MAX_HEADER:
        raise PackageUnreadable(
            f"{WEIGHTS_NAME} has {manifest.weights.bytes} bytes by the manifest; this architecture takes about {least}"
        )


def _check_digests(manifest: Manifest, weights: CheckedWeights) -> None:
    for name in sorted(manifest.weights.tensors.keys() | weights.digests.keys()):
        if manifest.weights.tensors.get(name) != weights.digests.get(name):
            raise DigestMismatch(f"{name} does not have the SHA-256 that the manifest names")
