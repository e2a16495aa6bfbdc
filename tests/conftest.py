"""What holds for every test: threads, the spreading over workers, and the one live server."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Matrices are small here, and other tests run beside: threads that spin for work would hold them up.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from workers import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_configure_node,
    pytest_xdist_make_scheduler,
)


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model directory that can be served."""
    from text_checkpoint import write_checkpoint  # loads transformers

    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def server(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The one real server of the session."""
    import live_server

    running = live_server.start(text_checkpoint, tmp_path_factory.mktemp("server"))
    yield running
    live_server.stop(running)
