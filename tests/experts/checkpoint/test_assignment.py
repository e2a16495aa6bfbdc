"""A table of units makes the ownership that it says, and names each expert of each layer exactly once."""

import inspect
import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgate.experts.checkpoint.assignment import parse_assignment
from flexgate.experts.checkpoint.mergekit import parse_mergekit, propose
from flexgate.experts.checkpoint.ownership import Ownership, Unit, parse_ownership
from flexgate.experts.cli.assign import assign
from flexgate.experts.errors import OwnershipInvalid
from flexgate.experts.io.strict_yaml import dump_yaml, parse_yaml

WHERE = "units.yaml"
DENSE = (8, 0, 8, 8)
TABLE = """
ownership: owners
units:
- {id: public, domain: the base model, experts: 0}
- {id: news, owner: gazette, domain: news, licence: CC-BY-4.0, grade: removed, experts: 1-3}
- id: law
  owner: chancery
  domain: statutes
  required: true
  experts:
  - {layers: 0-1, experts: "4, 6-7"}
  - {layers: [2, 3], experts: 4-7}
- id: math
  owner: academy
  domain: math
  experts: [{layers: 0, experts: 5}]
"""


def made(table: str, experts_L: tuple[int, ...] = DENSE) -> Ownership:
    return parse_assignment(parse_yaml(table.encode(), WHERE, OwnershipInvalid), experts_L, WHERE)


def test_a_table_says_whose_each_expert_of_each_layer_is() -> None:
    ownership = made(TABLE)
    assert ownership.unit_LE == (
        bytes((0, 1, 1, 1, 2, 3, 2, 2)),
        b"",
        *[bytes((0, 1, 1, 1, 2, 2, 2, 2))] * 2,
    )
    assert ownership.units == (
        Unit("public", None, "the base model"),
        Unit("news", "gazette", "news", "CC-BY-4.0", "removed"),
        Unit("law", "chancery", "statutes", required=True),
        Unit("math", "academy", "math"),
    )
    assert ownership.kind == "owners"


def test_the_page_and_the_help_show_a_table_that_is_one() -> None:
    page = Path(__file__).parents[3] / "docs" / "ownership.md"
    table = page.read_text().partition("```yaml\n")[2].partition("```")[0]
    assert [unit.id for unit in made(table, (8,) * 32).units] == ["public", "news", "law", "math"]
    shown = inspect.getdoc(assign) or ""
    assert dedent(shown.partition("\b\n")[2].partition("\n\n")[0]).strip() == table.strip()


def test_the_page_shows_the_short_form_that_a_server_reads() -> None:
    page = Path(__file__).parents[3] / "docs" / "ownership.md"
    content = json.loads(page.read_text().partition("```json\n")[2].partition("```")[0])
    units = parse_ownership(content, (2, 2), "flexgate.json").units
    assert [(unit.id, unit.owner, unit.grade) for unit in units] == [
        ("public", "foundation", "unknown"),
        ("news", "gazette", "removed"),
    ]


def test_a_model_without_owners_has_units_that_can_be_gated() -> None:
    units = "- {id: public, domain: '', experts: 0-5}\n- {id: code, domain: code, experts: 6-7}"
    ownership = made(f"ownership: none\nunits:\n{units}")
    assert ownership.kind == "none"
    assert ownership.counts_L(1) == [2, 2, 2]


NEWS = "- {id: news, owner: gazette, domain: news, licence: CC-BY-4.0, grade: removed, experts: 1-3}"
REFUSED: dict[str, tuple[str, str, str]] = {
    "an expert of two units": (
        "experts: 1-3}",
        "experts: 0-3}",
        "units[1] names expert 0 of layer 0, which 'public' has already",
    ),
    "an expert of two units in one layer": (
        "{layers: 0, experts: 5}",
        "{layers: 2, experts: 5}",
        "units[3] names expert 5 of layer 2, which 'law' has already",
    ),
    "an expert twice in one unit": ("experts: 1-3}", "experts: [1-3, 2]}", "units[1] names expert 2 twice"),
    "a layer twice in one part": ("layers: [2, 3]", "layers: [2, 2-3]", "units[2] names layer 2 twice"),
    "the same part twice": (
        "- {layers: [2, 3], experts: 4-7}",
        "- {layers: [2, 3], experts: 4-7}\n  - {layers: 3, experts: 4}",
        "units[2] names expert 4 of layer 3, which 'law' has already",
    ),
    "an expert of no unit": (
        "experts: 1-3}",
        "experts: 2-3}",
        "gives expert 1 of layer 0 to no unit: name it under one, or under 'public' if every request may use it",
    ),
    "an expert of no unit in one layer": (
        "layers: [2, 3]",
        "layers: [3]",
        "gives expert 4 of layer 2 to no unit: name it under one, or under 'public' if every request may use it",
    ),
    "an expert that there is not": (
        "experts: 1-3}",
        "experts: 1-8}",
        "units[1] names expert 8; the checkpoint has experts 0 to 7",
    ),
    "a layer that there is not": (
        "layers: [2, 3]",
        "layers: [2, 4]",
        "units[2] names layer 4; the checkpoint has layers 0 to 3",
    ),
    "no number": (
        "experts: 1-3}",
        "experts: one}",
        "units[1] has 'one', expected numbers of experts, such as '3' or '0-15'",
    ),
    "no text": ("experts: 1-3}", "experts: [true]}", "units[1]: True names no expert: write 3 or 0-15"),
    "a part without experts": (
        "{layers: 0, experts: 5}",
        "{layers: 0}",
        "units[3]: experts has {'layers': 0}, expected 'layers' and 'experts'",
    ),
    "numbers beside parts": (
        "[{layers: 0, experts: 5}]",
        "[{layers: 0, experts: 5}, 5]",
        "units[3]: experts has 5, expected 'layers' and 'experts'",
    ),
    "no experts": (
        ", experts: 1-3}",
        "}",
        "units[1] has no 'experts': name them, such as 0 or 1-3, or [] if 'public' has none",
    ),
    "a unit without experts": (
        NEWS,
        NEWS.replace("1-3", "[]"),
        "gives expert 1 of layer 0 to no unit: name it under one, or under 'public' if every request may use it",
    ),
    "an unknown field": (
        "licence: CC",
        "license: CC",
        "units[1] has 'license', which is not a field of a unit: remove it",
    ),
    "an unknown kind": (
        "ownership: owners",
        "ownership: yes",
        "ownership is 'yes', expected 'owners' or 'none'",
    ),
    "an unknown table": (
        "ownership: owners",
        "ownership: owners\nlayers: 4",
        "must have 'ownership' and 'units', and nothing else",
    ),
    "no owner": ("owner: gazette, ", "", "unit 'news' has no owner: name one, or give its experts to 'public'"),
    "owners of a model without": (
        "ownership: owners",
        "ownership: none",
        "unit 'news' has the owner 'gazette', but ownership is 'none': leave owner out, or set ownership to 'owners'",
    ),
    "an alias": ("experts: 1-3}", "experts: &a 1-3, required: *a}", "aliases are not supported: write the value out"),
    "a key twice": ("experts: 1-3}", "experts: 1, experts: 2}", "'experts' is given twice"),
}


@pytest.mark.parametrize(("find", "replace", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_a_table_that_leaves_an_expert_open_is_refused(find: str, replace: str, sentence: str) -> None:
    assert TABLE.count(find) == 1
    with pytest.raises(OwnershipInvalid) as refused:
        made(TABLE.replace(find, replace))
    message = str(refused.value)
    assert message.startswith(WHERE)
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize("table", ["", "- a", "ownership: owners", "ownership: owners\nunits: {}", "units: []"])
def test_what_is_no_table_is_refused(table: str) -> None:
    with pytest.raises(OwnershipInvalid, match=WHERE):
        made(table)


def test_more_units_than_a_gate_has_bits_are_refused() -> None:
    units = "".join(f"- {{id: u{n}, owner: o, domain: '', experts: {n}}}\n" for n in range(65))
    with pytest.raises(OwnershipInvalid, match=r"lists 65 units; a gate names at most 64"):
        made(f"ownership: owners\nunits:\n{units}", (65,))


@given(st.data(), st.integers(1, 12), st.integers(1, 6), st.integers(1, 8))
def test_any_map_can_be_written_as_a_table_and_none_with_a_hole(
    data: st.DataObject, count: int, experts: int, layers: int
) -> None:
    """Each expert of each layer as an entry of its own; then one of them is left out, or named a second time."""
    number = st.integers(0, count - 1)
    maps = [data.draw(st.lists(number, min_size=experts, max_size=experts)) for _ in range(layers)]
    used = sorted({0, *(unit for unit_E in maps for unit in unit_E)})
    parts: list[list[dict[str, Any]]] = [[] for _ in used]
    for layer, unit_E in enumerate(maps):
        for expert, unit in enumerate(unit_E):
            parts[used.index(unit)].append({"layers": layer, "experts": str(expert)})
    units = [
        {"id": f"u{n}" if n else "public", "owner": "o", "domain": "", "experts": part} for n, part in enumerate(parts)
    ]
    table = {"ownership": "owners", "units": units}
    experts_L = (experts,) * layers
    ownership = parse_assignment(table, experts_L, WHERE)
    assert [[used[unit] for unit in unit_E] for unit_E in ownership.unit_LE] == maps
    assert parse_ownership(ownership.to_json(), experts_L, WHERE) == ownership
    changed = data.draw(st.sampled_from([part for part in parts if part]))
    left_out = changed.pop(data.draw(st.integers(0, len(changed) - 1)))
    hole = f"gives expert {left_out['experts']} of layer {left_out['layers']} to no unit"
    with pytest.raises(OwnershipInvalid, match=hole):
        parse_assignment(table, experts_L, WHERE)
    changed.append(left_out)
    data.draw(st.sampled_from(parts)).append(left_out)
    with pytest.raises(OwnershipInvalid, match="has already"):
        parse_assignment(table, experts_L, WHERE)


MERGEKIT = """
base_model: base/Model-7B
gate_mode: hidden # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
experts:
  - source_model: base/Model-7B
    positive_prompts: ["chat"]
  - source_model: ada/Code_7B.v1
    positive_prompts: ["code"]
    negative_prompts: []
  - source_model: {model: {path: bob/law, revision: v2}, lora: bob/adapter}
  - source_model: ada/Code_7B.v1
  - source_model: ../local/code-7b-v1/
"""


def sources(text: str, experts_L: tuple[int, ...] = (5, 5)) -> Any:
    return parse_mergekit(parse_yaml(text.encode(), "m.yml", OwnershipInvalid), experts_L, "m.yml")


def test_mergekits_own_file_proposes_a_unit_for_each_source() -> None:
    found = sources(MERGEKIT)
    assert found.base == "base/Model-7B"
    assert found.experts[2] == "bob/law@v2+bob/adapter"
    table = propose(found)
    assert [(unit["id"], unit["domain"], unit["experts"]) for unit in table["units"]] == [
        ("public", "base/Model-7B", 0),
        ("code-7b-v1", "ada/Code_7B.v1", "1, 3"),
        ("law", "bob/law@v2+bob/adapter", 2),
        ("code-7b-v1-2", "../local/code-7b-v1/", 4),
    ]
    assert {(unit["owner"], unit["licence"], unit["grade"]) for unit in table["units"][1:]} == {(None, None, "unknown")}


def test_a_proposal_is_no_answer_to_whose_an_expert_is() -> None:
    """Its owners are to be filled in; then it is a table like any other."""
    text = dump_yaml(propose(sources(MERGEKIT)))
    with pytest.raises(OwnershipInvalid, match="unit 'code-7b-v1' has no owner: name one"):
        made(text, (5, 5))
    filled = made(text.replace("owner: null", "owner: someone"), (5, 5))
    assert filled.unit_LE == (bytes((0, 1, 2, 1, 3)),) * 2
    assert filled.units[1].licence is None


def test_a_mixture_without_an_expert_of_its_base_has_an_empty_common_unit() -> None:
    table = propose(sources("base_model: base\nexperts:\n- source_model: a/x\n- source_model: b/public", (2,)))
    assert [(unit["id"], unit["experts"]) for unit in table["units"]] == [("public", []), ("x", 0), ("public-2", 1)]


def edited(find: str, replace: str) -> str:
    assert MERGEKIT.count(find) == 1
    return MERGEKIT.replace(find, replace)


LAST = "../local/code-7b-v1/"
NO_NAME = "expected the name of a model"
FOREIGN: dict[str, tuple[str, str]] = {
    "another number": (edited(f"  - source_model: {LAST}\n", ""), "m.yml lists 4 experts, the checkpoint has 5"),
    "another tool's": ("models: []", "m.yml is not mergekit's: it has no list of experts"),
    "no base": (edited("base_model", "base"), f"base_model is None, {NO_NAME}"),
    "no source": (edited("source_model: {model", "source: {model"), f"experts[2]: source_model is None, {NO_NAME}"),
    "no model": (edited("{model: {path: bob", "{x: {path: bob"), "experts[2]: source_model is {'x': {'path'"),
    "no path": (edited("{path: bob", "{x: bob"), "experts[2]: source_model is {'model': {'x'"),
    "no text": (edited(LAST, "7"), f"experts[4]: source_model is 7, {NO_NAME}"),
    "an empty name": (edited("bob/adapter", "''"), NO_NAME),
    "lines in a name": (edited(LAST, '"a\\nowner: b"'), "with characters that no model's name has"),
    "a long name": (edited("../local", "x" * 200), NO_NAME),
    "shared experts that are none": (MERGEKIT + "shared_experts: 3", "shared_experts must be a list"),
    "no object": (MERGEKIT + "shared_experts: [3]", "shared_experts[0] has no source_model"),
}


@pytest.mark.parametrize(("text", "sentence"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_mergekit_file_that_does_not_fit_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(OwnershipInvalid) as refused:
        sources(text)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
