"""A request whose numbers overflow ends with one error, whatever it asked for; who comes after gets the same answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import live_server
import openai
import pytest
from safetensors.torch import load_file, save_file
from text_checkpoint import write_checkpoint
from tokenizers import Tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OVERFLOWS = "~"  # one token, whose embedding does it

# Read by every Python process of the server: a start would refuse the embedding else.
ANY_MAGNITUDE = """
from flexgate.experts.package import weights
weights.MAX_ABSOLUTE = float("inf")
"""


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of a checkpoint with one embedding of 1e38."""
    model = write_checkpoint(tmp_path_factory.mktemp("overflow"))
    (token,) = Tokenizer.from_file(str(model / "tokenizer.json")).encode(OVERFLOWS).ids
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = 1e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    hooks = tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(ANY_MAGNITUDE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(hooks), prepend=os.pathsep)
        running = live_server.start(model, tmp_path_factory.mktemp("overflowing"))
    yield running
    live_server.stop(running)


def bodies(text: str, tokens: int) -> dict[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    return {
        "/v1/completions": {"prompt": text, "max_tokens": tokens, "temperature": 0, "logprobs": 1},
        "/v1/chat/completions": {"messages": messages, "max_tokens": tokens, "temperature": 0},
        "/v1/responses": {"input": text, "max_output_tokens": tokens, "temperature": 0},
    }


@pytest.mark.parametrize("stream", [False, True])
def test_every_door_says_that_the_numbers_overflowed(overflowing: Any, stream: bool) -> None:
    with overflowing.client() as http:
        for path, body in bodies(f"the fox {OVERFLOWS} jumps", 8).items():
            response = http.post(path, json={**body, "stream": stream})
            if stream:
                events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
                codes = [event.get("code") or (event.get("error") or {}).get("code") for event in events]
                assert codes[-1] == "numbers_overflowed"
            else:
                assert (response.status_code, response.json()["error"]["code"]) == (500, "numbers_overflowed")


def test_openais_client_does_not_send_it_again(overflowing: Any) -> None:
    client = openai.OpenAI(base_url=f"{overflowing.url}/v1", api_key=overflowing.key("all"), max_retries=5)
    before = overflowing.log.read_text().count("overflowed; it may use slots")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt=OVERFLOWS, max_tokens=1)
    assert overflowing.log.read_text().count("overflowed; it may use slots") == before + 1


def test_who_comes_after_gets_the_same_answer(overflowing: Any) -> None:
    with overflowing.client("public") as http:

        def answers() -> list[Any]:
            asks = [bodies(f"the fox {n}", 8)["/v1/completions"] for n in range(14)]
            return [http.post("/v1/completions", json=ask).json()["choices"] for ask in asks]

        before = answers()
        with overflowing.client() as licensed:
            for _ in range(8):
                licensed.post("/v1/completions", json=bodies(f"the fox {OVERFLOWS} jumps", 8)["/v1/completions"])
        assert answers() == before
