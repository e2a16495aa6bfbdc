"""A random FlexOlmo checkpoint with a tokenizer, a chat template and a manifest."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, PreTrainedTokenizerFast

EXPERTS = {
    "public": ("commons", "general"),
    "news": ("gazette", "news"),
    "math": ("academy", "math"),
    "code": ("forge", "code"),
    "secret": ("vault", "unnamed"),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = 320
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<system>", "<tool>"]
CORPUS = ["the quick brown fox jumps over the lazy dog and reads the news"] * 20


def write_checkpoint(directory: Path, *, chat_template: bool = True, seed: int = 0) -> Path:
    """Everything that `flexgate serve` asks of a model directory, in a few hundred kilobytes."""
    write_tokenizer(directory, chat_template=chat_template)
    _model(seed).save_pretrained(directory)
    manifest = [{"id": id_, "owner": o, "domain": d} for id_, (o, d) in EXPERTS.items()]
    (directory / "flexgate.json").write_text(json.dumps({"experts": manifest}))
    return directory


def write_tokenizer(directory: Path, *, chat_template: bool = True) -> None:
    """The part of it that is no weights."""
    tokenizer = _tokenizer()
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _model(seed: int) -> FlexOlmoForCausalLM:
    torch.manual_seed(seed)
    model = FlexOlmoForCausalLM(
        FlexOlmoConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=len(EXPERTS),
            num_experts_per_tok=2,
            max_position_embeddings=1024,
            eos_token_id=1,
            pad_token_id=0,
            initializer_range=0.08,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.5)
    return model
