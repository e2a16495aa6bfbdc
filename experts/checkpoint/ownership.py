"""``flexgate.json``: who owns a checkpoint's experts, and what excluding an owner's experts excludes.

A *unit* is an owner's contribution: what agreements name, gates exclude and answers attribute. The API calls it an
expert. A unit may have several experts in a layer, and other ones in another layer; unit 0 is common and in every gate.

The file has one of two forms. ``experts`` lists one unit for each index, the same in every layer. ``units`` lists the
units, and ``layers`` the unit of each expert::

    {"ownership": "owners",
     "units": [{"id": "public", "owner": null, "domain": "the base model"},
               {"id": "news", "owner": "gazette", "domain": "news", "licence": "CC-BY-4.0", "grade": "removed"}],
     "layers": {"0-15": [0, 1, 1, 0], "16-31": [1, 0, 1, 1]}}

Layers are numbered as in the model, from 0; layers without experts are not named. ``former_units`` may give the grades
of units that the checkpoint no longer has: ``{"math": "removed"}`` states that nothing of ``math`` is left in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, Literal, cast, get_args

from flexgate.experts.errors import OwnershipInvalid

OWNERSHIP_NAME: Final = "flexgate.json"
PUBLIC: Final = "public"
UNKNOWN: Final = "unknown"
MAX_UNITS: Final = 64
"""Bits of a gate."""

IDENTITY: Final[Mapping[str, str]] = {
    "id": "[a-z0-9][a-z0-9-]{0,62}",
    "owner": "[A-Za-z0-9][A-Za-z0-9._-]{0,62}",
    "domain": r"[^\x00-\x1f]{0,200}",
    "licence": r"[^\x00-\x1f]{1,200}",
}
"""As the policy's catalogue takes them."""
_FORMS: Final[Mapping[str, str]] = {
    "id": "1 to 63 characters from a-z, 0-9 and '-', beginning with a letter or digit",
    "owner": "1 to 63 characters from A-Z, a-z, 0-9, '.', '_' and '-', beginning with a letter or digit",
    "domain": "a string of at most 200 characters, none of them a control character",
    "licence": "a string of 1 to 200 characters, none of them a control character",
}
"""The same in words, for messages."""

Grade = Literal["removed", "router", "shared", "unknown"]
"""What excluding a unit excludes: all that was learnt from its data (``removed``); all but what a router has learnt
that was trained with it (``router``), or shared weights that were trained or averaged with it (``shared``)."""
GRADES: Final[tuple[Grade, ...]] = get_args(Grade)
ROUTER_GRADES: Final[Mapping[str, Grade]] = {"own": "removed", "joint": "router", UNKNOWN: "unknown"}
"""The grade that follows from how an expert's router row was trained, where all shared weights were frozen."""

FORMATS: Final = {"experts": "flexgate-model/1", "units": "flexgate-model/2"}
"""The value of ``format`` for each form, where it is given."""
_UNITS_KEYS: Final = frozenset({"format", "ownership", "units", "layers", "former_units"})
_UNIT_KEYS: Final = frozenset({"id", "owner", "domain", "licence", "grade", "required"})
_RANGE: Final = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


@dataclass(frozen=True, slots=True)
class Unit:
    """An owner's contribution; without an owner it is common, or a part of a model whose experts have no owners."""

    id: str
    owner: str | None
    domain: str
    licence: str | None = None
    grade: Grade = "unknown"
    required: bool = False
    """Whether every request uses it, whatever its tenant may leave out."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """A checkpoint's units, and the unit of every expert. Checked when it is made.

    Attributes:
        units: unit 0, which is common, and up to 63 others.
        unit_LE: for each layer of the model the unit of each of its experts, one byte each; empty for a layer
            without experts.
        kind: ``none`` where experts follow tokens, not owners, as after ordinary pretraining.
        former_units: grades of units that the checkpoint no longer has, by id.

    Raises:
        OwnershipInvalid: the parts contradict each other.
    """

    units: tuple[Unit, ...]
    unit_LE: tuple[bytes, ...]
    kind: Literal["owners", "none"] = "owners"
    former_units: Mapping[str, Grade] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse what a gate could not say, or what would let an expert into gates that do not name its unit."""
        count = len(self.units)
        if not 1 <= count <= MAX_UNITS:
            raise OwnershipInvalid(f"there are {count} units: a gate names 1 to {MAX_UNITS}, the common one included")
        if self.units[0].id != PUBLIC:
            raise OwnershipInvalid(
                f"unit 0 must be {PUBLIC!r}, the common one, and is {self.units[0].id!r}: list it first"
            )
        for number, unit in enumerate(self.units):
            if any(unit.id == other.id for other in self.units[:number]):
                raise OwnershipInvalid(f"two units have the id {unit.id!r}: give each its own")
        for unit in self.units:
            _check_kind(unit, self.kind)
            if unit.id in self.former_units:
                raise OwnershipInvalid(
                    f"former_units names unit {unit.id!r}, which the checkpoint has: remove it there"
                )
        self._check_maps()

    def _check_maps(self) -> None:
        for layer, unit_E in enumerate(self.unit_LE):
            if unit_E and max(unit_E) >= len(self.units):
                raise OwnershipInvalid(f"layer {layer} names unit {max(unit_E)}; units are 0 to {len(self.units) - 1}")
        mapped = set().union(*self.unit_LE)
        for number, unit in enumerate(self.units[1:], start=1):
            if number not in mapped:
                raise OwnershipInvalid(
                    f"unit {unit.id!r} has no expert in any layer, so that excluding it would exclude nothing: "
                    "give it its experts, or leave it out"
                )

    @property
    def is_identity(self) -> bool:
        """Whether expert *i* of every layer is unit *i*, as in FlexOlmo."""
        identity = bytes(range(len(self.units)))
        return all(unit_E == identity for unit_E in self.unit_LE)

    def counts_L(self, unit: int) -> list[int]:
        """The number of a unit's experts in each layer that has experts."""
        return [unit_E.count(unit) for unit_E in self.unit_LE if unit_E]

    @property
    def empty_layers(self) -> dict[str, frozenset[int]]:
        """The layers that have experts and none of a unit, of each unit that has such."""
        layers = [(layer, unit_E) for layer, unit_E in enumerate(self.unit_LE) if unit_E]
        empty = {
            unit.id: frozenset(layer for layer, unit_E in layers if number not in unit_E)
            for number, unit in enumerate(self.units)
        }
        return {id_: found for id_, found in empty.items() if found}

    def to_json(self) -> dict[str, Any]:
        """The content of ``flexgate.json``, in the form with ``units``."""
        layers = enumerate(self.unit_LE)
        runs = [(unit_E, [layer for layer, _ in run]) for unit_E, run in groupby(layers, key=lambda pair: pair[1])]
        return {
            "format": FORMATS["units"],
            "ownership": self.kind,
            "units": [_unit_json(unit) for unit in self.units],
            "layers": {_span(run): [*unit_E] for unit_E, run in runs if unit_E},
            **({"former_units": dict(self.former_units)} if self.former_units else {}),
        }


def unnamed(experts_L: Sequence[int]) -> Ownership:
    """Without a file: expert *i* of every layer is a unit of its own, ``public`` or ``expert-i``, of an unknown owner.

    Args:
        experts_L: the number of experts of each layer, 0 for a layer without.

    Raises:
        OwnershipInvalid: there are more experts than units.
    """
    count = max(experts_L)
    if count > MAX_UNITS:
        raise OwnershipInvalid(
            f"a layer has {count} experts and a gate names at most {MAX_UNITS} units: "
            "write down whose they are, with 'flexgate experts assign'"
        )
    names = (PUBLIC, *(f"expert-{index}" for index in range(1, count)))
    return Ownership(tuple(Unit(name, UNKNOWN, UNKNOWN) for name in names), _identity_maps(experts_L))


def parse_ownership(content: Mapping[str, Any], experts_L: Sequence[int], where: str) -> Ownership:
    """The content of ``flexgate.json``, checked against the checkpoint's layers.

    Args:
        experts_L: the number of experts of each layer, 0 for a layer without.
        where: the file's name, for messages.

    Raises:
        OwnershipInvalid: naming the first thing that is wrong, in one sentence.
    """
    forms = [form for form in FORMATS if form in content]
    if len(forms) != 1:
        raise OwnershipInvalid(f"{where} must have either 'experts' or 'units'")
    if content.get("format", FORMATS[forms[0]]) != FORMATS[forms[0]]:
        raise OwnershipInvalid(
            f"{where}: format is {content['format']!r:.40}, expected {FORMATS[forms[0]]!r} with {forms[0]!r}"
        )
    read = _from_experts if forms == ["experts"] else _from_units
    return read(content, experts_L, where)


def _from_experts(content: Mapping[str, Any], experts_L: Sequence[int], where: str) -> Ownership:
    entries, count = content["experts"], max(experts_L)
    if not isinstance(entries, list) or len(entries) != count:
        raise OwnershipInvalid(f"{where} must list the checkpoint's {count} experts")
    if content.get("ownership", "owners") != "owners":
        raise OwnershipInvalid(f"{where}: ownership is {content['ownership']!r:.40}, and 'experts' names owners")
    units = []
    for index, entry in enumerate(entries):
        place = f"{where}: experts[{index}]"
        units.append(_parse_unit(place, entry, needed=("id", "owner", "domain")))
        if type(entry.get("index", index)) is not int or entry.get("index", index) != index:
            raise OwnershipInvalid(f"{place}: index is {entry['index']!r:.40}, and it stands at {index}")
    if units[0].id != PUBLIC:
        raise OwnershipInvalid(f"{where}: expert 0 must be {PUBLIC!r}")
    if len({unit.id for unit in units}) != count:
        raise OwnershipInvalid(f"{where}: expert ids must be distinct")
    return _made(tuple(units), _identity_maps(experts_L), "owners", content, where)


def kind_and_units(content: Mapping[str, Any], where: str) -> tuple[Literal["owners", "none"], list[Any]]:
    """The kind of ownership and the entries of the units; raises ``OwnershipInvalid``."""
    kind, entries = content.get("ownership"), content.get("units")
    if kind not in ("owners", "none"):
        raise OwnershipInvalid(f"{where}: ownership is {kind!r:.40}, expected 'owners' or 'none'")
    if not isinstance(entries, list):
        raise OwnershipInvalid(f"{where}: units must be a list")
    if len(entries) > MAX_UNITS:
        raise OwnershipInvalid(f"{where} lists {len(entries)} units; a gate names at most {MAX_UNITS}")
    return kind, entries


def _from_units(content: Mapping[str, Any], experts_L: Sequence[int], where: str) -> Ownership:
    if unknown := sorted(content.keys() - _UNITS_KEYS):
        raise OwnershipInvalid(f"{where} has {unknown[0]!r:.60}, which is not a field of it: remove it")
    kind, entries = kind_and_units(content, where)
    units = tuple(parse_unit(f"{where}: units[{number}]", entry) for number, entry in enumerate(entries))
    return _made(units, _parse_maps(content.get("layers"), experts_L, where), kind, content, where)


def _made(
    units: tuple[Unit, ...],
    unit_LE: tuple[bytes, ...],
    kind: Literal["owners", "none"],
    content: Mapping[str, Any],
    where: str,
) -> Ownership:
    former = _parse_former(content.get("former_units", {}), f"{where}: former_units")
    try:
        return Ownership(units, unit_LE, kind, former)
    except OwnershipInvalid as error:
        raise OwnershipInvalid(f"{where}: {error}") from None


def parse_unit(where: str, entry: Any) -> Unit:
    """A unit of the form with ``units``; raises ``OwnershipInvalid``."""
    unit = _parse_unit(where, entry, needed=("id", "domain"))
    if unknown := sorted(map(str, entry.keys() - _UNIT_KEYS)):
        raise OwnershipInvalid(f"{where} has {unknown[0]!r:.60}, which is not a field of a unit: remove it")
    return unit


def _parse_unit(where: str, entry: Any, *, needed: tuple[str, ...]) -> Unit:
    if not isinstance(entry, dict):
        raise OwnershipInvalid(f"{where} must be an object with id, owner and domain")
    for name, pattern in IDENTITY.items():
        value = entry.get(name)
        if value is None and name not in needed:
            continue
        if value is None:
            raise OwnershipInvalid(f"{where} has no {name}, expected {_FORMS[name]}")
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise OwnershipInvalid(f"{where}: {name} is {value!r:.80}, expected {_FORMS[name]}")
    required = entry.get("required", False)
    if not isinstance(required, bool):
        raise OwnershipInvalid(f"{where}: 'required' of {entry['id']!r} must be true or false")
    grade = _parse_grade(where, entry)
    return Unit(entry["id"], entry.get("owner"), entry["domain"], entry.get("licence"), grade, required)


def _parse_grade(where: str, entry: Mapping[str, Any]) -> Grade:
    follows = ROUTER_GRADES.get(str(entry.get("router")), "unknown")
    grade = entry.get("grade", follows)
    if grade not in GRADES:
        raise OwnershipInvalid(f"{where}: grade is {grade!r:.40}, expected one of {', '.join(GRADES)}")
    if grade == "removed" and "router" in entry and follows != "removed":
        raise OwnershipInvalid(
            f"{where}: grade is 'removed', but router is {entry['router']!r:.40}: only an expert whose router is its "
            "'own' is removed whole"
        )
    return cast(Grade, grade)


def _parse_former(former: Any, where: str) -> dict[str, Grade]:
    if not isinstance(former, dict):
        raise OwnershipInvalid(f"{where} must be an object of units' ids and grades, such as {{'news': 'removed'}}")
    for id_, grade in former.items():
        if not re.fullmatch(IDENTITY["id"], str(id_)):
            raise OwnershipInvalid(f"{where} has {id_!r:.80}, expected {_FORMS['id']}")
        if grade not in GRADES:
            raise OwnershipInvalid(f"{where}: grade of {id_!r} is {grade!r:.40}, expected one of {', '.join(GRADES)}")
    return former


def _parse_maps(layers: Any, experts_L: Sequence[int], where: str) -> tuple[bytes, ...]:
    if not isinstance(layers, dict):
        raise OwnershipInvalid(f"{where}: layers must be an object such as {{'0-{len(experts_L) - 1}': [0, 1, 1]}}")
    maps: dict[int, bytes] = {}
    for span, units in layers.items():
        for layer in parse_span(span, len(experts_L), "layer", f"{where}: layers"):
            if layer in maps:
                raise OwnershipInvalid(f"{where}: layers names layer {layer} twice")
            maps[layer] = _parse_map(units, experts_L[layer], f"{where}: layers[{span!r:.20}]")
    for layer, count in enumerate(experts_L):
        if count and layer not in maps:
            raise OwnershipInvalid(f"{where}: layers does not name layer {layer}, which has {count} experts")
    return tuple(maps.get(layer, b"") for layer in range(len(experts_L)))


def _parse_map(units: Any, count: int, where: str) -> bytes:
    if not isinstance(units, list) or len(units) != count:
        raise OwnershipInvalid(f"{where} must list the unit of each of the layer's {count} experts")
    for expert, unit in enumerate(units):
        if type(unit) is not int or not 0 <= unit < MAX_UNITS:
            raise OwnershipInvalid(f"{where}: expert {expert} has unit {unit!r:.20}, expected 0 to {MAX_UNITS - 1}")
    return bytes(units)


def parse_span(text: str, count: int, what: str, where: str) -> range:
    """The numbers of a span such as ``3`` or ``0-15``; raises ``OwnershipInvalid`` unless all are below ``count``."""
    found = _RANGE.fullmatch(text)
    if found is None:
        raise OwnershipInvalid(f"{where} has {text!r:.40}, expected numbers of {what}s, such as '3' or '0-15'")
    first, last = int(found[1]), int(found[2] or found[1])
    if last >= count:
        raise OwnershipInvalid(f"{where} names {what} {last}; the checkpoint has {what}s 0 to {count - 1}")
    if last < first:
        raise OwnershipInvalid(f"{where} has {text!r}, which ends before it begins")
    return range(first, last + 1)


def _check_kind(unit: Unit, kind: str) -> None:
    if kind == "owners":
        if unit.owner is None and unit.id != PUBLIC:
            raise OwnershipInvalid(f"unit {unit.id!r} has no owner: name one, or give its experts to {PUBLIC!r}")
        return
    said = {"owner": unit.owner, "licence": unit.licence, "grade": None if unit.grade == "unknown" else unit.grade}
    for name, value in said.items():
        if value is not None:
            raise OwnershipInvalid(
                f"unit {unit.id!r} has the {name} {value!r}, but ownership is 'none': leave {name} out, "
                "or set ownership to 'owners'"
            )


def _identity_maps(experts_L: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(bytes(range(count)) for count in experts_L)


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _unit_json(unit: Unit) -> dict[str, Any]:
    return {"id": unit.id, "owner": unit.owner, "domain": unit.domain, **dict(_stated(unit))}


def _stated(unit: Unit) -> Iterator[tuple[str, Any]]:
    if unit.licence is not None:
        yield "licence", unit.licence
    yield "grade", unit.grade
    if unit.required:
        yield "required", True
