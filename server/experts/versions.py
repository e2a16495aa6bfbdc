"""Which of two versions of an expert is served: the one in the checkpoint, or a package that was added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flexgate.experts.checkpoint.reader import read_json
from flexgate.experts.errors import LayoutError
from flexgate.experts.package.provenance import MODEL_MANIFEST, read_record
from flexgate.server.engine.frontend.calls import ExpertInfo
from flexgate.server.experts.errors import PackageRefused
from flexgate.server.experts.repository import UNRECORDED, Added

Merged = Mapping[str, int]
"""The experts of the served checkpoint, each with its version: 1 or more, or `UNSAID`."""
UNSAID: Final = 0


def merged_versions(model: Path, experts: Iterable[str]) -> Merged:
    """The versions that a checkpoint names of its `experts`; raises `LayoutError` where it contradicts itself."""
    path = model / MODEL_MANIFEST
    listed = read_json(path).get("experts", ()) if path.is_file() else ()
    entries = {entry["id"]: entry for entry in listed}
    return {expert: _version(model, entries.get(expert, {"id": expert})) for expert in experts}


def with_packages(model: Path, loaded: Iterable[ExpertInfo]) -> tuple[ExpertInfo, ...]:
    """Experts of a checkpoint, each with the digest of the weights in its package, where that is kept."""
    records = ((info, read_record(model, info.id)) for info in loaded)
    return tuple(
        info if record is None else replace(info, package=record.manifest.weights.digest) for info, record in records
    )


def is_set_aside(package: Added, merged: Merged) -> bool:
    """Whether the checkpoint holds a newer version than a package that was added.

    A package stays while the checkpoint names the same version of its expert as when the package was added, or where
    that was not recorded.

    Raises:
        PackageRefused: the checkpoint has changed and names no version of the expert.
    """
    now = merged.get(package.expert)
    if now is None or package.merged in (now, UNRECORDED):
        return False
    if now == UNSAID:
        raise PackageRefused(
            f"expert '{package.expert}' was added in version {package.version} and is in the checkpoint, which names "
            f'no version of it: give its entry in {MODEL_MANIFEST} a "version", or start with the former checkpoint '
            "and revoke the added expert"
        )
    return now > package.version


def _version(model: Path, entry: Mapping[str, Any]) -> int:
    version = entry.get("version", UNSAID)
    if type(version) is not int or version < UNSAID:
        raise LayoutError(f"{model / MODEL_MANIFEST}: the version of '{entry['id']}' must be a whole number from 1")
    record = read_record(model, entry["id"])
    if record is None:
        return version
    if version not in (UNSAID, record.manifest.version):
        raise LayoutError(
            f"{model} contradicts itself: {MODEL_MANIFEST} names version {version} of '{entry['id']}', "
            f"its provenance version {record.manifest.version}"
        )
    return record.manifest.version
