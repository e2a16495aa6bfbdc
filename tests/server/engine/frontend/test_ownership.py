"""A server reads both forms of `flexgate.json` alike, and refuses what it would not gate, before vLLM is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from enginekit.checkpoints import Shape, write_random

from flexgate.experts.checkpoint.ownership import Grade, Ownership, Unit
from flexgate.experts.errors import LayoutError
from flexgate.experts.package.provenance import expert_entries, joint_manifest, strictly_separable
from flexgate.policies.decide import decide
from flexgate.policies.decision import DecisionRequest
from flexgate.policies.documents import Tenant
from flexgate.policies.store.store import Store
from flexgate.server.engine.frontend.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from flexgate.server.experts.versions import UNSAID, merged_versions
from flexgate.server.lifecycle.seed import prepare

IDENTITY = bytes(range(4))
UNITS = (
    Unit("public", None, "the base model"),
    Unit("news", "gazette", "news", "CC-BY-4.0", "removed"),
    Unit("law", "chancery", "law", grade="shared", required=True),
    Unit("math", "academy", "math"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("whole"), Shape(layers=2, experts=4))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def write(model: Path, content: dict[str, Any]) -> None:
    (model / "flexgate.json").write_text(json.dumps(content))


def entries(checkpoint: Checkpoint) -> list[tuple[str, str, str, bool]]:
    return [(unit.id, unit.owner or "public", unit.domain, unit.required) for unit in checkpoint.experts]


def test_a_checkpoint_without_the_file_has_a_unit_for_each_expert(model: Path) -> None:
    checkpoint = read_checkpoint(model)
    assert checkpoint.ownership.unit_LE == (IDENTITY, IDENTITY)
    assert entries(checkpoint) == [
        (name, "unknown", "unknown", False) for name in ("public", "expert-1", "expert-2", "expert-3")
    ]


def test_both_forms_give_the_catalogue_the_same_experts(model: Path) -> None:
    listed = [
        {"id": "public", "owner": "public", "domain": "the base model"},
        {"id": "news", "owner": "gazette", "domain": "news", "licence": "CC-BY-4.0", "grade": "removed"},
        {"id": "law", "owner": "chancery", "domain": "law", "grade": "shared", "required": True},
        {"id": "math", "owner": "academy", "domain": "math"},
    ]
    write(model, {"experts": listed})
    one = read_checkpoint(model)
    write(model, Ownership(UNITS, (IDENTITY, IDENTITY)).to_json())
    two = read_checkpoint(model)
    assert entries(one) == entries(two)
    assert one.ownership.units[1:] == two.ownership.units[1:]
    assert one.ownership.unit_LE == two.ownership.unit_LE == (IDENTITY, IDENTITY)
    ids = [unit.id for unit in UNITS]
    assert merged_versions(model, ids) == dict.fromkeys(ids, UNSAID)


def test_a_unit_of_several_experts_is_served_and_is_no_package(model: Path) -> None:
    unit_LE = bytes((0, 1, 2, 2)), bytes((1, 2, 0, 0))
    write(model, Ownership(UNITS[:3], unit_LE).to_json())
    checkpoint = read_checkpoint(model)
    assert (checkpoint.experts, checkpoint.ownership.unit_LE) == (UNITS[:3], unit_LE)
    ids = [unit.id for unit in checkpoint.experts]
    assert merged_versions(model, ids) == dict.fromkeys(ids, UNSAID)
    with pytest.raises(LayoutError, match=r"flexgate.json gives several experts to a unit; packages hold one expert"):
        expert_entries(model, 4)


def test_units_of_a_model_without_owners_are_gated_by_projects_lists_alone(model: Path, tmp_path: Path) -> None:
    units = tuple(Unit(unit.id, None, unit.domain) for unit in UNITS)
    write(model, Ownership(units, (IDENTITY, IDENTITY), "none").to_json())
    store = Store.open(f"sqlite:///{tmp_path / 'policy.db'}")
    prepare(store, read_checkpoint(model).experts, epoch=1, at=1.0)
    with store.change(actor="test", at=2.0) as change:
        change.put(Tenant(id="new", name="new"))
        change.put(Tenant(id="law", name="law", expert_ids=frozenset({"law"})))
        change.put(Tenant(id="rest", name="rest", mode="deny_list", expert_ids=frozenset({"law"})))
    snapshot = store.snapshot()
    store.close()
    allowed = {who: decide(snapshot, who, DecisionRequest(decision_id="d"), 3.0).allowed for who in snapshot.tenants}
    assert allowed == {"new": ("public",), "law": ("public", "law"), "rest": ("public", "news", "math")}


def test_the_catalogue_knows_which_layers_a_unit_is_in(model: Path, tmp_path: Path) -> None:
    write(model, Ownership(UNITS[:3], (bytes((0, 1, 1, 1)), bytes((0, 2, 2, 2)))).to_json())
    store = Store.open(f"sqlite:///{tmp_path / 'policy.db'}")
    checkpoint = read_checkpoint(model)
    prepare(store, checkpoint.experts, epoch=1, at=1.0, ownership=checkpoint.ownership)
    snapshot = store.snapshot()
    store.close()
    assert snapshot.empty_layers == {UNITS[1].id: {1}, UNITS[2].id: {0}}


def test_a_file_that_does_not_fit_the_weights_is_refused(model: Path) -> None:
    write(model, Ownership(UNITS, (IDENTITY,) * 3).to_json())
    with pytest.raises(CheckpointError, match="names layer 2; the checkpoint has layers 0 to 1"):
        read_checkpoint(model)


def test_units_whose_routers_are_trained_together_are_no_longer_removed(model: Path) -> None:
    """No grade that the tools write after that promises more than is true."""
    write(model, Ownership(UNITS, (IDENTITY, IDENTITY)).to_json())
    assert strictly_separable(model) is False
    write(model, joint_manifest(model, {}, 4))
    units = read_checkpoint(model).ownership.units
    assert [unit.grade for unit in units] == ["unknown", "router", "shared", "unknown"]
    assert units[1] == Unit("news", "gazette", "news", "CC-BY-4.0", "router")


@pytest.mark.parametrize(("grade", "separable"), [("removed", True), ("router", False), ("unknown", None)])
def test_a_model_is_strictly_separable_if_every_unit_is_removed_whole(
    model: Path, grade: Grade, separable: bool | None
) -> None:
    units = (UNITS[0], *(replace(unit, grade="removed") for unit in UNITS[1:3]), replace(UNITS[3], grade=grade))
    write(model, Ownership(units, (IDENTITY, IDENTITY)).to_json())
    assert strictly_separable(model) is separable
