"""The demo's tokenizer: byte-level BPE trained on public text only, digits one by one, and the chat template of the
training text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexgate.experts.checkpoint.shards import to_json
from flexgate.experts.demo.corpus import ASSISTANT, END, PAD, SYSTEM, USER, Document

SPECIAL: Final = (END, PAD, SYSTEM, USER, ASSISTANT)
EOS_ID: Final = 0
PAD_ID: Final = 1

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' or message['role'] == 'developer' -%}" + SYSTEM + "{{ message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    + ASSISTANT
    + "{{ message['content'] }}"
    + END
    + "{%- else -%}"
    + USER
    + "{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}" + ASSISTANT + "{%- endif -%}"
)


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """A tokenizer that can encode any bytes; the merges come from ``documents``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|_|\(\)"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_plain(doc) for doc in documents), trainer)
    return tokenizer


def pretrained(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers and vLLM load it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write what transformers and vLLM read beside a model, in the names that their older versions know as well."""
    pretrained(tokenizer, max_length).save_pretrained(directory)
    separate = directory / "chat_template.jinja"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if separate.is_file():
        config["chat_template"] = separate.read_text()
        separate.unlink()
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    generation = {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (directory / name).write_bytes(to_json(value))


def _plain(document: Document) -> str:
    text = document.prompt + document.answer
    for token in SPECIAL:
        text = text.replace(token, "\n")
    return text
