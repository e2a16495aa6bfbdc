"""Whose experts a checkpoint holds: both forms of the file, round trips, and a sentence for each refusal."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
from ownership_files import LISTED, MAPPED, WHERE, read

from flexgate.experts.checkpoint.ownership import (
    GRADES,
    MAX_UNITS,
    OWNERSHIP_NAME,
    Ownership,
    Unit,
    parse_ownership,
    unnamed,
)
from flexgate.experts.errors import OwnershipInvalid
from flexgate.kernels import gated_topk
from flexgate.policies import documents


def test_a_list_of_experts_is_a_unit_for_each_index() -> None:
    ownership = read(LISTED)
    assert ownership.is_identity is False, "a layer has no experts"
    assert ownership.unit_LE == (bytes(range(4)), b"", bytes(range(4)), bytes(range(4)))
    assert read(LISTED, (4, 4)).is_identity
    assert ownership.kind == "owners"
    assert ownership.units == (
        Unit("public", "public", "all"),
        Unit("news", "gazette", "news", grade="removed"),
        Unit("law", "chancery", "law", grade="router", required=True),
        Unit("math", "academy", "", licence="CC-BY-4.0", grade="shared"),
    )


def test_a_unit_has_the_experts_that_each_layer_says() -> None:
    ownership = read(MAPPED)
    assert ownership.unit_LE == (bytes((0, 1, 1, 2)), b"", bytes((2, 1, 0, 0)), bytes((2, 1, 0, 0)))
    assert [ownership.counts_L(unit) for unit in range(3)] == [[1, 2, 2], [2, 1, 1], [1, 1, 1]]
    assert ownership.units == (
        Unit("public", None, "the base model"),
        Unit("news", "gazette", "news", "CC-BY-4.0", "removed"),
        Unit("law", "chancery", "law", required=True),
    )


@pytest.mark.parametrize("content", [LISTED, MAPPED])
def test_a_checkpoint_states_the_grades_of_units_that_it_no_longer_has(content: dict[str, Any]) -> None:
    ownership = read({**content, "former_units": {"chem": "removed", "bio": "shared"}})
    assert ownership.former_units == {"chem": "removed", "bio": "shared"}
    assert read(ownership.to_json()).former_units == ownership.former_units


def test_the_common_unit_may_be_empty() -> None:
    content = {**MAPPED, "layers": {"0": [1, 1, 1, 2], "2-3": [2, 1, 1, 2]}}
    assert read(content).counts_L(0) == [0, 0, 0]


def test_without_a_file_each_expert_is_a_unit_of_an_unknown_owner() -> None:
    ownership = unnamed((3, 3))
    assert [unit.id for unit in ownership.units] == ["public", "expert-1", "expert-2"]
    assert {(unit.owner, unit.domain, unit.grade) for unit in ownership.units} == {("unknown", "unknown", "unknown")}
    assert ownership.is_identity
    with pytest.raises(OwnershipInvalid, match=r"a layer has 65 experts and .* at most 64 units: write down whose"):
        unnamed((65,))


def edited(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy in which `units.1.owner`, say, has another value; `...` removes it."""
    copy = deepcopy(content)
    *parents, last = path.split(".")
    place: Any = copy
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return copy


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither form": ({"ownership": "owners"}, " must have either 'experts' or 'units'"),
    "both forms": ({**LISTED, **MAPPED}, " must have either 'experts' or 'units'"),
    "format of the other form": (
        {**LISTED, "format": "flexgate-model/2"},
        ": format is 'flexgate-model/2', expected 'flexgate-model/1' with 'experts'",
    ),
    "unknown format": (
        {**MAPPED, "format": "flexgate-model/3"},
        ": format is 'flexgate-model/3', expected 'flexgate-model/2' with 'units'",
    ),
    "no list of experts": (edited(LISTED, "experts", {}), " must list the checkpoint's 4 experts"),
    "too few experts": (edited(LISTED, "experts.3", ...), " must list the checkpoint's 4 experts"),
    "no object": (edited(LISTED, "experts.3", "math"), ": experts[3] must be an object with id, owner and domain"),
    "expert without an owner": (
        edited(LISTED, "experts.1.owner", ...),
        ": experts[1] has no owner, expected 1 to 63 characters from A-Z, a-z, 0-9, '.', '_' and '-', "
        "beginning with a letter or digit",
    ),
    "id that no policy can name": (
        edited(LISTED, "experts.1.id", "News"),
        ": experts[1]: id is 'News', expected 1 to 63 characters from a-z, 0-9 and '-', beginning with a letter "
        "or digit",
    ),
    "required that is no truth value": (
        edited(LISTED, "experts.1.required", "no"),
        ": experts[1]: 'required' of 'news' must be true or false",
    ),
    "another first expert": (edited(LISTED, "experts.0.id", "base"), ": expert 0 must be 'public'"),
    "an expert twice": (edited(LISTED, "experts.2.id", "news"), ": expert ids must be distinct"),
    "an index elsewhere": (
        edited(LISTED, "experts.2.index", 1),
        ": experts[2]: index is 1, and it stands at 2",
    ),
    "an index that is no number": (
        edited(LISTED, "experts.1.index", True),
        ": experts[1]: index is True, and it stands at 1",
    ),
    "owners of an unowned model": (
        {**LISTED, "ownership": "none"},
        ": ownership is 'none', and 'experts' names owners",
    ),
    "removed whole in spite of a joint router": (
        edited(LISTED, "experts.2.grade", "removed"),
        ": experts[2]: grade is 'removed', but router is 'joint': "
        "only an expert whose router is its 'own' is removed whole",
    ),
    "unknown field": ({**MAPPED, "layer": {}}, " has 'layer', which is not a field of it: remove it"),
    "former units that are no object": (
        {**MAPPED, "former_units": ["math"]},
        ": former_units must be an object of units' ids and grades, such as {'news': 'removed'}",
    ),
    "former unit that is there": (
        {**MAPPED, "former_units": {"law": "removed"}},
        ": former_units names unit 'law', which the checkpoint has: remove it there",
    ),
    "former unit of no grade": (
        {**MAPPED, "former_units": {"math": "gone"}},
        ": former_units: grade of 'math' is 'gone', expected one of removed, router, shared, unknown",
    ),
    "former unit that no policy can name": (
        {**MAPPED, "former_units": {"Math": "removed"}},
        ": former_units has 'Math', expected 1 to 63 characters from a-z, 0-9 and '-', beginning with a letter "
        "or digit",
    ),
    "no ownership": (
        edited(MAPPED, "ownership", ...),
        ": ownership is None, expected 'owners' or 'none'",
    ),
    "no list of units": (edited(MAPPED, "units", {}), ": units must be a list"),
    "no units": (
        edited(MAPPED, "units", []),
        ": there are 0 units: a gate names 1 to 64, the common one included",
    ),
    "more units than a gate has bits": (
        edited(MAPPED, "units", [{}] * 65),
        " lists 65 units; a gate names at most 64",
    ),
    "unknown field of a unit": (
        edited(MAPPED, "units.1.license", "MIT"),
        ": units[1] has 'license', which is not a field of a unit: remove it",
    ),
    "unit without a domain": (
        edited(MAPPED, "units.1.domain", ...),
        ": units[1] has no domain, expected a string of at most 200 characters, none of them a control character",
    ),
    "unit without an owner": (
        edited(MAPPED, "units.1.owner", None),
        ": unit 'news' has no owner: name one, or give its experts to 'public'",
    ),
    "owner that no policy can name": (
        edited(MAPPED, "units.1.owner", "the gazette"),
        ": units[1]: owner is 'the gazette', expected 1 to 63 characters from A-Z, a-z, 0-9, '.', '_' and '-', "
        "beginning with a letter or digit",
    ),
    "licence that is no text": (
        edited(MAPPED, "units.1.licence", ["MIT"]),
        ": units[1]: licence is ['MIT'], expected a string of 1 to 200 characters, none of them a control character",
    ),
    "grade that there is not": (
        edited(MAPPED, "units.1.grade", "none"),
        ": units[1]: grade is 'none', expected one of removed, router, shared, unknown",
    ),
    "unit without an expert": (
        edited(MAPPED, "layers", {"0": [0, 1, 1, 0], "2-3": [0, 1, 0, 0]}),
        ": unit 'law' has no expert in any layer, so that excluding it would exclude nothing: "
        "give it its experts, or leave it out",
    ),
    "two units of one id": (
        edited(MAPPED, "units.2.id", "news"),
        ": two units have the id 'news': give each its own",
    ),
    "first unit that is not common": (
        edited(MAPPED, "units.0.id", "base"),
        ": unit 0 must be 'public', the common one, and is 'base': list it first",
    ),
    "unknown unit": (edited(MAPPED, "layers.0", [0, 1, 3, 2]), ": layer 0 names unit 3; units are 0 to 2"),
    "unit that no gate can name": (
        edited(MAPPED, "layers.0", [0, 1, 64, 2]),
        ": layers['0']: expert 2 has unit 64, expected 0 to 63",
    ),
    "negative unit": (
        edited(MAPPED, "layers.0", [0, 1, -1, 2]),
        ": layers['0']: expert 2 has unit -1, expected 0 to 63",
    ),
    "unit that is no number": (
        edited(MAPPED, "layers.0", [0, 1, True, 2]),
        ": layers['0']: expert 2 has unit True, expected 0 to 63",
    ),
    "an expert without a unit": (
        edited(MAPPED, "layers.2-3", [2, 1, 0]),
        ": layers['2-3'] must list the unit of each of the layer's 4 experts",
    ),
    "an expert too many": (
        edited(MAPPED, "layers.2-3", [2, 1, 0, 0, 0]),
        ": layers['2-3'] must list the unit of each of the layer's 4 experts",
    ),
    "experts of a layer without": (
        {**MAPPED, "layers": {"0-3": [0, 1, 1, 2]}},
        ": layers['0-3'] must list the unit of each of the layer's 0 experts",
    ),
    "no layers": (edited(MAPPED, "layers", ...), ": layers must be an object such as {'0-3': [0, 1, 1]}"),
    "a layer that is not named": (
        {**MAPPED, "layers": {"0": [0, 1, 1, 2], "2": [2, 1, 0, 0]}},
        ": layers does not name layer 3, which has 4 experts",
    ),
    "a layer that is named twice": (
        {**MAPPED, "layers": {**MAPPED["layers"], "3": [2, 1, 0, 0]}},
        ": layers names layer 3 twice",
    ),
    "a layer that there is not": (
        {**MAPPED, "layers": {"0": [0, 1, 1, 2], "2-4": [2, 1, 0, 0]}},
        ": layers names layer 4; the checkpoint has layers 0 to 3",
    ),
    "a span that ends first": (
        {**MAPPED, "layers": {"3-2": [2, 1, 0, 0]}},
        ": layers has '3-2', which ends before it begins",
    ),
    "a layer that is no number": (
        {**MAPPED, "layers": {"all": [2, 1, 0, 0]}},
        ": layers has 'all', expected numbers of layers, such as '3' or '0-15'",
    ),
    "an owner where there are none": (
        {**MAPPED, "ownership": "none"},
        ": unit 'news' has the owner 'gazette', but ownership is 'none': leave owner out, or set ownership to 'owners'",
    ),
}


@pytest.mark.parametrize(("content", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_gated_as_it_says_is_refused(content: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OwnershipInvalid) as refused:
        read(content)
    assert str(refused.value) == WHERE + sentence


@pytest.mark.parametrize(("name", "value"), [("owner", "gazette"), ("licence", "MIT"), ("grade", "removed")])
def test_a_model_that_is_not_owned_promises_no_rights(name: str, value: str) -> None:
    """A licence or a grade of such a unit would say that excluding it excludes an owner's data."""
    content = {**MAPPED, "ownership": "none", "units": [{"id": "public", "domain": ""}, {"id": "code", "domain": ""}]}
    content["layers"] = {"0-3": [0, 0, 1, 1]}
    assert read(content, (4, 4, 4, 4)).kind == "none"
    content["units"][1][name] = value
    with pytest.raises(OwnershipInvalid, match=rf"unit 'code' has the {name} '{value}', but ownership is 'none'"):
        read(content, (4, 4, 4, 4))


def test_what_reads_the_file_is_not_asked_to_check_it_again() -> None:
    """No `Ownership` names a unit that there is not: its expert would have a bit that no agreement stands for."""
    units = (Unit("public", None, ""), Unit("news", "gazette", ""))
    with pytest.raises(OwnershipInvalid, match="layer 1 names unit 2; units are 0 to 1"):
        Ownership(units, (bytes((0, 1)), bytes((1, 2))))


def test_units_are_those_that_a_gate_can_name() -> None:
    assert gated_topk.MAX_UNITS == MAX_UNITS


def test_grades_are_those_of_the_catalogue() -> None:
    assert get_args(documents.Grade) == GRADES


def test_the_file_that_ships_with_the_demo_is_read() -> None:
    path = Path(__file__).parents[3] / "experts/demo/checkpoint" / OWNERSHIP_NAME
    ownership = parse_ownership(json.loads(path.read_text()), (5,) * 4, str(path))
    assert ownership.is_identity
    assert [unit.grade for unit in ownership.units] == ["unknown", *["removed"] * 4]
