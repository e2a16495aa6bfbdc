"""Random FlexOlmo checkpoints written by transformers, and surgery on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from flexgate.experts.package.extract import extract_expert
from flexgate.experts.package.manifest import Statement, Training
from flexgate.experts.package.verify import open_package
from flexgate.experts.package.weights import WeightsTicket


@dataclass(frozen=True)
class Shape:
    """Dimensions of a random checkpoint."""

    hidden: int = 128
    intermediate: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    experts: int = 4
    top_k: int = 2
    renormalize: bool = False
    vocab: int = 512
    seed: int = 0
    tied: bool = False


def write_random(directory: Path, shape: Shape = Shape()) -> Path:
    """A float32 checkpoint with routers sharp enough that gates change the answer."""
    torch.manual_seed(shape.seed)
    config = FlexOlmoConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.renormalize,
        max_position_embeddings=512,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.08,
        tie_word_embeddings=shape.tied,
    )
    model = FlexOlmoForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def rewrite(source: Path, target: Path, keep: list[int], poison: dict[int, float] | None = None) -> Path:
    """Copy a checkpoint with only ``keep`` experts, in that order; fill ``poison`` ones."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            head, _, tail = name.partition(".experts.")
            index, _, rest = tail.partition(".")
            if int(index) in keep:
                value = tensor.clone()
                if poison and int(index) in poison:
                    value.fill_(poison[int(index)])
                out[f"{head}.experts.{keep.index(int(index))}.{rest}"] = value
        elif name.endswith("mlp.gate.weight"):
            rows = tensor[keep].clone()
            for index, value in (poison or {}).items():
                rows[keep.index(index)] = value
            out[name] = rows
        elif name.endswith("mlp.gate.bias"):
            out[name] = tensor[keep].clone()
        else:
            out[name] = tensor
    config["num_experts"] = len(keep)
    config["num_experts_per_tok"] = min(config["num_experts_per_tok"], len(keep))
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(out, target / "model.safetensors", {"format": "pt"})
    return target


def assign_units(checkpoint: Path, names: Sequence[str], unit_LE: Sequence[Sequence[int]]) -> Path:
    """Write which unit each expert of each layer belongs to."""
    units = [{"id": name, "owner": None if name == "public" else f"owner-{name}", "domain": name} for name in names]
    layers = {str(layer): list(unit_E) for layer, unit_E in enumerate(unit_LE)}
    content = {"format": "flexgate-model/2", "ownership": "owners", "units": units, "layers": layers}
    (checkpoint / "flexgate.json").write_text(json.dumps(content))
    return checkpoint


def keep_by_layer(source: Path, target: Path, kept_L: Sequence[Sequence[int]]) -> Path:
    """Copy a checkpoint with other experts of each layer, equally many in all of them."""
    tensors = load_file(source / "model.safetensors")
    out = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    for layer, kept in enumerate(kept_L):
        mlp = f"model.layers.{layer}.mlp"
        out[f"{mlp}.gate.weight"] = tensors[f"{mlp}.gate.weight"][list(kept)].clone()
        for new, old in enumerate(kept):
            for part in ("gate", "up", "down"):
                out[f"{mlp}.experts.{new}.{part}_proj.weight"] = tensors[f"{mlp}.experts.{old}.{part}_proj.weight"]
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = len(kept_L[0])
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(out, target / "model.safetensors", {"format": "pt"})
    return target


def add_router_bias(source: Path, target: Path, bias_LE: torch.Tensor) -> Path:
    """Copy a checkpoint and give every layer's router a row of ``bias_LE``."""
    tensors = load_file(source / "model.safetensors")
    for layer, bias_E in enumerate(bias_LE):
        tensors[f"model.layers.{layer}.mlp.gate.bias"] = bias_E.clone()
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def expert_ticket(checkpoint: Path, index: int, directory: Path) -> WeightsTicket:
    """Expert ``index`` of a checkpoint as a package, taken in and ready to be loaded."""
    statement = Statement(id="added", owner="acme", domain="random", training=Training(data="random", router="own"))
    extract_expert(checkpoint, str(index), directory / "package", statement=statement)
    with open_package(directory / "package", base=None, trusted_keys=None, into=directory / "copy") as package:
        return package.ticket
