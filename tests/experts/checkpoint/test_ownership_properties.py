"""Any ownership file is read as it was written, or refused in one line."""

import json
import re
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ownership_files import DENSE, LISTED, MAPPED, WHERE, read

from flexgate.experts.checkpoint.ownership import (
    GRADES,
    IDENTITY,
    MAX_UNITS,
    Ownership,
    Unit,
    parse_ownership,
)
from flexgate.experts.errors import OwnershipInvalid

names = st.from_regex(re.compile(f"{IDENTITY['owner']}", re.ASCII), fullmatch=True)
texts = st.from_regex(re.compile(IDENTITY["domain"]), fullmatch=True)


@st.composite
def ownerships(draw: st.DrawFn) -> Ownership:
    kind = draw(st.sampled_from(["owners", "none"]))
    count = draw(st.integers(1, MAX_UNITS))
    owned = kind == "owners"
    units = [
        Unit(
            "public" if number == 0 else f"u{number}",
            draw(names) if owned and (number or draw(st.booleans())) else None,
            draw(texts),
            draw(st.none() | st.just("MIT")) if owned else None,
            draw(st.sampled_from(GRADES)) if owned else "unknown",
            draw(st.booleans()),
        )
        for number in range(count)
    ]
    experts = draw(st.integers(max(1, count - 1), 80))
    layers = draw(st.lists(st.booleans(), max_size=6))
    all_of_them = [*range(1, count), *draw(st.lists(st.integers(0, count - 1), min_size=experts, max_size=experts))]
    maps = [bytes(draw(st.permutations(all_of_them[:experts])))]
    for dense in layers:
        again = draw(st.booleans())
        maps.append(b"" if dense else maps[0] if again else bytes(draw(st.permutations(all_of_them[:experts]))))
    return Ownership(tuple(units), tuple(maps), kind)


@given(ownerships())
def test_what_is_written_is_what_is_read(ownership: Ownership) -> None:
    written = json.loads(json.dumps(ownership.to_json()))
    experts_L = tuple(len(unit_E) for unit_E in ownership.unit_LE)
    assert parse_ownership(written, experts_L, WHERE) == ownership


@given(ownerships(), st.data())
def test_every_expert_has_exactly_one_unit(ownership: Ownership, data: st.DataObject) -> None:
    """The units' experts add up to each layer's; and no expert can be left out of the file."""
    experts_L = [len(unit_E) for unit_E in ownership.unit_LE]
    counts = [ownership.counts_L(unit) for unit in range(len(ownership.units))]
    assert [sum(of_layer) for of_layer in zip(*counts, strict=True)] == [count for count in experts_L if count]
    written = ownership.to_json()
    span = data.draw(st.sampled_from(sorted(written["layers"])))
    written["layers"][span].pop()
    with pytest.raises(OwnershipInvalid, match="must list the unit of each of the layer's"):
        parse_ownership(written, experts_L, WHERE)


def outcome(content: dict[str, Any]) -> Ownership | str:
    """What is read, or why it is refused."""
    try:
        return read(content)
    except OwnershipInvalid as error:
        return str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from([LISTED, MAPPED]), st.data())
def test_whatever_stands_anywhere_in_the_file_is_read_or_refused(form: dict[str, Any], data: st.DataObject) -> None:
    copy: Any = deepcopy(form)
    place, steps = copy, data.draw(st.integers(0, 3))
    for _ in range(steps):
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        inner = place[data.draw(st.sampled_from([*keys]))]
        if not isinstance(inner, dict | list) or not inner:
            break
        place = inner
    keys = sorted(place) if isinstance(place, dict) else range(len(place))
    place[data.draw(st.sampled_from([*keys]))] = data.draw(json_values)
    found = outcome(copy)
    if isinstance(found, str):
        assert found.startswith(WHERE)
        assert "\n" not in found
    else:
        assert parse_ownership(found.to_json(), DENSE, WHERE) == found
