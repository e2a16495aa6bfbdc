"""The questions of `rooms.toml` have answers that exist, and the script that scores a reader counts them."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flexgate_rooms", Path(__file__).with_name("rooms.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_answer_is_a_file_that_defines_what_does_it(program: Any) -> None:
    rooms = program.rooms()
    assert len({room["path"] for room in rooms}) == len(rooms) == 10
    for room in rooms:
        tree = ast.parse((ROOT / room["path"]).read_text())
        defined = [getattr(node, "target", node) for node in tree.body]
        names = {getattr(node, "name", None) or getattr(node, "id", None) for node in defined}
        assert room["symbol"] in names, room["path"]


@pytest.mark.parametrize(("wrong", "status"), [(0, 0), (1, 0), (2, 1)])
def test_a_reader_who_finds_nine_of_ten_passes(
    program: Any, wrong: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guesses = [room["path"] for room in program.rooms()]
    guesses[:wrong] = ["server/elsewhere.py"] * wrong
    file = tmp_path / "guesses"
    file.write_text("\n".join(guesses))
    assert program.main([str(file)]) == status
    assert f"{10 - wrong} of 10 found" in capsys.readouterr().out


def test_a_list_of_another_length_is_refused(program: Any) -> None:
    with pytest.raises(ValueError, match="3 guesses for 10 questions"):
        program.misses(["a", "b", "c"])
