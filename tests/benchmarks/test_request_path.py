"""How a request's path is counted, and that the architecture page shows what was measured."""

import json
from pathlib import Path

import pytest
from request_path.__main__ import BEGIN, END, PAGE, RESULT
from request_path.path import MOST_MOVES, Part, Route, lines, read, table

GUARD = "server/engine/core/guard.py"
AUTH = "server/http/auth.py"
ERRORS = "server/http/errors.py"


def test_a_move_is_an_entry_into_another_file_than_the_one_before() -> None:
    part = Part((AUTH, AUTH, ERRORS, AUTH))
    assert part.files == (AUTH, ERRORS)
    assert part.moves == 2


def test_a_file_that_both_processes_visit_counts_once() -> None:
    route = Route(Part((AUTH, ERRORS)), Part((GUARD, ERRORS)))
    assert route.figures() == {"files": 3, "moves": 1, "lines": lines([AUTH, ERRORS, GUARD])}


def test_each_limit_that_is_exceeded_is_named_with_its_figure() -> None:
    route = Route(Part((AUTH, ERRORS) * MOST_MOVES), Part((GUARD,)))
    assert route.over() == [f"moves: {2 * MOST_MOVES - 1}, at most {MOST_MOVES}"]


def test_the_last_request_of_each_process_is_read(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(f"{json.dumps([ERRORS])}\n{json.dumps([AUTH])}\n")
    (tmp_path / "2.jsonl").write_text(f"{json.dumps([GUARD])}\n")
    assert read(tmp_path) == Route(Part((AUTH,)), Part((GUARD,)))


def test_a_process_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text(f"{json.dumps([AUTH])}\n")
    with pytest.raises(ValueError, match="0 processes traced the engine side"):
        read(tmp_path)


def test_the_architecture_page_shows_the_figures_that_were_measured() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == table(json.loads(RESULT.read_text()))
