"""What mergekit's own file says of a mixture: which model each expert was copied from.

mergekit writes its configuration beside the weights. Expert *i* of every layer is the FFN of the *i*-th source model;
attention, embeddings, norms and head are the base model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flexgate.experts.checkpoint.ownership import PUBLIC
from flexgate.experts.errors import OwnershipInvalid

MERGEKIT_NAME: Final = "mergekit_moe_config.yml"
_MAX_SOURCE: Final = 200


@dataclass(frozen=True, slots=True)
class Sources:
    """The models that a mixture was made of, as mergekit writes them: ``owner/name``, ``…@revision``, ``…+lora``."""

    base: str
    experts: tuple[str, ...]
    shared: tuple[str, ...]


def parse_mergekit(content: Any, experts_L: Sequence[int], where: str) -> Sources:
    """The sources of a checkpoint's experts.

    Raises:
        OwnershipInvalid: the file has another number of experts than the checkpoint, or does not say where one is from.
    """
    if not isinstance(content, dict) or not isinstance(content.get("experts"), list):
        raise OwnershipInvalid(f"{where} is not mergekit's: it has no list of experts")
    experts, count = content["experts"], max(experts_L)
    if len(experts) != count:
        raise OwnershipInvalid(f"{where} lists {len(experts)} experts, the checkpoint has {count}: remove the file")
    shared = content.get("shared_experts") or []
    if not isinstance(shared, list):
        raise OwnershipInvalid(f"{where}: shared_experts must be a list")
    return Sources(
        _source(content.get("base_model"), f"{where}: base_model"),
        tuple(_of_experts("experts", experts, where)),
        tuple(_of_experts("shared_experts", shared, where)),
    )


def propose(sources: Sources) -> dict[str, Any]:
    """A table for ``parse_assignment``: one unit for each source, whose owner and licence are to be filled in.

    Experts that were copied from the base model are common: its other weights are in every answer all the same.
    """
    indices: dict[str, list[int]] = {sources.base: []}
    for index, source in enumerate(sources.experts):
        indices.setdefault(source, []).append(index)
    del indices[sources.base]
    common = [index for index, source in enumerate(sources.experts) if source == sources.base]
    taken = {PUBLIC}
    units = [
        {
            "id": _id(source, taken),
            "owner": None,
            "domain": source,
            "licence": None,
            "grade": "unknown",
            "experts": _spans(of_source),
        }
        for source, of_source in indices.items()
    ]
    return {"ownership": "owners", "units": [{"id": PUBLIC, "domain": sources.base, "experts": _spans(common)}, *units]}


def _spans(indices: list[int]) -> Any:
    """As short as the table takes it."""
    return indices[0] if len(indices) == 1 else ", ".join(map(str, indices)) or []


def _of_experts(name: str, entries: list[Any], where: str) -> Iterable[str]:
    for index, entry in enumerate(entries):
        place = f"{where}: {name}[{index}]"
        if not isinstance(entry, dict):
            raise OwnershipInvalid(f"{place} has no source_model")
        yield _source(entry.get("source_model"), f"{place}: source_model")


def _source(value: Any, place: str) -> str:
    """One name for both ways that mergekit writes a model: a string, or its parts."""
    parts = [value["model"], value.get("lora")] if isinstance(value, dict) and "model" in value else [value]
    names = [_path(part) for part in parts if part is not None]
    source = "+".join(name for name in names if isinstance(name, str))
    if not all(isinstance(name, str) and name.strip() for name in names) or not 0 < len(source) <= _MAX_SOURCE:
        raise OwnershipInvalid(f"{place} is {value!r:.60}, expected the name of a model")
    if not source.isprintable():
        raise OwnershipInvalid(f"{place} is {value!r:.60}, with characters that no model's name has")
    return source


def _path(value: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        return value
    revision = value.get("revision")
    return value["path"] if revision is None else f"{value['path']}@{revision}"


def _id(source: str, taken: set[str]) -> str:
    """An id that is not taken, from the model's own name."""
    name = re.split(r"[@+]", source)[0].rstrip("/").rpartition("/")[2].lower()
    stem = re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:56].strip("-") or "expert"
    id_, number = stem, 1
    while id_ in taken:
        number += 1
        id_ = f"{stem}-{number}"
    taken.add(id_)
    return id_
