"""The demo checkpoint directory: the merged model, the probes, and the digests of all files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flexgate.experts.checkpoint.layout import CONFIG_NAME
from flexgate.experts.checkpoint.reader import read_json
from flexgate.experts.demo.probes import Probe, write_probes
from flexgate.experts.package.provenance import expert_entries

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
PROBES_NAME: Final = "probes.jsonl"
DIGESTS_NAME: Final = "SHA256SUMS"


def ship(merged: Path, output: Path, probes: Sequence[Probe]) -> None:
    """Put a merged checkpoint with its probes at ``output``, in place of what is there."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(merged, output)
    write_probes(output / PROBES_NAME, probes)
    for path in output.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    lines = (f"{digest}  {name}\n" for name, digest in digests(output).items())
    (output / DIGESTS_NAME).write_text("".join(lines))


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the list of digests itself."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != DIGESTS_NAME)
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_digests(directory: Path) -> dict[str, str]:
    """What ``ship`` recorded, in the format of ``sha256sum --check``."""
    lines = (directory / DIGESTS_NAME).read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def expert_ids(directory: Path) -> tuple[str, ...]:
    """The manifest's expert ids in the order of their indices."""
    count = read_json(directory / CONFIG_NAME)["num_experts"]
    return tuple(entry["id"] for entry in expert_entries(directory, count))
