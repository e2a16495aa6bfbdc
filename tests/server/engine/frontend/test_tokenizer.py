"""The small files of a model folder: what vLLM would stumble over or read otherwise is refused before it loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexgate.server.engine.frontend.checkpoint import CheckpointError
from flexgate.server.engine.frontend.launch import EngineSettings, plan
from flexgate.server.engine.frontend.tokenizer import DEFAULTS, require_readable_texts

STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 10**30, -2.5, 0.5, 1e308, "", "x", "<eos>"),
    *([], [1], [None], ["x"], {}, {"a": [1]}, {"name": "default"}, [{"name": 1, "template": 2}]),
]
VOCABULARY = 320


@pytest.fixture
def model(text_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(text_checkpoint, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    said = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(said | values))


def refusal(model: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        plan(EngineSettings(model, dtype="float32"))
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence.replace(str(model), "MODEL")


FIELDS = {
    "tokenizer_config.json": [
        *("chat_template", "model_max_length", "tokenizer_class", "eos_token", "pad_token", "unk_token", "backend"),
        *("added_tokens_decoder", "clean_up_tokenization_spaces", "auto_map", "additional_special_tokens"),
        *("extra_special_tokens", "padding_side", "truncation_side", "add_bos_token", "model_input_names"),
    ],
    "generation_config.json": [*DEFAULTS, "eos_token_id", "pad_token_id", "do_sample", "num_beams", "stop_strings"],
    "special_tokens_map.json": ["eos_token", "pad_token", "additional_special_tokens"],
    "tokenizer.json": ["model", "added_tokens", "pre_tokenizer", "decoder", "version", "post_processor"],
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in FIELDS.items() for name in names])
def test_a_value_of_any_kind_is_read_or_refused_in_a_sentence(model: Path, file: str, name: str) -> None:
    whole = (model / file).read_text() if (model / file).is_file() else None
    for value in STRANGE:
        change(model / file, **{name: value})
        try:
            require_readable_texts(model, VOCABULARY)
        except CheckpointError as error:
            sentence = str(error)
            assert str(model) in sentence
            assert "\n" not in sentence
        if whole is not None:
            (model / file).write_text(whole)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", "hot", "a number of at least 0"),
        ("temperature", -0.5, "a number of at least 0"),
        ("top_p", 0, "a number above 0, at most 1"),
        ("top_k", 2.5, "a whole number, -1 or 0 for all tokens"),
        ("min_p", 2, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("max_new_tokens", 0, "a whole number of at least 1"),
        ("eos_token_id", [1, 320], "token ids below 320"),
        ("eos_token_id", "</s>", "token ids below 320"),
    ],
)
def test_a_default_that_no_request_could_ask_for_is_refused(model: Path, name: str, value: Any, expected: str) -> None:
    change(model / "generation_config.json", **{name: value})
    assert refusal(model) == f"MODEL/generation_config.json: {name} is {value!r}, expected {expected}"


@pytest.mark.parametrize("file", ["config.json", "flexgate.json", "tokenizer_config.json", "generation_config.json"])
def test_a_key_that_stands_twice_is_refused(model: Path, file: str) -> None:
    text = (model / file).read_text()
    key = next(iter(json.loads(text)))
    (model / file).write_text(text.rstrip()[:-1] + f', "{key}": 1}}')
    assert refusal(model) == f"MODEL/{file} is not strict JSON: duplicate key '{key}'"


def test_chat_templates_that_disagree_are_refused(model: Path) -> None:
    template = (model / "chat_template.jinja").read_text()
    change(model / "tokenizer_config.json", chat_template=template)
    plan(EngineSettings(model, dtype="float32"))
    change(model / "tokenizer_config.json", chat_template=template + " ")
    said = "MODEL: tokenizer_config.json and {} hold different chat templates: remove one"
    assert refusal(model) == said.format("chat_template.jinja")
    (model / "chat_template.jinja").unlink()
    plan(EngineSettings(model, dtype="float32"))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(template)
    assert refusal(model) == said.format("additional_chat_templates")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("hello", "a user's message is not in its output"),
    ],
)
def test_a_template_of_the_folder_that_passes_on_nothing_is_refused(model: Path, template: str, why: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    assert refusal(model).startswith(f"MODEL: its chat template: {why}")


def test_a_tokenizer_beyond_the_vocabulary_is_refused(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<more>"] = VOCABULARY
    change(model / "tokenizer.json", model=tokenizer["model"])
    assert refusal(model) == "MODEL cannot be served: its tokenizer has an id 320, but vocab_size is 320"
