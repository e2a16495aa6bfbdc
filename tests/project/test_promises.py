"""No promise loses its test: the pages' tables, `promises.toml`, the planted defects and what pytest collects agree."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = tomllib.loads(Path(__file__).with_name("promises.toml").read_text())["promise"]
DEFECTS = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "tests/defects").glob("*.toml")}


PAGES = ["README.md", "docs/threat-model.md"]


def rows_of(page: str) -> dict[str, str]:
    """Each promise and the file or folder that holds it; "the same" is that of the row before."""
    table = (ROOT / page).read_text().split("| Promise | Held by |\n|---|---|\n")[1].split("\n\n")[0]
    rows, place = {}, ""
    for promise, held_by in re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE):
        place = place if held_by == "the same" else held_by.strip("`")
        rows[promise] = place
    return rows


@pytest.mark.parametrize("page", PAGES)
def test_every_promise_of_a_page_is_held_by_tests_of_the_place_that_it_names(page: str) -> None:
    rows = rows_of(page)
    promises = [promise for promise in PROMISES if promise.get("page", "README.md") == page]
    assert list(rows) == [promise["sentence"] for promise in promises]
    for promise in promises:
        place = rows[promise["sentence"]]
        assert any(test.startswith(place) for test in promise["tests"]), promise["sentence"]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["sentence"])
def test_each_planted_defect_of_a_promise_is_noticed_by_one_of_its_tests(promise: dict[str, list[str]]) -> None:
    assert promise["defects"]
    for name in promise["defects"]:
        noticed_by = {test.partition("[")[0] for test in DEFECTS[name]["tests"]}
        assert noticed_by & set(promise["tests"]), name


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["sentence"])
def test_the_tests_of_a_promise_are_defined_where_it_says(promise: dict[str, list[str]]) -> None:
    for test in promise["tests"]:
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test


@pytest.mark.slow
def test_every_test_of_a_promise_or_a_defect_is_collected() -> None:
    named = {test for promise in PROMISES for test in promise["tests"]}
    named |= {test for defect in DEFECTS.values() for test in defect["tests"]}
    files = sorted({test.split("::")[0] for test in named})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "400"},
        capture_output=True,
        text=True,
    )
    collected = {line for line in done.stdout.splitlines() if "::" in line}
    collected |= {test.partition("[")[0] for test in collected}
    assert sorted(named - collected) == []
