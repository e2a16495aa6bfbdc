"""What the options for chat and tools name is there, or the start says so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from flexgate.server.http.offload import Offload
from flexgate.server.inference.errors import HandlersRefused
from flexgate.server.inference.openai.handlers import build_handlers


def build(checkpoint: Path, **options: Any) -> None:
    """As far as it goes without an engine."""
    client: Any = SimpleNamespace(renderer=SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(checkpoint)))
    build_handlers(
        client, Offload(), **{"model_names": ("tiny",), "chat_template": None, "tool_call_parser": None, **options}
    )


def test_an_unknown_tool_parser_is_refused_with_those_there_are(text_checkpoint: Path) -> None:
    with pytest.raises(HandlersRefused, match=r"^--tool-call-parser nope is unknown: use one of .*hermes.*") as refused:
        build(text_checkpoint, tool_call_parser="nope")
    assert "flexgate" not in str(refused.value), "what is not for users"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (b"{% if %}", "Expected an expression"),
        (b"{{ raise_exception('only tools speak') }}", "only tools speak"),
        (b"\xff", "codec can't decode"),
        (b"hello, I am a README", "not in its output"),
        (b"{{ messages[0].content + 1 }}", "TypeError"),
        (b"{{ messages[0].content // 0 }}", "Error"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    text_checkpoint: Path, tmp_path: Path, template: bytes, why: str
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_bytes(template)
    with pytest.raises(HandlersRefused, match=f"^--chat-template {file}: .*{why}"):
        build(text_checkpoint, chat_template=file)


@pytest.mark.parametrize(
    "said", ["{{ message.content }}", "{% for part in message.content %}{{ '<u>' + part['text'] }}{% endfor %}"]
)
def test_a_template_that_can_be_used_is_not(text_checkpoint: Path, tmp_path: Path, said: str) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for message in messages %}" + said + "{% endfor %}")
    with pytest.raises(AttributeError, match="model_config"):
        build(text_checkpoint, chat_template=file, tool_call_parser="hermes")
