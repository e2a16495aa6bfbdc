"""The protocol's models on disk: an anchor, packages, and what the toolkit merges from them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from flexgate.experts.checkpoint.base import base_identity
from flexgate.experts.checkpoint.layout import write_checkpoint
from flexgate.experts.checkpoint.reader import read_checkpoint
from flexgate.experts.demo.tokenizer import EOS_ID, PAD_ID
from flexgate.experts.package.manifest import Statement, Training
from flexgate.experts.package.merge import combine
from flexgate.experts.package.verify import open_package
from flexgate.experts.package.weights import ExpertLayer
from flexgate.experts.package.write import write_package
from flexgate.experts.training.model import FlexOlmo
from flexgate.policies.ids import ExpertId, OwnerId


def save(model: FlexOlmo, target: Path) -> None:
    """Write a checkpoint that is whole or not there."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    tensors = model.state_dict()
    write_checkpoint(fresh, model.architecture, tensors, dtype=torch.float32, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    os.replace(fresh, target)


def load(directory: Path) -> FlexOlmo:
    """A checkpoint, frozen."""
    return FlexOlmo.from_tensors(*read_checkpoint(directory)).requires_grad_(False)


def package(target: Path, owner: str, anchor: Path, layers: Iterable[ExpertLayer]) -> None:
    """One owner's expert as a package, unsigned."""
    training = Training(data="invented facts of the demo", router="own", recipe={})
    statement = Statement(id=ExpertId(owner), owner=OwnerId(owner), domain=owner, training=training)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_package(target, statement, base_identity(anchor), layers, key=None)


def merge(target: Path, anchor: Path, packages: Sequence[Path], *, top_k: int) -> None:
    """The toolkit's merge of ``packages``."""
    base = base_identity(anchor)
    with tempfile.TemporaryDirectory(prefix="flexgate-") as private, ExitStack() as stack:
        opened = [
            stack.enter_context(open_package(path, base=base, trusted_keys=None, into=Path(private) / path.name))
            for path in packages
        ]
        combine(anchor, opened, target, top_k=top_k)
