"""A checkpoint directory written as a stream: configuration, shards with their index, and the small files beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from flexgate.experts.checkpoint.layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from flexgate.experts.errors import LayoutError
from flexgate.experts.io.progress import Progress, silent
from flexgate.experts.io.stream import Job, Piece, nbytes

SHARD_BYTES: Final = 5 * 10**9
MAX_SMALL_FILE: Final = 1 << 26
SMALL_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)
"""What belongs to the public model and is copied with it."""


def write_model(
    job: Job,
    config: Mapping[str, Any],
    pieces: Mapping[str, Piece],
    *,
    beside: Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write a checkpoint in the order of ``pieces``, in shards of ``shard_bytes`` (more only for one larger tensor)."""
    for name in SMALL_FILES:
        if (beside / name).is_file():
            job.write_text(name, _small(beside / name))
    job.write_text(CONFIG_NAME, to_json(config))
    shards = list(_shards(pieces, shard_bytes))
    if len(shards) == 1:
        job.write_file(WEIGHTS_NAME, shards[0], progress=progress)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        job.write_file(name, shard, progress=progress)
        places |= dict.fromkeys(shard, name)
    total = sum(nbytes(piece) for piece in pieces.values())
    job.write_text(INDEX_NAME, to_json({"metadata": {"total_size": total}, "weight_map": places}))


def _shards(pieces: Mapping[str, Piece], shard_bytes: int) -> Iterator[dict[str, Piece]]:
    shard: dict[str, Piece] = {}
    used = 0
    for key, piece in pieces.items():
        if shard and used + nbytes(piece) > shard_bytes:
            yield shard
            shard, used = {}, 0
        shard[key] = piece
        used += nbytes(piece)
    yield shard


def _small(path: Path) -> bytes:
    if path.stat().st_size > MAX_SMALL_FILE:
        raise LayoutError(f"{path} is larger than {MAX_SMALL_FILE} bytes")
    return path.read_bytes()


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON for people and programs."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
