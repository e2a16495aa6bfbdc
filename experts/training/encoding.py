"""From documents to token ids: the public model's tokenizer, its chat template, windows and held-out examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexgate.experts.errors import TextsInvalid
from flexgate.experts.training.batches import Example
from flexgate.experts.training.texts import Document

MIN_TOKENS: Final = 500
"""Fewer cannot be split into text to learn from and text to check with."""
HELD_OUT: Final = 0.05
_MESSAGE: Final = "flexgate-message"
END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}<|assistant|>{{ message['content'] }}<|end|>"
    "{%- else -%}<|user|>{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the ids that end and pad a document."""

    tokenizer: PreTrainedTokenizerBase
    eos_id: int
    pad_id: int

    @classmethod
    def from_model(cls, directory: Path, config: dict[str, Any]) -> Encoder:
        """The tokenizer of a checkpoint directory.

        Raises:
            TextsInvalid: there is none, or it is not the model's.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # loaders raise whatever a strange file makes them stumble over
            raise TextsInvalid(f"{directory} has no tokenizer that can be loaded: {error}") from error
        if len(tokenizer) > config["vocab_size"]:
            raise TextsInvalid(
                f"the tokenizer of {directory} has {len(tokenizer)} tokens, its model {config['vocab_size']}: "
                "it belongs to another model"
            )
        eos, pad = config.get("eos_token_id"), config.get("pad_token_id")
        eos = eos[0] if isinstance(eos, list) else eos
        if eos is None or (tokenizer.eos_token_id is not None and eos != tokenizer.eos_token_id):
            raise TextsInvalid(
                f"{directory}: config.json ends texts with {eos}, the tokenizer with {tokenizer.eos_token_id}"
            )
        return cls(tokenizer, eos, eos if pad is None else pad)

    def encode(self, documents: Iterable[Document], length: int) -> list[Example]:
        """Every document in windows of at most ``length`` tokens, an end token after each document."""
        examples = []
        for document in documents:
            prompt = self._prompt_ids(document.prompt) if document.prompt else []
            ids = [*prompt, *self._ids(document.answer), self.eos_id]
            for first in range(0, len(ids), length):
                window = tuple(ids[first : first + length])
                if len(window) > 1:
                    examples.append(Example(window, max(0, min(len(prompt) - first, len(window) - 1))))
        return examples

    def _prompt_ids(self, text: str) -> list[int]:
        """A question as the model is asked it; only the template's own control tokens are control tokens.

        Raises:
            TextsInvalid: the text spells a control token and the template does more than to stand around a message.
        """
        if not self.tokenizer.chat_template:
            return self._ids(text)
        rendered = self._rendered(text)
        if not any(token in text for token in self.tokenizer.all_special_tokens):
            return self._ids(rendered, control=True)
        before, *after = self._rendered(_MESSAGE).split(_MESSAGE)
        own = [part for part in (text, text.strip()) if [before + part + end for end in after] == [rendered]]
        if not own:
            raise TextsInvalid(
                f"a prompt spells a control token, and the chat template changes what it is given: {text[:80]!a}"
            )
        return [*self._ids(before, control=True), *self._ids(own[0]), *self._ids(after[0], control=True)]

    def _rendered(self, text: str) -> str:
        turn = [{"role": "user", "content": text}]
        rendered: str = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return rendered

    def _ids(self, text: str, *, control: bool = False) -> list[int]:
        """Tokens of a text, in which a control token's name is text unless ``control``."""
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=not control, verbose=False
        )
        return ids


def split(examples: Sequence[Example], seed: int, where: Path) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and, at random, one in twenty to check with.

    Raises:
        TextsInvalid: too little text.
    """
    tokens = sum(len(example.ids) for example in examples)
    if tokens < MIN_TOKENS or len(examples) < 4:
        raise TextsInvalid(
            f"{where} holds {tokens} tokens in {len(examples)} pieces; "
            f"at least {MIN_TOKENS} tokens in 4 pieces are needed"
        )
    order = list(examples)
    Random(seed).shuffle(order)
    held = max(1, round(len(order) * HELD_OUT))
    return order[held:], order[:held]


def make_tokenizer(documents: Iterable[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from ``documents``: any text can be encoded, and chats have a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.prompt + "\n" + document.answer for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
