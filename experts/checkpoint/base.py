"""Which base model an expert belongs to, so that equal means equal in every bit.

The *shared* tensors of a model are all that its public anchor has: embeddings, attention, norms, head, the public
expert's FFN (index 0) and the public router row of every layer. An anchor and every model merged from it hold the same
ones. Router rows are named ``model.layers.L.mlp.gate.weight[0]``, a public bias ``….gate.bias[0]``; a public bias that
is zero in every bit counts as absent, because merging an expert with a bias adds it.

A tensor's digest is the SHA-256 of its bytes as stored (little-endian, row by row). The model's digest is the SHA-256
of one line ``name dtype shape digest`` per shared tensor, sorted by name, shape sizes joined by ``x``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from torch import Tensor

from flexgate.experts.checkpoint.layout import (
    Architecture,
    bias_keys,
    expected_shapes,
    expert_keys,
    router_keys,
    shared_keys,
)
from flexgate.experts.checkpoint.reader import CheckpointReader
from flexgate.experts.errors import LayoutError
from flexgate.experts.io.hashing import Digests
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.tensorfile import DTYPES, tensor_bytes


@dataclass(frozen=True)
class BaseArchitecture:
    """The numbers that anchor, pairs and merged models of one family share; names are those of ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float
    rms_norm_eps: float
    norm_topk_prob: bool
    tie_word_embeddings: bool = False

    @classmethod
    def of(cls, architecture: Architecture) -> BaseArchitecture:
        """Without the numbers that a merge changes."""
        return cls(**{field.name: getattr(architecture, field.name) for field in fields(cls)})

    def with_experts(self, count: int, top_k: int) -> Architecture:
        """A model of this family with ``count`` experts."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Architecture(num_experts=count, num_experts_per_tok=top_k, **values)


@dataclass(frozen=True)
class BaseIdentity:
    """A base model: its numbers, stored dtype (``F32`` or ``BF16``) and the digest of every shared tensor."""

    architecture: BaseArchitecture
    dtype: str
    tensors: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One SHA-256 for all shared tensors."""
        return base_digest(self.architecture, self.dtype, self.tensors)

    def difference(self, other: BaseIdentity) -> str | None:
        """Where ``other`` first differs, in words; None where it is the same model."""
        for field in fields(self.architecture):
            mine, theirs = getattr(self.architecture, field.name), getattr(other.architecture, field.name)
            if mine != theirs:
                return f"{field.name} is {theirs}, expected {mine}"
        if self.dtype != other.dtype:
            return f"it is stored as {other.dtype}, expected {self.dtype}"
        for name in sorted(self.tensors.keys() | other.tensors.keys()):
            if self.tensors.get(name) != other.tensors.get(name):
                return f"shared tensor {name} differs"
        return None


ROW: Final = "[0]"


def base_identity(directory: Path, progress: Progress = silent) -> BaseIdentity:
    """The identity of an anchor's or a merged model's base; reads every shared byte once.

    Raises:
        LayoutError: the directory holds no such checkpoint.
    """
    with CheckpointReader(directory) as checkpoint:
        return identity_of(checkpoint, progress)


def identity_of(checkpoint: CheckpointReader, progress: Progress = silent) -> BaseIdentity:
    """``base_identity`` of an open checkpoint."""
    with SharedDigests(checkpoint) as shared:
        return shared.identity(progress)


class SharedDigests:
    """A checkpoint's shared tensors, hashed while they pass on to somewhere else, so that they are read once."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self._checkpoint = checkpoint
        self._sums = Digests()
        self._seen: set[str] = set()

    def __enter__(self) -> SharedDigests:
        return self

    def __exit__(self, *_: object) -> None:
        self._sums.close()

    def chunks(self, key: str, *, row: bool = False) -> Iterator[memoryview]:
        """A tensor, or with ``row`` the first of its rows, as ``CheckpointReader.chunks`` gives it; to be read once."""
        name = key + ROW if row else key
        for chunk in self._checkpoint.chunks(key, 0, 1 if row else None):
            self._sums.add(name, chunk)
            yield chunk
        self._seen.add(name)

    def identity(self, progress: Progress = silent) -> BaseIdentity:
        """Who the model is, by what has passed; what has not is read now, and that alone is progress."""
        architecture = self._checkpoint.architecture
        biases = [key + ROW for key in bias_keys(architecture) if key in self._checkpoint]
        rows = [*(key + ROW for key in router_keys(architecture)), *biases]
        names = [*shared_keys(architecture), *expert_keys(architecture, 0), *rows]
        for name in names:
            if name not in self._seen:
                for chunk in self.chunks(name.removesuffix(ROW), row=name.endswith(ROW)):
                    progress(len(chunk))
        digests = {name: self._sums.hex(name) for name in names}
        zero = hashlib.sha256(bytes(DTYPES[self._checkpoint.dtype].itemsize)).hexdigest()
        if all(digests[name] == zero for name in biases):
            for name in biases:
                del digests[name]
        return BaseIdentity(BaseArchitecture.of(architecture), self._checkpoint.dtype, digests)


def read_shared(checkpoint: CheckpointReader, key: str, base: BaseIdentity) -> Tensor:
    """A whole shared tensor, which must be the one of the base's digest; raises ``LayoutError``."""
    tensor = checkpoint.read(key)
    if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != base.tensors.get(key):
        raise LayoutError(f"{checkpoint.directory}: shared tensor {key} is not the one that the base's digest names")
    return tensor


def base_digest(architecture: BaseArchitecture, dtype: str, tensors: Mapping[str, str]) -> str:
    """The digest over the digests; raises ``LayoutError`` unless ``tensors`` names exactly the shared ones."""
    shapes = record_shapes(architecture)
    required = {name for name in shapes if ".gate.bias" not in name}
    if tensors.keys() not in (required, shapes.keys()):
        odd = min(tensors.keys() ^ required)
        raise LayoutError(f"the shared tensors must be exactly those of the architecture; see {odd!r}")
    lines = (f"{name} {dtype} {'x'.join(map(str, shapes[name]))} {tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def record_shapes(architecture: BaseArchitecture) -> dict[str, tuple[int, ...]]:
    """The records of a base model with their shapes, those of an optional public bias included."""
    one = architecture.with_experts(1, 1)
    shapes = expected_shapes(one)
    records = {name: shapes[name] for name in (*shared_keys(one), *expert_keys(one, 0))}
    records |= {key + ROW: (one.hidden_size,) for key in router_keys(one)}
    return records | {key + ROW: (1,) for key in bias_keys(one)}
