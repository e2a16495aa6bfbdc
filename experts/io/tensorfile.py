"""Safetensors files read and written as streams, with a header that is checked before anything trusts it.

The safetensors library accepts duplicate JSON keys, zero-size tensors and any names, and writes only what is whole in
memory. Here a header is at most ``MAX_HEADER`` bytes of JSON without duplicate keys, every tensor has a known dtype,
at least one element and a span that its shape explains, and the spans cover the file without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from reprlib import Repr
from typing import Any, Final

import torch
from torch import Tensor

from flexgate.experts.errors import TensorFileError

MAX_HEADER: Final = 1 << 20
MAX_DIMENSIONS: Final = 8
CHUNK: Final = 1 << 20
"""Bytes read at a time: several times as many leave the processor's cache before they are hashed and written."""
DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "BF16": torch.bfloat16}
"""Stored dtypes by their names in the file."""
DTYPE_NAMES: Final[Mapping[str, str]] = {"float32": "F32", "bfloat16": "BF16"}
"""Stored dtypes by the names that config.json uses."""

_REPR: Final = Repr()
_REPR.maxstring, _REPR.maxlong = 120, 24


def short(value: object) -> str:
    """A foreign value for a message: printable and bounded."""
    return _REPR.repr(value)


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; ``begin`` and ``end`` are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open file whose header passed every check; reads go to the same open file for as long as it lives."""

    def __init__(self, descriptor: int, name: str, *, max_header: int = MAX_HEADER) -> None:
        """Take over ``descriptor``; ``name`` is for messages. Raises ``TensorFileError``."""
        self._descriptor = descriptor
        self.name = name
        try:
            self.size = os.fstat(descriptor).st_size
            self.header = _header_bytes(self, max_header)
            self.tensors = parse_header(self.header, self.size, name)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: Path, *, max_header: int = MAX_HEADER) -> TensorFile:
        """Open a path that need not be trusted less than its folder."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TensorFileError(f"{path} cannot be read: {error.strerror}") from error
        return cls(descriptor, str(path), max_header=max_header)

    def stamp(self) -> list[int]:
        """What changes when somebody writes to the file."""
        status = os.fstat(self._descriptor)
        return [status.st_ino, status.st_size, status.st_mtime_ns]

    def close(self) -> None:
        """Close the file; further reads fail."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def chunks(self, name: str, first: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """The bytes of a tensor, or of ``count`` of its rows from ``first`` on, in pieces of at most ``CHUNK``.

        A piece is overwritten by the one after the next, so that one can be worked on while another is read.
        """
        info = self.tensors[name]
        row = (info.end - info.begin) // info.shape[0]
        rows = info.shape[0] - first if count is None else count
        yield from self._span(info.begin + first * row, info.begin + (first + rows) * row)

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype, in memory of its own."""
        info = self.tensors[name]
        whole = bytearray(info.end - info.begin)
        self.fill(memoryview(whole), info.begin)
        return torch.frombuffer(whole, dtype=DTYPES[info.dtype]).view(info.shape)

    def fill(self, target: memoryview, position: int) -> None:
        """Fill ``target`` from ``position`` on; raises ``TensorFileError`` where the file ends early."""
        while target:
            got = os.preadv(self._descriptor, [target], position)
            if not got:
                raise TensorFileError(f"{self.name} ends at byte {position}: it is shorter than its header says")
            target, position = target[got:], position + got

    def _span(self, begin: int, end: int) -> Iterator[memoryview]:
        buffers = cycle([bytearray(min(CHUNK, end - begin)) for _ in range(2 if end - begin > CHUNK else 1)])
        for position, buffer in zip(range(begin, end, CHUNK), buffers, strict=False):
            piece = memoryview(buffer)[: min(CHUNK, end - position)]
            self.fill(piece, position)
            yield piece


def parse_header(header: bytes, size: int, name: str) -> dict[str, TensorInfo]:
    """The tensors that a header names, in the order of their spans; raises ``TensorFileError``."""
    entries = parse_json(header, f"the header of {name}", TensorFileError)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{name}: __metadata__ must map names to texts")
    base = 8 + len(header)
    found = {key: _tensor_info(key, entry, base, name) for key, entry in entries.items()}
    ordered = dict(sorted(found.items(), key=lambda item: item[1].begin))
    position = base
    for key, info in ordered.items():
        if info.begin != position:
            raise TensorFileError(f"{name}: {short(key)} begins at byte {info.begin}, expected {position}")
        position = info.end
    if position != size:
        raise TensorFileError(f"{name} has {size} bytes, its header explains {position}")
    return ordered


def parse_json(text: bytes, where: str, error_class: type[Exception]) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinity; raises ``error_class``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"duplicate key {short(Counter(key for key, _ in pairs).most_common(1)[0][0])}")
        return found

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise error_class(f"{where} is not strict JSON: {error}") from error
    if not isinstance(value, dict):
        raise error_class(f"{where} must be a JSON object")
    return value


def file_digest(header: bytes, digests: Mapping[str, str]) -> str:
    """One digest for a file: SHA-256 of its header (without the length) and its tensors' digests, in file order."""
    return hashlib.sha256(header + b"".join(bytes.fromhex(digest) for digest in digests.values())).hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they are stored."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Length field and header for tensors (dtype, shape) laid out one after the other in the given order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _header_bytes(file: TensorFile, max_header: int) -> bytes:
    length = bytearray(8)
    file.fill(memoryview(length), 0)
    (count,) = struct.unpack("<Q", length)
    if count > max_header:
        raise TensorFileError(f"{file.name} announces a header of {count} bytes, at most {max_header} are read")
    if count > file.size - 8:
        raise TensorFileError(f"{file.name} has {file.size} bytes and announces a header of {count}")
    header = bytearray(count)
    file.fill(memoryview(header), 8)
    return bytes(header)


def _tensor_info(key: str, entry: Any, base: int, name: str) -> TensorInfo:
    def error(what: str) -> TensorFileError:
        return TensorFileError(f"{name}: {short(key)} {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise error("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"has dtype {short(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _counts(shape) or not 1 <= len(shape) <= MAX_DIMENSIONS or 0 in shape:
        raise error(f"has shape {short(shape)}, expected 1 to {MAX_DIMENSIONS} positive sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise error(f"has data_offsets {short(offsets)}, expected two positions")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise error(f"spans {short(end - begin)} bytes, which {dtype} {short(shape)} does not fill")
    return TensorInfo(dtype, tuple(shape), base + begin, base + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
