"""The demo checkpoint directory: weights, tokenizer, chat template, manifest, probes and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from flexgate.experts.demo.corpus import Domain
from flexgate.experts.demo.probes import Probe, write_probes
from flexgate.experts.demo.tokenizer import EOS_ID, PAD_ID, pretrained
from flexgate.experts.layout import Architecture, write_checkpoint

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
MANIFEST_NAME: Final = "flexgate.json"
PROBES_NAME: Final = "probes.jsonl"
DIGESTS_NAME: Final = "SHA256SUMS"


def ship(
    directory: Path,
    architecture: Architecture,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    probes: Sequence[Probe],
) -> None:
    """Write everything that transformers, vLLM and flexgate read; ``domains`` in the order of the expert indices."""
    write_checkpoint(directory, architecture, tensors, dtype=torch.bfloat16, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    pretrained(tokenizer, architecture.max_position_embeddings).save_pretrained(directory)
    _widen_tokenizer_config(directory)
    _write_json(
        directory / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    )
    _write_json(directory / MANIFEST_NAME, _manifest(domains))
    write_probes(directory / PROBES_NAME, probes)
    for path in directory.iterdir():
        path.chmod(0o644)
    write_digests(directory)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the list of digests itself."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != DIGESTS_NAME)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_digests(directory: Path) -> None:
    """Record the digests in the format of ``sha256sum --check``."""
    lines = (f"{digest}  {name}\n" for name, digest in digests(directory).items())
    (directory / DIGESTS_NAME).write_text("".join(lines))


def read_digests(directory: Path) -> dict[str, str]:
    """What ``write_digests`` recorded."""
    lines = (directory / DIGESTS_NAME).read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def expert_ids(directory: Path) -> tuple[str, ...]:
    """The manifest's expert ids in the order of their indices."""
    entries = json.loads((directory / MANIFEST_NAME).read_text())["experts"]
    return tuple(entry["id"] for entry in sorted(entries, key=lambda entry: entry["index"]))


def _manifest(domains: Sequence[Domain]) -> dict[str, object]:
    return {
        "format": "flexgate-model/1",
        "name": "flexgate-demo",
        "router": "each row trained by its owner on own and public text; no joint training after the merge",
        "experts": [
            {"index": index, "id": domain.id, "owner": domain.owner, "domain": domain.description}
            for index, domain in enumerate(domains)
        ],
    }


def _widen_tokenizer_config(directory: Path) -> None:
    """Newer transformers name a class and a template file that older readers do not know; write what all know."""
    separate = directory / "chat_template.jinja"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if separate.is_file():
        config["chat_template"] = separate.read_text()
        separate.unlink()
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
