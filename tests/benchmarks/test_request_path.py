"""How a request's path is counted, and that the architecture page shows what was measured."""

import json
from pathlib import Path

import pytest
from request_path.__main__ import BEGIN, END, PAGE, RESULT
from request_path.path import MOST_MOVES, ROOT, Part, Route, lines, lines_read, read, table

GUARD = ("server/engine/core/guard.py", "EngineGuard.__call__")
IDENTIFY = ("server/http/auth.py", "identify")
REQUIRE = ("server/http/auth.py", "require_tenant")
PATH_OF = ("server/http/errors.py", "path_of")
MASK = ("server/http/errors.py", "mask")


def test_a_move_is_a_function_read_in_another_file_than_the_one_before() -> None:
    part = Part((IDENTIFY, REQUIRE, PATH_OF, REQUIRE, IDENTIFY, MASK))
    assert part.files == (IDENTIFY[0], PATH_OF[0])
    assert (part.moves, part.jumps) == (1, 3)
    assert part.to_json()["reading"] == [[IDENTIFY[0], "identify", "require_tenant"], [PATH_OF[0], "path_of", "mask"]]


def test_lines_of_functions_are_counted_once_with_what_is_inside_of_them() -> None:
    file = "server/http/offload.py"
    text = (ROOT / file).read_text().splitlines()
    first = next(number for number, line in enumerate(text) if line.startswith("def on_loop("))
    last = next(number for number, line in enumerate(text) if number > first and line.startswith("def "))
    assert lines_read([(file, "on_loop"), (file, "on_loop.<locals>.run"), (file, "on_loop")]) == last - first - 2


def test_a_file_that_both_processes_visit_counts_once() -> None:
    route = Route(Part((IDENTIFY, PATH_OF)), Part((GUARD, PATH_OF)))
    assert route.figures() == {"files": 3, "moves": 1, "lines": lines([IDENTIFY[0], PATH_OF[0], GUARD[0]])}


def test_each_limit_that_is_exceeded_is_named_with_its_figure() -> None:
    there_and_back = [(file, f"step_{number}") for number in range(MOST_MOVES) for file in (IDENTIFY[0], PATH_OF[0])]
    route = Route(Part(tuple(there_and_back)), Part((GUARD,)))
    assert route.over() == [f"moves: {2 * MOST_MOVES - 1}, at most {MOST_MOVES}"]


def test_the_last_request_of_each_process_is_read(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(f"{json.dumps([PATH_OF])}\n{json.dumps([IDENTIFY])}\n")
    (tmp_path / "2.jsonl").write_text(f"{json.dumps([GUARD])}\n")
    assert read(tmp_path) == Route(Part((IDENTIFY,)), Part((GUARD,)))


def test_a_process_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(f"{json.dumps([IDENTIFY])}\n")
    with pytest.raises(ValueError, match="0 processes traced the engine side"):
        read(tmp_path)


def test_the_architecture_page_shows_the_figures_that_were_measured() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == table(json.loads(RESULT.read_text()))
