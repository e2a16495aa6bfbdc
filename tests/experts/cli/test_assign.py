"""``flexgate experts assign``: writes one file, whole or not at all, and shows what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexgate.experts.checkpoint.families import FAMILIES
from flexgate.experts.checkpoint.ownership import parse_ownership
from flexgate.experts.cli.main import app
from flexgate.experts.io import output

RUNNER = CliRunner()
UNITS = """ownership: owners
units:
- {id: public, domain: base, experts: 0}
- {id: news, owner: gazette, domain: news, licence: CC-BY-4.0, grade: removed, experts: 1}
- {id: law, owner: chancery, domain: statutes, experts: [{layers: 0, experts: 2-3}, {layers: 2, experts: 3}]}
- {id: math, owner: academy, domain: math, experts: [{layers: 2, experts: 2}]}
"""
QWEN = {"model_type": "qwen2_moe", "num_hidden_layers": 3, "num_experts": 4, "mlp_only_layers": [1]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "units.yaml").write_text(UNITS)
    return folder


def run(*words: str | Path) -> str:
    result = RUNNER.invoke(app, ["assign", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*words: str | Path, status: int = 1) -> str:
    result = RUNNER.invoke(app, ["assign", *map(str, words)])
    assert result.exit_code == status
    assert result.stderr.startswith("error: ")
    return result.stderr


def written(model: Path) -> Any:
    return json.loads((model / "flexgate.json").read_text())


def test_what_is_written_is_shown_as_a_table(model: Path) -> None:
    shown = run(model, "--units", model.parent / "units.yaml")
    assert [line.split() for line in shown.splitlines()] == [
        ["unit", "id", "owner", "experts", "per", "layer", "grade", "licence", "domain"],
        ["0", "public", "1", "unknown", "unknown", "base"],
        ["1", "news", "gazette", "1", "removed", "CC-BY-4.0", "news"],
        ["2", "law", "chancery", "1-2", "unknown", "unknown", "statutes"],
        ["3", "math", "academy", "0-1", "unknown", "unknown", "math"],
        ["written:", str(model / "flexgate.json")],
    ]
    ownership = parse_ownership(written(model), (4, 0, 4), "flexgate.json")
    assert ownership.unit_LE == (bytes((0, 1, 2, 2)), b"", bytes((0, 1, 3, 2)))
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "flexgate.json"]


def test_json_has_the_same(model: Path) -> None:
    found = json.loads(run(model, "--units", model.parent / "units.yaml", "--json"))
    assert found["ownership"] == "owners"
    assert found["units"][2] == {
        "unit": 2,
        "id": "law",
        "owner": "chancery",
        "experts per layer": "1-2",
        "grade": "unknown",
        "licence": "unknown",
        "domain": "statutes",
    }


def test_a_file_that_is_there_is_replaced_only_if_asked(model: Path) -> None:
    (model / "flexgate.json").write_text("{}")
    said = refusal(model, "--units", model.parent / "units.yaml")
    assert said == f"error: {model}/flexgate.json exists already: give --force to replace it\n"
    assert written(model) == {}
    run(model, "--units", model.parent / "units.yaml", "--force")
    assert len(written(model)["units"]) == 4


def test_a_table_that_is_wrong_leaves_the_file_as_it_was(model: Path) -> None:
    (model / "flexgate.json").write_text("{}")
    (model.parent / "units.yaml").write_text(UNITS.replace("experts: 1}", "experts: []}"))
    said = refusal(model, "--units", model.parent / "units.yaml", "--force")
    assert "units.yaml gives expert 1 of layer 0 to no unit: name it under one" in said
    assert written(model) == {}


def test_a_disk_that_refuses_leaves_the_file_as_it_was(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "flexgate.json").write_text("{}")

    def full(descriptor: int, chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_all", full)
    assert "No space left on device" in refusal(model, "--units", model.parent / "units.yaml", "--force")
    assert written(model) == {}
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "flexgate.json"]


def test_mergekits_file_is_proposed_as_a_table_and_nothing_is_written(model: Path) -> None:
    experts = "".join(f"- source_model: {name}\n" for name in ("base", "ada/code", "bob/law", "ada/code"))
    (model / "mergekit_moe_config.yml").write_text(
        f"base_model: base\nexperts:\n{experts}shared_experts:\n- source_model: eve/shared\n"
    )
    table = run(model)
    assert "# In every answer, and in no unit: the shared expert, of eve/shared.\n" in table
    assert not (model / "flexgate.json").exists()
    (model.parent / "units.yaml").write_text(table)
    assert "unit 'code' has no owner" in refusal(model, "--units", model.parent / "units.yaml")
    (model.parent / "units.yaml").write_text(table.replace("owner: null", "owner: ada"))
    run(model, "--units", model.parent / "units.yaml")
    assert written(model)["layers"] == {"0": [0, 1, 2, 1], "2": [0, 1, 2, 1]}
    assert json.loads(run(model, "--json"))["units"][1]["experts"] == "1, 3"


def test_a_mergekit_file_of_another_model_is_refused_even_beside_a_table(model: Path) -> None:
    (model / "mergekit_moe_config.yml").write_text("base_model: b\nexperts:\n- source_model: a\n")
    said = refusal(model, "--units", model.parent / "units.yaml")
    assert "mergekit_moe_config.yml lists 1 experts, the checkpoint has 4: remove the file" in said


def test_without_anything_to_go_by_a_table_is_asked_for(model: Path) -> None:
    said = refusal(model, status=2)
    assert "--units: give the table of units" in said


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "llama"}, "names model_type 'llama', expected one of flex_olmo, olmoe, mixtral"),
        ({**QWEN, "num_experts": None}, "num_experts is None, expected 1 to 512"),
    ],
)
def test_a_model_that_is_not_known_is_refused(model: Path, config: dict[str, Any], sentence: str) -> None:
    (model / "config.json").write_text(json.dumps(config))
    assert sentence in refusal(model, "--units", model.parent / "units.yaml")


def test_what_cannot_be_read_is_refused(model: Path) -> None:
    assert "none.yaml cannot be read: No such file" in refusal(model, "--units", model.parent / "none.yaml")
    (model.parent / "units.yaml").write_text("#" * (1 << 20) + "\n")
    assert "units.yaml is larger than 1048576 bytes" in refusal(model, "--units", model.parent / "units.yaml")
    (model / "config.json").unlink()
    assert "config.json cannot be read: No such file" in refusal(model, "--units", model.parent / "units.yaml")


def test_the_help_names_every_kind_of_model() -> None:
    assert f"Kinds of models: {', '.join(FAMILIES)}." in RUNNER.invoke(app, ["assign", "--help"]).stdout
