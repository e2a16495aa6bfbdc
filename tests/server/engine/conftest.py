from collections.abc import Iterator
from pathlib import Path

import pytest
from enginekit.checkpoints import write_random
from enginekit.scripted import EngineScript, ScriptedEngine, scripted_engine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, top-2, float32."""
    return write_random(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Iterator[ScriptedEngine]:
    """The shared engine: four experts, two free slots, asynchronous scheduling."""
    with scripted_engine(EngineScript(checkpoint, max_experts=6)) as running:
        yield running
