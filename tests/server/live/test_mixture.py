"""A server with a model that is not a FlexOlmo one, from its ownership file to an answer."""

from collections.abc import Iterator

import pytest
from enginekit.checkpoints import assign_units, write_mixture
from live_server import LiveServer, seed_store, start, stop
from text_checkpoint import EXPERTS, VOCABULARY, write_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

UNIT_LE = ([0, 1, 2, 3, 4, 0, 2], [], [4, 3, 2, 2, 1, 0, 0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A Qwen2-MoE model: a shared expert in two of its layers, none in the one between them."""
    model = tmp_path_factory.mktemp("model")
    write_mixture(
        model,
        "qwen2_moe",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=7,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
    )
    write_tokenizer(model)
    assign_units(model, tuple(EXPERTS), UNIT_LE)
    directory = tmp_path_factory.mktemp("server")
    database_url = f"sqlite:///{directory / 'flexgate.db'}"
    owned = {id_: "public" if id_ == "public" else f"owner-{id_}" for id_ in EXPERTS}
    seed_store(database_url, {id_: (owned[id_], domain) for id_, (_, domain) in EXPERTS.items()})
    running = start(model, directory, database_url=database_url)
    yield running
    stop(running)


def test_an_answer_names_what_took_part_and_what_no_gate_reaches(server: LiveServer) -> None:
    body = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}
    with server.client("press") as client:
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
    gate = answer["flexgate"]
    parts = {part["id"]: part for part in gate["attribution"]["experts"]}
    assert gate["allowed"] == ["public", "news"]
    assert (gate["attribution"]["shared_expert"], gate["attribution"]["dense_layers"]) == (True, 1)
    assert sum(part["share_ppm"] for part in parts.values()) == 1_000_000
    assert (parts["math"]["gate_mass"], parts["math"]["tokens"]) == (0.0, 0)
    # Each of its positions gives all of its weight to what it may use, in two layers.
    positions = answer["usage"]["prompt_tokens"] + 7
    assert 0 < sum(part["gate_mass"] for part in parts.values()) <= positions + 1e-3
