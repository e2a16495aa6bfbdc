"""The published models' names, configurations and proportions, on random checkpoints that transformers itself wrote."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from packagekit import statement
from transformers import AutoModelForCausalLM, FlexOlmoConfig, FlexOlmoForCausalLM

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.configuration import read_architecture
from flexgate.experts.checkpoint.layout import Architecture, expected_shapes
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.package.extract import extract_anchor, extract_expert
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package

REAL = {
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 100257,
    "pad_token_id": 100277,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
}
"""What FlexOlmo-7x7B-1T and the Flex-…-2x7B-1T models have in common."""
SCALE = 64


def scaled(experts: int, top_k: int) -> FlexOlmoConfig:
    """The real configuration with every width divided by ``SCALE``."""
    small = {
        "vocab_size": REAL["vocab_size"] // SCALE,
        "hidden_size": REAL["hidden_size"] // SCALE,
        "intermediate_size": REAL["intermediate_size"] // SCALE,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "eos_token_id": 783,
        "pad_token_id": 782,
    }
    return FlexOlmoConfig(**{**REAL, **small}, num_experts=experts, num_experts_per_tok=top_k)


def write_hugging_face(directory: Path, experts: int, top_k: int, *, shard: str) -> FlexOlmoForCausalLM:
    torch.manual_seed(experts)
    model = FlexOlmoForCausalLM(scaled(experts, top_k))
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def test_the_seven_expert_model_of_the_real_size_has_33_billion_parameters() -> None:
    architecture = read_architecture({**REAL, "model_type": "flex_olmo", "num_experts": 7, "num_experts_per_tok": 5})
    shapes = expected_shapes(architecture)
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(33.3e9, rel=2e-3)
    assert shapes["model.layers.31.mlp.experts.6.down_proj.weight"] == (4096, 11008)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [5, 7])
def test_the_seven_expert_layout_is_taken_apart_and_put_together_again(top_k: int, tmp_path: Path) -> None:
    original = write_hugging_face(tmp_path / "model", 7, top_k, shard="2MB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    extract_anchor(tmp_path / "model", tmp_path / "anchor", shard_bytes=10**6)
    base = base_identity(tmp_path / "anchor")
    with ExitStack() as stack:
        packages = []
        for index in range(1, 7):
            package = tmp_path / f"e{index}"
            extract_expert(tmp_path / "model", str(index), package, statement=statement(f"e{index}"))
            copy = tmp_path / f"copy{index}"
            opened = open_package(package, base=base, trusted_keys=None, into=copy)
            packages.append(stack.enter_context(opened))
        combine(tmp_path / "anchor", packages, tmp_path / "merged", top_k=top_k, shard_bytes=3 * 10**6)
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads(
        (tmp_path / "model/config.json").read_text()
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, value in original.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(original.eval()(tokens).logits, again.eval()(tokens).logits)


@pytest.mark.slow
def test_the_domain_expert_of_a_two_expert_model_joins_the_public_one_of_another(tmp_path: Path) -> None:
    """``Flex-math-2x7B-1T``: index 0 is public, index 1 the domain; the public parts of all of them are the same."""
    write_hugging_face(tmp_path / "math", 2, 2, shard="1GB")
    with CheckpointReader(tmp_path / "math") as pair:
        assert pair.architecture.num_experts == 2
    manifest = extract_expert(tmp_path / "math", "1", tmp_path / "package", statement=statement("math"))
    extract_anchor(tmp_path / "math", tmp_path / "anchor")
    base = base_identity(tmp_path / "math")
    assert manifest.base.digest == base.digest == base_identity(tmp_path / "anchor").digest
    with open_package(tmp_path / "package", base=base, trusted_keys=None, into=tmp_path / "copy") as package:
        combine(tmp_path / "anchor", [package], tmp_path / "merged", top_k=2)
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval() for name in ("math", "merged")
    )
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(one(tokens).logits, two(tokens).logits)


LIMITED = """
import resource, sys
from pathlib import Path
from packagekit import statement
from flexgate.experts.package.extract import extract_expert
from flexgate.experts.package.merge import combine
from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.package.verify import open_package
from flexgate.experts.package.extract import extract_anchor
root = Path(sys.argv[1])
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + (64 << 20), now + (64 << 20)))
try:
    bytearray(96 << 20)
except MemoryError:
    pass
else:
    sys.exit("the limit does not hold")
extract_anchor(root / "model", root / "anchor")
extract_expert(root / "model", "1", root / "package", statement=statement("one"))
with open_package(
    root / "package", base=base_identity(root / "model"), trusted_keys=None, into=root / "copy"
) as package:
    combine(root / "anchor", [package], root / "merged", top_k=2)
"""


@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_limit_is_extracted_verified_and_merged(tmp_path: Path) -> None:
    from packagekit import write_model

    large = Architecture(64, 1024, 8192, 2, 2, 2, num_experts=2, num_experts_per_tok=2)
    write_model(tmp_path / "model", large)
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert size > 400 << 20
    support = Path(__file__).parents[2] / "support"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(support)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with CheckpointReader(tmp_path / "model") as one, CheckpointReader(tmp_path / "merged") as two:
        for name, _ in one.infos():
            assert torch.equal(one.read(name), two.read(name))
