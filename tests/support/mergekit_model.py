"""A mixture as mergekit writes it: the FFNs of dense models as a Mixtral model's experts, and its own file beside."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from text_checkpoint import VOCABULARY, write_tokenizer
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, MixtralConfig, PretrainedConfig

BASE = "mistral-community/base"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def merged_config(base: PretrainedConfig, experts: int) -> MixtralConfig:
    """As mergekit makes it of the base model's, whose every field stays."""
    mistral = base if isinstance(base, MistralConfig) else MistralConfig(**base.to_dict())
    config = MixtralConfig(**mistral.to_dict())
    config.architectures, config.sliding_window = ["MixtralForCausalLM"], None
    config.num_local_experts, config.num_experts_per_tok = experts, 2
    return config


def write_merged(directory: Path, fine_tunes: tuple[str, ...]) -> Path:
    """A base model of Llama's kind and fine-tunes of it, whose FFNs alone differ, merged with random gates."""
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)).state_dict()
    sources = {BASE: base} | {name: _fine_tuned(base) for name in fine_tunes}
    merged = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer in range(SIZES["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        merged[f"{block}.gate.weight"] = torch.randn(len(sources), SIZES["hidden_size"]) / 2
        for expert, source in enumerate(sources.values()):
            for dense, sparse in PROJECTIONS.items():
                tensor = source[f"model.layers.{layer}.mlp.{dense}.weight"]
                merged[f"{block}.experts.{expert}.{sparse}.weight"] = tensor
    merged_config(LlamaConfig(**SIZES), len(sources)).save_pretrained(directory)
    write_tokenizer(directory)
    weights = {name: tensor.clone() for name, tensor in merged.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    experts = [{"source_model": name, "positive_prompts": [name]} for name in sources]
    content = {"base_model": BASE, "gate_mode": "random", "dtype": "float32", "experts": experts}
    (directory / "mergekit_moe_config.yml").write_text(yaml.safe_dump(content))
    return directory


def _fine_tuned(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + torch.randn_like(tensor) * 0.08 for name, tensor in base.items() if ".mlp." in name}
