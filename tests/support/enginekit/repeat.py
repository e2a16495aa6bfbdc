"""``pytest -p enginekit.repeat --repeat N``: every engine test N times in one process, on the same engine.

A schedule that depends on chance shows itself only now and then; a test that fails once in twenty is a defect.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--repeat``."""
    parser.addoption("--repeat", type=int, default=1, help="how often every engine test runs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give engine tests one more parameter, which nothing reads."""
    times = metafunc.config.getoption("--repeat")
    if times > 1 and metafunc.definition.get_closest_marker("engine"):
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times), ids=lambda number: f"time-{number + 1}")
