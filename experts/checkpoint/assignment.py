"""A table that says which experts are whose, as people write it, and the ownership that it makes.

The table is YAML. Each unit names its experts: in every layer, or by layers::

    ownership: owners
    units:
    - {id: public, domain: the base model, experts: 0}
    - {id: news, owner: gazette, domain: news, licence: CC-BY-4.0, grade: removed, experts: 1-3}
    - id: law
      owner: chancery
      domain: statutes
      experts:
      - {layers: 0-15, experts: 4-7}
      - {layers: 16-31, experts: "4, 6-7"}
    - {id: math, owner: academy, domain: mathematics, experts: [{layers: 16-31, experts: 5}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from flexgate.experts.checkpoint.ownership import PUBLIC, Ownership, kind_and_units, parse_span, parse_unit
from flexgate.experts.errors import OwnershipInvalid

_NO_UNIT: Final = 255
"""Until a unit names the expert; no unit has this number."""


def parse_assignment(content: Any, experts_L: Sequence[int], where: str) -> Ownership:
    """The ownership that a table makes of a checkpoint.

    Args:
        experts_L: the number of experts of each layer, 0 for a layer without.
        where: the file's name, for messages.

    Raises:
        OwnershipInvalid: an expert of any layer has no unit or two, or the table names what there is not.
    """
    kind, entries = _document(content, where)
    unit_LE = [bytearray([_NO_UNIT]) * count for count in experts_L]
    units = []
    for number, entry in enumerate(entries):
        place = f"{where}: units[{number}]"
        if not isinstance(entry, dict):
            raise OwnershipInvalid(f"{place} must have id, owner, domain and experts")
        units.append(parse_unit(place, {name: value for name, value in entry.items() if name != "experts"}))
        for layer, expert in _experts(place, entry, experts_L):
            if unit_LE[layer][expert] != _NO_UNIT:
                other = units[unit_LE[layer][expert]].id
                raise OwnershipInvalid(f"{place} names expert {expert} of layer {layer}, which {other!r} has already")
            unit_LE[layer][expert] = number
    for layer, unit_E in enumerate(unit_LE):
        if _NO_UNIT in unit_E:
            raise OwnershipInvalid(
                f"{where} gives expert {unit_E.index(_NO_UNIT)} of layer {layer} to no unit: name it under one, "
                f"or under {PUBLIC!r} if every request may use it"
            )
    try:
        return Ownership(tuple(units), tuple(bytes(unit_E) for unit_E in unit_LE), kind)
    except OwnershipInvalid as error:
        raise OwnershipInvalid(f"{where}: {error}") from None


def _document(content: Any, where: str) -> tuple[Any, list[Any]]:
    if not isinstance(content, dict) or not content.keys() <= {"ownership", "units"}:
        raise OwnershipInvalid(f"{where} must have 'ownership' and 'units', and nothing else")
    return kind_and_units(content, where)


def _experts(place: str, entry: dict[str, Any], experts_L: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Layer and index of each expert that a unit names; layers without experts are passed over."""
    if "experts" not in entry:
        raise OwnershipInvalid(f"{place} has no 'experts': name them, such as 0 or 1-3, or [] if 'public' has none")
    given = entry["experts"]
    by_layer = isinstance(given, list) and any(isinstance(part, dict) for part in given)
    for part in given if by_layer else [{"experts": given}]:
        if not isinstance(part, dict) or not {"experts"} <= part.keys() <= {"experts", "layers"}:
            raise OwnershipInvalid(f"{place}: experts has {part!r:.40}, expected 'layers' and 'experts'")
        layers = part.get("layers", f"0-{len(experts_L) - 1}")
        experts = _numbers(part["experts"], max(experts_L), "expert", place)
        for layer in _numbers(layers, len(experts_L), "layer", place):
            if experts_L[layer]:
                yield from ((layer, expert) for expert in experts)


def _numbers(given: Any, count: int, what: str, place: str) -> list[int]:
    """The numbers that spans name, each once: 3, "0-15", "0, 4-7" or a list of such."""
    found: dict[int, None] = {}
    for item in given if isinstance(given, list) else [given]:
        if type(item) not in (int, str):
            raise OwnershipInvalid(f"{place}: {item!r:.40} names no {what}: write 3 or 0-15")
        for text in str(item).split(","):
            for number in parse_span(text.strip(), count, what, place):
                if number in found:
                    raise OwnershipInvalid(f"{place} names {what} {number} twice")
                found[number] = None
    return list(found)
