"""Status codes are chosen in `server/http` alone; an import contract keeps `http.HTTPStatus` there as well."""

import ast
from pathlib import Path

import pytest

from flexgate.server.http import errors
from flexgate.server.http.errors import ApiError

SERVER = Path(__file__).parents[3] / "server"
ELSEWHERE = [path for path in sorted(SERVER.rglob("*.py")) if SERVER / "http" not in path.parents]
STATUSES = {
    "ApiError": 500,
    "Conflict": 409,
    "Forbidden": 403,
    "Invalid": 400,
    "NotFound": 404,
    "OutOfSpace": 507,
    "TimedOut": 408,
    "TooLarge": 413,
    "TooMany": 429,
    "Unauthorized": 401,
    "Unavailable": 503,
}


def chosen(text: str) -> list[int]:
    """Lines that give a status as a number, or compare one with a number."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg in ("status", "status_code") and _is_number(node.value):
            found.append(node.value.lineno)
        if (
            isinstance(node, ast.Compare)
            and "status" in ast.unparse(node.left)
            and any(map(_is_number, node.comparators))
        ):
            found.append(node.lineno)
    return found


def _is_number(node: ast.expr) -> bool:
    return any(
        isinstance(part, ast.Constant) and type(part.value) is int and part.value >= 100 for part in ast.walk(node)
    )


def test_no_other_folder_writes_a_status_as_a_number() -> None:
    assert {str(path.relative_to(SERVER)): lines for path in ELSEWHERE if (lines := chosen(path.read_text()))} == {}


@pytest.mark.parametrize("text", ["f(status_code=202)", "f(status=404 if x else 500)", "a.status >= 500"])
def test_a_status_that_is_written_as_a_number_is_found(text: str) -> None:
    assert chosen(text) == [1]


def test_every_kind_of_error_has_its_status_and_is_in_the_tree_at_the_head_of_the_module() -> None:
    kinds = {kind.__name__: int(kind.usual_status) for kind in (ApiError, *ApiError.__subclasses__())}
    assert kinds == STATUSES
    for name, status in STATUSES.items():
        assert f"{name} " in str(errors.__doc__)
        assert f" {status}  " in str(errors.__doc__)
