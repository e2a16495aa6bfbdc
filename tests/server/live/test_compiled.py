"""The default start compiles the model; no request afterwards waits for a compiler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live_server
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

FIRST_TOKEN_SECONDS = 2.0


@pytest.fixture(scope="module")
def compiled(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server started as by default, with nothing compiled before."""
    directory = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(directory / "vllm"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory / "inductor"))
        running = live_server.start(text_checkpoint, directory, "--no-enforce-eager", "--dtype=auto")
    yield running
    live_server.stop(running)


BODIES: dict[str, dict[str, Any]] = {
    "logprobs": {"prompt": "The", "max_tokens": 4, "logprobs": 5},
    "prompt logprobs": {"prompt": "The licence", "max_tokens": 2, "echo": True, "logprobs": 20},
    "long prompt": {"prompt": "The old river town. " * 20, "max_tokens": 2},
    "sampling": {"prompt": "A", "max_tokens": 4, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 1},
    "penalties": {"prompt": "A", "max_tokens": 4, "frequency_penalty": 0.5, "logit_bias": {"5": 1.0}},
    "choices": {"prompt": ["A", "B"], "max_tokens": 4, "n": 3, "temperature": 1.0},
    "constrained": {"prompt": "A", "max_tokens": 4, "structured_outputs": {"regex": "[0-9]{3}"}},
}


def test_nothing_is_compiled_after_the_server_is_ready(compiled: Any) -> None:
    server = compiled
    waited = {}
    with server.client() as http:
        for name, body in BODIES.items():
            started = time.monotonic()
            response = http.post("/v1/completions", json={"model": "tiny", **body})
            waited[name] = time.monotonic() - started
            assert response.status_code == 200, (name, response.text)
    assert list((server.log.parent / "vllm").rglob("torch_aot_compile")), "nothing was compiled"
    assert max(waited.values()) <= FIRST_TOKEN_SECONDS, waited
