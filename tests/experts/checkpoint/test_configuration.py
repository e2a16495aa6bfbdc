"""Every field of ``config.json`` with values of every kind: refused in a sentence, or read as transformers reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from transformers import FlexOlmoConfig

from flexgate.experts.checkpoint.configuration import IDS, NO_EFFECT, ONE_VALUE, read_architecture
from flexgate.experts.checkpoint.layout import Architecture
from flexgate.experts.errors import LayoutError

ARCHITECTURE = Architecture(97, 32, 24, 2, 4, 4, num_experts=5, num_experts_per_tok=2)
CONFIG = ARCHITECTURE.to_config(eos_token_id=1, pad_token_id=0, dtype="float32")
STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 10**30, -2.5, 0.5, 1e308, "", "1", "float32"),
    *([], [1], [None], ["x"], {}, {"rope_type": "default"}, {"a": [1]}),
]
FIELDS = sorted({*CONFIG, *asdict(ARCHITECTURE), *NO_EFFECT, *ONE_VALUE, *IDS, "head_dim", "rope_scaling"})
FOREIGN = [
    *("num_local_experts", "sliding_window", "partial_rotary_factor", "text_config", "seq_length", "auto_map"),
    *("is_encoder_decoder", "layer_types", "attribute_map", "compression_config", "model_max_length"),
]


def reads(config: dict[str, Any]) -> Architecture | None:
    """What is read; None where a field is refused in one sentence."""
    try:
        return read_architecture(config)
    except LayoutError as error:
        sentence = str(error)
    assert sentence.startswith("config.json")
    assert "\n" not in sentence
    assert len(sentence) < 250
    return None


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_any_kind_is_refused_or_read_as_transformers_reads_it(name: str) -> None:
    for value in STRANGE:
        config = {**CONFIG, name: value}
        found = reads(config)
        if found is None:
            continue
        theirs = FlexOlmoConfig.from_dict(dict(config))
        for field, number in asdict(found).items():
            other = theirs.rope_parameters["rope_theta"] if field == "rope_theta" else getattr(theirs, field)
            assert other == number, (name, value, field)
        assert set(theirs.rope_parameters) <= {"rope_theta", "rope_type"}
        assert theirs.get_text_config() is theirs


@pytest.mark.parametrize("name", FOREIGN)
def test_a_field_of_other_models_is_refused_unless_it_is_null(name: str) -> None:
    with pytest.raises(LayoutError, match=f"'{name}', which is not a field of a FlexOlmo model: remove it"):
        read_architecture({**CONFIG, name: 4})
    assert read_architecture({**CONFIG, name: None}) == ARCHITECTURE


@pytest.mark.parametrize("name", sorted(CONFIG))
def test_a_field_that_is_missing_is_read_as_transformers_reads_it(name: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != name}
    found = reads(config)
    if found is not None:
        theirs = FlexOlmoConfig.from_dict(dict(config))
        assert theirs.max_position_embeddings == found.max_position_embeddings
        assert theirs.rope_parameters["rope_theta"] == found.rope_theta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 1 to 1024"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected 1 to"),
        ({"num_experts": True}, "num_experts is True, expected 1 to 4096"),
        ({"vocab_size": None}, "vocab_size is None, expected 1 to"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a positive number with a point"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True, expected a positive number with a point"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only the default kind is read"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only the default kind is read"),
        ({"rope_parameters": {"rope_theta": "9"}}, "rope_theta is '9', expected a positive number"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "only the default kind is read"),
        ({"rope_theta": 5.0}, "rope_theta more than one value: 5.0, 10000.0"),
        ({"hidden_size": 36}, "hidden_size is 36, expected a multiple of twice the 4 attention heads"),
        ({"head_dim": 64}, "head_dim is 64, expected 8"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": 0}, "attention_bias is 0, expected False"),
        ({"architectures": "FlexOlmoForCausalLM"}, "architectures is 'FlexOlmoForCausalLM', expected"),
        ({"eos_token_id": [1, 97]}, r"eos_token_id is \[1, 97\], expected token ids below 97"),
        ({"eos_token_id": []}, r"eos_token_id is \[\], expected token ids below 97"),
        ({"quantization_config": {}}, "quantised"),
        ({"model_type": "llama"}, "names model_type 'llama', expected 'flex_olmo'"),
    ],
)
def test_fields_that_make_no_model_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_architecture({**CONFIG, **change})


def test_rotary_base_is_read_from_old_and_new_configurations() -> None:
    plain = {name: value for name, value in CONFIG.items() if name != "rope_parameters"}
    assert read_architecture(plain).rope_theta == 500000.0
    assert read_architecture({**plain, "rope_theta": 7.0, "rope_scaling": None}).rope_theta == 7.0
    assert read_architecture({**plain, "rope_parameters": {"rope_theta": 9.0}}).rope_theta == 9.0
