"""What holds for every test: threads, slices, workers, and the one live server and the one demo."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Matrices are small here, and other tests run beside: threads that spin for work would hold them up.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import slices
import workers
from hypothesis import HealthCheck, settings
from workers import pytest_configure_node, pytest_xdist_make_scheduler  # noqa: F401

# How long an example takes says more of what runs beside it than of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

collect_ignore = ["clients"]  # they have environments of their own: `make test-clients`


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--slice`."""
    slices.add_option(parser)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say how to run the same slices again."""
    return slices.header(config)


@pytest.hookimpl(trylast=True)  # when what -m and -k leave out has gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take a slice of what is heavy, and spread the rest over workers."""
    slices.keep(config, items)
    workers.spread(config, items)


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model directory that can be served."""
    from text_checkpoint import write_checkpoint  # loads transformers

    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has its state and its log."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def demo(demo_folder: Path) -> Iterator[str]:
    """The one demo of the session; its address."""
    from demo_server import serve_demo

    flexgate = Path(sys.executable).with_name("flexgate")
    with serve_demo(demo_folder, "--enforce-eager", "--kv-cache-memory-bytes=134217728", flexgate=flexgate) as url:
        yield url


@pytest.fixture(scope="session")
def server(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The one real server of the session."""
    import live_server

    running = live_server.start(text_checkpoint, tmp_path_factory.mktemp("server"))
    yield running
    live_server.stop(running)
