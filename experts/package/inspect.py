"""What packages and checkpoints say of themselves, for people and programs. Reads headers and manifests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.package.files import MANIFEST_NAME, SIGNATURE_NAME
from flexgate.experts.package.intake import Source
from flexgate.experts.package.manifest import MAX_MANIFEST, parse_manifest
from flexgate.experts.package.provenance import expert_entries, strictly_separable


def inspect_package(path: Path) -> dict[str, Any]:
    """A package's manifest, less the lists of digests; raises ``PackageError``."""
    with Source(path) as source:
        manifest = parse_manifest(source.read(MANIFEST_NAME, MAX_MANIFEST))
        signed = SIGNATURE_NAME in source.names
    fields: dict[str, Any] = manifest.model_dump(mode="json", exclude_none=True)
    fields["base"] = {**fields["base"], "tensors": len(manifest.base.tensors)}
    fields["weights"] = {**fields["weights"], "tensors": len(manifest.weights.tensors)}
    return {"signed": signed, "verified": False, **fields}


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's numbers and experts; raises ``LayoutError``."""
    with CheckpointReader(path) as checkpoint:
        architecture = checkpoint.architecture
        entries = expert_entries(path, architecture.num_experts)
        size = sum(info.end - info.begin for _, info in checkpoint.infos())
        return {
            "architecture": vars(architecture),
            "dtype": checkpoint.dtype,
            "bytes": size,
            "files": len(checkpoint.files()),
            "strictly_separable": strictly_separable(path),
            "experts": entries,
        }
