"""Random checkpoints written by transformers, FlexOlmo's and others, and surgery on them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FlexOlmoConfig, FlexOlmoForCausalLM

from flexgate.experts.package.extract import extract_expert
from flexgate.experts.package.manifest import Statement, Training
from flexgate.experts.package.size import FULL, ExpertSize
from flexgate.experts.package.verify import open_package
from flexgate.experts.package.weights import WeightsTicket

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.gate\.(weight|bias|e_score_correction_bias)$")


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
    return _write(FlexOlmoForCausalLM(config), directory)


def write_mixture(directory: Path, model_type: str, *, seed: int = 0, **options: Any) -> Path:
    """The same for a model of another kind, whose configuration has ``options``."""
    torch.manual_seed(seed)
    common = {"max_position_embeddings": 512, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.08}
    config = AutoConfig.for_model(model_type, **(common | options))
    return _write(AutoModelForCausalLM.from_config(config, dtype=torch.float32), directory)


def _write(model: Any, directory: Path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
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
    layers = {str(layer): list(unit_E) for layer, unit_E in enumerate(unit_LE) if unit_E}
    content = {"format": "flexgate-model/2", "ownership": "owners", "units": units, "layers": layers}
    (checkpoint / "flexgate.json").write_text(json.dumps(content))
    return checkpoint


def keep_by_layer(source: Path, target: Path, kept_L: Sequence[Sequence[int]]) -> Path:
    """Copy a checkpoint with other experts of each layer, equally many in all that have any."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        kept = list(kept_L[int(layer[1])]) if layer else []
        if expert and int(expert[1]) in kept:
            out[name.replace(expert[0], f".experts.{kept.index(int(expert[1]))}.")] = tensor
        elif not expert:
            out[name] = tensor[kept].clone() if ROUTER.search(name) else tensor
    config = json.loads((source / "config.json").read_text())
    config |= {name: max(map(len, kept_L)) for name in EXPERT_COUNTS if name in config}
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(out, target / "model.safetensors", {"format": "pt"})
    return target


def add_further_layer(checkpoint: Path, unit_LE: Sequence[Sequence[int]]) -> None:
    """Put a layer after the last, such as one that predicts further tokens: the last one's tensors, and one more."""
    last = len(unit_LE) - 1
    tensors = load_file(checkpoint / "model.safetensors")
    copied = {
        name.replace(f".layers.{last}.", f".layers.{last + 1}."): tensor + 1
        for name, tensor in tensors.items()
        if f".layers.{last}." in name
    }
    copied[f"model.layers.{last + 1}.eh_proj.weight"] = torch.ones(3)
    save_file({**tensors, **copied}, checkpoint / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def add_router_bias(source: Path, target: Path, bias_LE: torch.Tensor) -> Path:
    """Copy a checkpoint and give every layer's router a row of ``bias_LE``."""
    tensors = load_file(source / "model.safetensors")
    for layer, bias_E in enumerate(bias_LE):
        tensors[f"model.layers.{layer}.mlp.gate.bias"] = bias_E.clone()
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def expert_ticket(checkpoint: Path, index: int, directory: Path, size: ExpertSize = FULL) -> WeightsTicket:
    """Expert ``index`` of a checkpoint as a package of a size, taken in and ready to be loaded."""
    statement = Statement(id="added", owner="acme", domain="random", training=Training(data="random", router="own"))
    extract_expert(checkpoint, str(index), directory / "package", statement=statement, size=size)
    with open_package(directory / "package", base=None, trusted_keys=None, into=directory / "copy") as package:
        return package.ticket
