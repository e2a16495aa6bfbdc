"""What a merged checkpoint says of its experts: ``flexgate.json``, and each package's signed manifest beside it.

``flexgate.json`` (see ``checkpoint.ownership``) names id, owner and domain of every index. ``provenance/ID.json`` and
``provenance/ID.sig`` are the package's own files, byte for byte, so that an expert that is extracted again is the
package it was, signature included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexgate.experts.checkpoint.families import experts_per_layer
from flexgate.experts.checkpoint.layout import CONFIG_NAME
from flexgate.experts.checkpoint.ownership import FORMATS, OWNERSHIP_NAME, ROUTER_GRADES, UNKNOWN, parse_ownership
from flexgate.experts.checkpoint.reader import read_json
from flexgate.experts.errors import ExpertsError, LayoutError
from flexgate.experts.package.manifest import MAX_MANIFEST, Manifest, parse_manifest, sha256
from flexgate.experts.package.signature import SIGNATURE_BYTES

MODEL_MANIFEST: Final = OWNERSHIP_NAME
FOLDER: Final = "provenance"
PUBLIC: Final = {"index": 0, "id": "public", "owner": "public", "domain": "the public anchor"}


@dataclass(frozen=True)
class Record:
    """A package's manifest and signature as they were signed."""

    manifest: Manifest
    text: bytes
    signature: bytes | None


def model_manifest(records: Sequence[Record], base_digest: str | None, public: dict[str, Any]) -> dict[str, Any]:
    """The content of ``flexgate.json``: the anchor's entry, then ``records`` in the order of their indices.

    What excludes the anchor leaves it in low-rank experts, which are sums with it: at best, its grade is ``shared``.
    """
    routers = {record.manifest.training.router for record in records}
    alone = public.get("grade", ROUTER_GRADES.get(str(public.get("router")), UNKNOWN))
    if any(record.manifest.rank is not None for record in records) and alone != UNKNOWN:
        public = {**public, "grade": "shared"}
    return {
        "format": FORMATS["experts"],
        **({} if base_digest is None else {"base_digest": base_digest}),
        "strictly_separable": routers <= {"own"},
        "experts": [{**public, "index": 0}, *(_entry(i, r) for i, r in enumerate(records, start=1))],
    }


def read_record(directory: Path, expert: str) -> Record | None:
    """The record of one expert; None where the checkpoint keeps none.

    Raises:
        LayoutError: the record is damaged.
    """
    path = directory / FOLDER / f"{expert}.json"
    if not path.is_file():
        return None
    signature = path.with_suffix(".sig")
    try:
        text = path.read_bytes()[: MAX_MANIFEST + 1]
        signed = signature.read_bytes()[: SIGNATURE_BYTES + 1] if signature.is_file() else None
        return Record(parse_manifest(text), text, signed)
    except (OSError, ExpertsError) as error:
        raise LayoutError(f"{path} is damaged: {error}") from error


def expert_entries(directory: Path, count: int) -> list[dict[str, Any]]:
    """The entries of ``flexgate.json`` by index; ``public`` and ``expert-N`` where there is none."""
    if not (directory / MODEL_MANIFEST).is_file():
        unknown = {"owner": "unknown", "domain": "unknown"}
        return [PUBLIC, *({"index": index, "id": f"expert-{index}", **unknown} for index in range(1, count))]
    content = read_json(directory / MODEL_MANIFEST)
    entries = _unit_entries(directory, content) if "units" in content else content.get("experts")
    if not isinstance(entries, list) or len(entries) != count:
        raise LayoutError(f"{directory / MODEL_MANIFEST} must list the checkpoint's {count} experts")
    if not all(isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries):
        raise LayoutError(f"{directory / MODEL_MANIFEST}: every expert needs an id")
    return entries


def _unit_entries(directory: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The units as entries by index, where each is one expert of every layer; raises ``LayoutError``."""
    path = directory / MODEL_MANIFEST
    ownership = parse_ownership(content, experts_per_layer(read_json(directory / CONFIG_NAME)), str(path))
    if not ownership.is_identity:
        raise LayoutError(f"{path} gives several experts to a unit; packages hold one expert of every layer")
    common, *others = ownership.to_json()["units"]
    return [{**common, "owner": common["owner"] or PUBLIC["owner"]}, *others]


def joint(record: Record) -> Record:
    """What an expert's record becomes when its router was trained after the merge: unsigned, and it says so."""
    training = record.manifest.training.model_copy(update={"router": "joint"})
    manifest = record.manifest.model_copy(update={"training": training})
    return Record(manifest, manifest.to_json(), None)


def joint_manifest(directory: Path, records: Mapping[str, Record], count: int) -> dict[str, Any]:
    """``flexgate.json`` of the checkpoint ``directory`` after its routers were trained together."""
    public, *closed = expert_entries(directory, count)
    said = read_json(directory / MODEL_MANIFEST) if (directory / MODEL_MANIFEST).is_file() else {}
    if "units" in said:
        common, *owned = said["units"]
        return {**said, "units": [common, *({**unit, **_joint_grade(unit)} for unit in owned)]}
    digests = {expert: {"manifest_sha256": sha256(record.text)} for expert, record in records.items()}
    entries = [{**entry, "router": "joint", **_joint_grade(entry), **digests.get(entry["id"], {})} for entry in closed]
    return {"format": FORMATS["experts"], **said, "strictly_separable": False, "experts": [public, *entries]}


def _joint_grade(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"grade": "router"} if entry.get("grade") == "removed" else {}


def strictly_separable(directory: Path) -> bool | None:
    """Whether taking an expert out gives the model that never had it; None where the checkpoint does not say."""
    if not (directory / MODEL_MANIFEST).is_file():
        return None
    content = read_json(directory / MODEL_MANIFEST)
    if "units" in content:
        grades = {unit.get("grade") for unit in content["units"][1:]}
        return False if grades & {"router", "shared"} else True if grades <= {"removed"} else None
    said = content.get("strictly_separable")
    return said if isinstance(said, bool) else None


def _entry(index: int, record: Record) -> dict[str, Any]:
    manifest = record.manifest
    entry: dict[str, Any] = {
        "index": index,
        "id": manifest.id,
        "version": manifest.version,
        "owner": manifest.owner,
        "domain": manifest.domain,
        "router": manifest.training.router,
        "manifest_sha256": sha256(record.text),
    }
    sizes = {"rank": manifest.rank, "width": manifest.width}
    return entry | {name: size for name, size in sizes.items() if size is not None}
