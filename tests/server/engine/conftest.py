from collections.abc import Iterator
from pathlib import Path

import pytest
from enginekit.checkpoints import write_random
from enginekit.scripted import EngineScript, ScriptedEngine, scripted_engine


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, top-2, float32."""
    return write_random(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(
    scope="session",
    params=[pytest.param("vllm", id=pytest.HIDDEN_PARAM), pytest.param("flexgate", marks=pytest.mark.slow)],
)
def moe_kernels(request: pytest.FixtureRequest) -> str:
    """Every choice of --moe-kernels that runs here; the slower one in the slow suite."""
    return str(request.param)


@pytest.fixture(scope="session")
def engine(checkpoint: Path, moe_kernels: str) -> Iterator[ScriptedEngine]:
    """The shared engine: four experts, two free slots, asynchronous scheduling."""
    with scripted_engine(EngineScript(checkpoint, max_experts=6, settings={"moe_kernels": moe_kernels})) as running:
        yield running
